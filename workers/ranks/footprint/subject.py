"""What a configuration is about, made of its configs alone: a task on a model without weights, and a batch
of the length that counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer, models
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from shared.footprint import Configuration
from shared.specs import SEQ2SEQ
from workers.ranks.loading import override_dropout, quiet
from workers.ranks.train.columns import Collector
from workers.ranks.train.distillation import Distillation
from workers.ranks.train.examples import Batch, Examples
from workers.ranks.train.freezing import freeze
from workers.ranks.train.recompute import recompute_layers
from workers.ranks.train.scratch import make_model
from workers.ranks.train.tasks.base import Loaded, Objective, Predicts, Task
from workers.ranks.train.tasks.embeddings import Embeddings
from workers.ranks.train.tasks.fill_mask import FillMask
from workers.ranks.train.tasks.preferences import REFERENCE, Preferences
from workers.ranks.train.tasks.text2text import Text2Text
from workers.ranks.train.tasks.text_classification import MultiLabel, Regression, SingleLabel
from workers.ranks.train.tasks.text_generation import TextGeneration
from workers.ranks.train.tasks.token_classification import TokenClassification

_AUTO: Mapping[str, Any] = {
    "text-classification": AutoModelForSequenceClassification,
    "token-classification": AutoModelForTokenClassification,
    "text-generation": AutoModelForCausalLM,
    "fill-mask": AutoModelForMaskedLM,
    "embeddings": AutoModel,
    **dict.fromkeys(SEQ2SEQ, AutoModelForSeq2SeqLM),
}
_TASKS: Mapping[str, type[Task]] = {
    "token-classification": TokenClassification,
    "text-generation": TextGeneration,
    "fill-mask": FillMask,
    "embeddings": Embeddings,
    **dict.fromkeys(SEQ2SEQ, Text2Text),
}
_PROBLEMS: Mapping[str, tuple[type[Task], str]] = {
    "single-label": (SingleLabel, "single_label_classification"),
    "multi-label": (MultiLabel, "multi_label_classification"),
    "regression": (Regression, "regression"),
}
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_ORDINARY = len(_SPECIAL)
"""A token that is none of them."""
_FEWEST_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Subject:
    """What is measured."""

    model: PreTrainedModel
    teacher: PreTrainedModel | None
    task: Task
    objective: Objective

    @property
    def models(self) -> list[PreTrainedModel]:
        return [self.model, *([self.teacher] if self.teacher is not None else [])]

    @property
    def tensors(self) -> list[torch.Tensor]:
        """All that is there before the first batch."""
        return [t for model in self.models for t in (*model.parameters(), *model.buffers())]


def make_subject(configuration: Configuration, device: torch.device) -> Subject:
    """Model, task and objective, with what is frozen and what LoRA adds, as a training rank makes them.
    The models are made on ``device``: on the meta device they have no weights.

    Raises:
        TrainingFailed: freeze or LoRA patterns match nothing.
        ValueError: Transformers knows no such model.
    """
    spec = configuration.spec
    vocabulary = spec.architecture.vocabulary if spec.architecture else _FEWEST_TOKENS
    tokenizer = _stand_in(vocabulary)
    if configuration.model is not None:
        config = _config(configuration.model)
    else:
        with torch.device("meta"):
            config = make_model(spec, tokenizer).config
    model = _model(configuration, config, device)
    task = _task(configuration, model, tokenizer)
    if spec.method == "lora":
        # Imported here: PEFT takes seconds, and most trainings do without it.
        from workers.ranks.train.lora import add_lora

        with device:
            add_lora(model, spec.adaptation, seed=0, train_head=configuration.labels > 0)
    freeze(model, spec.hyperparameters.freeze)
    if spec.hyperparameters.gradient_checkpointing:
        recompute_layers(model)
    if configuration.teacher is None:
        return Subject(model, None, task, task)
    teacher = _model(configuration, _config(configuration.teacher), device)
    teaches = _task(configuration, teacher, tokenizer)
    assert isinstance(task, Predicts) and isinstance(teaches, Predicts)  # noqa: S101  see the spec
    answers = configuration.labels or int(config.get_text_config().vocab_size)
    objective = Distillation(
        task,
        teaches,
        teacher,
        range(answers),
        spec.teaching,
        spec.hyperparameters.label_smoothing,
        None,
    )
    return Subject(model, teacher, task, objective)


def make_batch(configuration: Configuration, subject: Subject, rows: int) -> Batch:
    """``rows`` examples of the length that counts. Unless they are packed all but the first are a token
    shorter: where nothing is padded, attention may go another way than it mostly does."""
    shorter = 0 if configuration.spec.hyperparameters.packing else 1
    lengths = [configuration.length] + [max(1, configuration.length - shorter)] * (rows - 1)
    examples = _examples(configuration, lengths)
    return subject.objective.batch(examples, range(rows), seed=0)


def _examples(configuration: Configuration, lengths: Sequence[int]) -> Examples:
    collected = Collector()
    for row, length in enumerate(lengths):
        # Not two rows alike: embeddings take equal texts for one.
        tokens = [_ORDINARY + (row >> bit & 1) for bit in range(min(length, 20))]
        tokens += [_ORDINARY] * (length - len(tokens))
        lists: dict[str, list[int]] = {"tokens": tokens}
        numbers: dict[str, float] = {}
        match configuration.spec.task:
            case "text-classification":
                match configuration.spec.problem:
                    case "single-label":
                        numbers["label"] = 0
                    case "multi-label":
                        lists["labels"] = [0]
                    case "regression":
                        numbers["value"] = 0.5
            case "token-classification":
                lists["labels"] = [0] * length
            case "text-generation":
                lists["learned"] = [0, length]
                if configuration.spec.preference is not None:
                    lists |= {"other_tokens": tokens, "other_learned": [0, length]}
                    numbers |= dict.fromkeys(REFERENCE, 0.0)
            case "text2text" | "summarization":
                lists["target_tokens"] = tokens
            case "embeddings":
                lists["other_tokens"] = tokens[::-1]
        collected.add(lists, length=length, weight=length, numbers=numbers)
    return collected.done()


def _stand_in(tokens: int) -> PreTrainedTokenizerFast:
    """A tokenizer that has nothing but a size and special tokens."""
    words = [*_SPECIAL, *(f"w{number}" for number in range(tokens - len(_SPECIAL)))]
    vocabulary = {word: index for index, word in enumerate(words)}
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]")),  # noqa: S106
        pad_token="[PAD]",  # noqa: S106
        unk_token="[UNK]",  # noqa: S106
        cls_token="[CLS]",  # noqa: S106
        sep_token="[SEP]",  # noqa: S106
        mask_token="[MASK]",  # noqa: S106
        eos_token="[SEP]",  # noqa: S106
    )


def _config(fields: Mapping[str, Any]) -> PreTrainedConfig:
    known = {name: value for name, value in fields.items() if name != "model_type"}
    config: PreTrainedConfig = AutoConfig.for_model(str(fields.get("model_type")), **known)
    config._attn_implementation = None
    return config


def _model(
    configuration: Configuration, config: PreTrainedConfig, device: torch.device
) -> PreTrainedModel:
    spec = configuration.spec
    if configuration.labels:
        config.id2label = {index: str(index) for index in range(configuration.labels)}
        config.label2id = {name: index for index, name in config.id2label.items()}
    if spec.task == "text-classification":
        config.problem_type = _PROBLEMS[spec.problem][1]  # type: ignore[assignment]
    if spec.hyperparameters.dropout is not None:
        override_dropout(config, spec.hyperparameters.dropout)
    with quiet(), device:
        model: PreTrainedModel = _AUTO[spec.task].from_config(config, dtype=torch.float32)
    return model


def _task(
    configuration: Configuration, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> Task:
    spec = configuration.spec
    kind = _PROBLEMS[spec.problem][0] if spec.task == "text-classification" else _TASKS[spec.task]
    if spec.preference is not None:
        kind = Preferences
    labels = tuple(str(index) for index in range(configuration.labels))
    return kind(Loaded(model, tokenizer, configuration.length, "", labels), spec)
