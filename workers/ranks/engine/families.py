"""What each task needs of a model: how its folder is loaded, what is refused, how much it can read."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

from shared.errors import UnsupportedModel
from shared.specs import Task
from workers.ranks.folders import LoadError, inspect_folder, read_json
from workers.ranks.loading import (
    load_causal_lm,
    load_encoder,
    load_masked_lm,
    load_seq2seq,
    load_sequence_classifier,
    load_token_classifier,
    promised,
)

_NO_LIMIT = 1_000_000
"""Tokens where neither model nor tokenizer names a limit."""


def load_for_task(task: Task, path: str, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a folder, loaded so that it can do ``task``.

    Raises:
        LoadError: see there.
        UnsupportedModel: it loads, and was made for something else.
    """
    match task:
        case "text-classification":
            return _load_classifier(task, path, dtype)
        case "token-classification":
            return _load_classifier(task, path, dtype)
        case "fill-mask":
            _require_encoder(path, "fill masks")
            return load_masked_lm(path, dtype=dtype)
        case "embeddings":
            _require_encoder(path, "make embeddings")
            return load_encoder(path, dtype=dtype)
        case "text2text" | "summarization":
            return _load_seq2seq(path, dtype)
        case "reranking":
            return _load_cross_encoder(path, dtype)
        case "text-generation" | "scoring":
            return _load_causal_lm(path, dtype)


def form_of(task: Task, path: str) -> PreTrainedModel:
    """The model of a folder without its numbers: its class, config and generation config, for an engine that
    loads the weights itself.

    Raises:
        LoadError, UnsupportedModel: as :func:`load_for_task`, but for what is wrong with the weights.
    """
    with promised(lambda _: None):
        return load_for_task(task, path, torch.float32)


def refuse_tokenizer(task: Task, path: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises UnsupportedModel where the tokenizer lacks what the task needs."""
    name = Path(path).name
    if task == "token-classification" and not tokenizer.is_fast:
        raise UnsupportedModel(
            f"the tokenizer of model '{name}' ({type(tokenizer).__name__}) cannot tell which token "
            "belongs to which word",
            param="model",
            hint="Choose a model with a fast tokenizer, one that has a tokenizer.json.",
        )
    if task == "fill-mask" and tokenizer.mask_token_id is None:
        raise UnsupportedModel(
            f"the tokenizer of model '{name}' has no mask token",
            param="model",
            hint="Choose a model that was pretrained on masked text, with its own tokenizer.",
        )


def context_length(
    task: Task, path: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> int:
    """Tokens that a row may have: for text-generation input and output together, else the input (a
    pair of texts, for reranking)."""
    config = model.config.get_text_config()
    positions = (
        getattr(config, "max_encoder_position_embeddings", None)
        or getattr(config, "max_position_embeddings", None)
        or _NO_LIMIT
    )
    if task in ("text-generation", "scoring"):
        return int(positions)
    for name, module in model.named_modules():
        # RoBERTa and kin number positions from padding_idx + 1: the table has fewer of use.
        if name.endswith("position_embeddings") and isinstance(module, torch.nn.Embedding):
            positions = module.num_embeddings
            if module.padding_idx is not None:
                positions -= module.padding_idx + 1
    if task == "embeddings":
        # sentence-transformers cuts there, often well below what the encoder could read.
        own = read_json(Path(path) / "sentence_bert_config.json", required=False)
        if isinstance(limit := own.get("max_seq_length"), int) and limit > 0:
            positions = min(positions, limit)
    return int(min(positions, tokenizer.model_max_length))


def _load_classifier(task: Task, path: str, dtype: torch.dtype) -> PreTrainedModel:
    if task == "text-classification":
        classifier, head = load_sequence_classifier(path, dtype=dtype), "classification"
    else:
        classifier, head = load_token_classifier(path, dtype=dtype), "tagging"
    if classifier.fresh_head:
        raise UnsupportedModel(
            f"model '{Path(path).name}' has no trained {head} head",
            param="model",
            hint=f"Fine-tune it for {task} first and use that job's model.",
        )
    return classifier.model


def _load_cross_encoder(path: str, dtype: torch.dtype) -> PreTrainedModel:
    found = load_sequence_classifier(path, dtype=dtype)
    labels = found.model.config.num_labels or 1
    if found.fresh_head or labels > 2:
        what = (
            f"tells {labels} labels apart" if labels > 2 else "has no trained classification head"
        )
        raise UnsupportedModel(
            f"model '{Path(path).name}' {what}: reranking needs one score for a pair of texts",
            param="model",
            hint="Choose a cross-encoder: a sequence classifier with one label, or with two.",
        )
    return found.model


def _require_encoder(path: str, use: str) -> None:
    """Decoders and encoder-decoders load as encoders, too, and their vectors mean something else."""
    folder = inspect_folder(path)
    config = read_json(folder / "config.json", required=True)
    known = config.get("model_type") in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if not known or config.get("is_decoder") or config.get("is_encoder_decoder"):
        raise LoadError(
            "model_unsuitable",
            f"model '{folder.name}' is of type '{config.get('model_type')}' and cannot {use}",
            "Choose a BERT-type encoder, for instance bert, distilbert, roberta, electra or mpnet.",
        )


def _load_seq2seq(path: str, dtype: torch.dtype) -> PreTrainedModel:
    names = MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.values()
    hint = "Choose an encoder-decoder (T5, BART and kin)."
    _require_made_as(path, names, "does not write one text for another", hint)
    model = load_seq2seq(path, dtype=dtype)
    if not model.config.is_encoder_decoder:
        raise _made_otherwise(
            path, type(model).__name__, "does not write one text for another", hint
        )
    return model


def _load_causal_lm(path: str, dtype: torch.dtype) -> PreTrainedModel:
    names = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    hint = "Choose a causal language model (GPT, Llama and kin)."
    _require_made_as(path, names, "cannot generate text", hint)
    model = load_causal_lm(path, dtype)
    # BERT and kin load under a language-model head too, but they see the future: only their
    # configurations have ``is_decoder``, and it is off.
    if getattr(model.config, "is_decoder", True) is False:
        raise _made_otherwise(path, type(model).__name__, "cannot generate text", hint)
    return model


def _require_made_as(path: str, names: Iterable[object], cannot: str, hint: str) -> None:
    config = read_json(inspect_folder(path) / "config.json", required=True)
    made_as = [str(name) for name in config.get("architectures") or ()]
    if made_as and not set(made_as).intersection(_flat(names)):
        raise _made_otherwise(path, made_as[0], cannot, hint)


def _flat(names: Iterable[object]) -> Iterable[str]:
    """Of the tables of Transformers: a type has a class, or several."""
    for name in names:
        yield from (name,) if isinstance(name, str) else map(str, name)  # type: ignore[call-overload]


def _made_otherwise(path: str, made_as: str, cannot: str, hint: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"model '{Path(path).name}' was made as {made_as} and {cannot}", param="model", hint=hint
    )
