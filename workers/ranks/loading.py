"""Opens model folders that somebody else wrote, safely.

A folder is data: no code of its own runs, no pickle is opened, nothing outside it is read, nothing
is fetched. Transformers alone does not promise all of that: it follows an index to
``../other.safetensors``, an ``adapter_config.json`` to another model, and silently makes up tensors
that are missing. So the folder is inspected first, and afterwards what was loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from workers.ranks.folders import LoadError, first_line, inspect_folder, read_json
from workers.ranks.promises import load_promised

__all__ = [
    "Classifier",
    "LoadError",
    "Problem",
    "inspect_folder",
    "known_labels",
    "load_causal_lm",
    "load_encoder",
    "load_masked_lm",
    "load_seq2seq",
    "load_sequence_classifier",
    "load_token_classifier",
    "load_tokenizer",
    "override_dropout",
    "promised",
    "quiet",
]

Problem = Literal["single_label_classification", "multi_label_classification", "regression"]
"""What Transformers calls a classifier's ``problem_type``."""

_USES: dict[Any, str] = {
    AutoModelForSequenceClassification: "classify text",
    AutoModelForTokenClassification: "tag tokens",
    AutoModelForMaskedLM: "fill masks",
    AutoModelForSeq2SeqLM: "write one text for another",
    AutoModelForCausalLM: "generate text",
    AutoModel: "be loaded as an encoder",
}

_told_if_whole: ContextVar[Callable[[str], object] | None] = ContextVar("told", default=None)


@dataclass(frozen=True, slots=True)
class Classifier:
    """A classifier of texts or tokens in ``eval`` mode on the CPU, and the parameters its folder lacked."""

    model: PreTrainedModel
    fresh: tuple[str, ...]

    @property
    def fresh_head(self) -> bool:
        """The classification head is newly initialised: untrained, its predictions mean nothing."""
        return bool(self.fresh)


def load_sequence_classifier(
    path: str | Path,
    *,
    labels: Sequence[str] | None = None,
    problem: Problem = "single_label_classification",
    dtype: torch.dtype = torch.float32,
    dropout: float | None = None,
    seed: int = 0,
) -> Classifier:
    """Load a classifier, or an encoder under a new classification head.

    Args:
        path: The model folder, absolute.
        labels: Label names by class index. A head of another size is replaced by a fresh one; None
            keeps the labels of the folder.
        problem: With ``labels``: what Transformers calls ``problem_type``.
        dropout: Overrides every dropout probability of the model.
        seed: A fresh head is a function of the model's architecture, ``labels`` and this alone.

    Raises:
        LoadError: see there. Only tensors of the head may be missing from the folder.
    """
    folder = inspect_folder(path)
    config = _load_config(folder)
    if labels is not None:
        _name_labels(config, labels)
        config.problem_type = problem
    if dropout is not None:
        override_dropout(config, dropout)
    auto = AutoModelForSequenceClassification
    return _load_classifier(auto, folder, config, dtype, seed, other_size=labels is not None)


def load_token_classifier(
    path: str | Path,
    *,
    labels: Sequence[str] | None = None,
    dropout: float | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Classifier:
    """Load a classifier of tokens, or an encoder under a new tagging head.

    Args, Raises: as for :func:`load_sequence_classifier`.
    """
    folder = inspect_folder(path)
    config = _load_config(folder)
    if labels is not None:
        _name_labels(config, labels)
    if dropout is not None:
        override_dropout(config, dropout)
    auto = AutoModelForTokenClassification
    return _load_classifier(auto, folder, config, dtype, seed, other_size=labels is not None)


def known_labels(path: str | Path) -> tuple[str, ...] | None:
    """The label names by class index that a model folder declares; None where it has none of its own.

    Raises:
        LoadError: see there.
    """
    config = read_json(inspect_folder(path) / "config.json", required=True)
    names = config.get("id2label")
    if not isinstance(names, dict) or not names:
        return None
    try:
        return tuple(str(names[str(index)]) for index in range(len(names)))
    except KeyError:
        return None


def load_causal_lm(
    path: str | Path, dtype: torch.dtype, *, dropout: float | None = None
) -> PreTrainedModel:
    """Load a decoder-only language model in ``eval`` mode on the CPU.

    Args:
        dropout: Overrides every dropout probability of the model.

    Raises:
        LoadError: see there. No tensor may be missing.
    """
    folder = inspect_folder(path)
    config = _load_config(folder)
    if dropout is not None:
        override_dropout(config, dropout)
    model, info = _load_model(AutoModelForCausalLM, folder, config=config, dtype=dtype)
    _refuse_missing(folder, sorted(info["missing_keys"]))
    return model


def load_masked_lm(
    path: str | Path,
    *,
    dropout: float | None = None,
    seed: int = 0,
    allow_fresh_head: bool = False,
    dtype: torch.dtype = torch.float32,
) -> PreTrainedModel:
    """Load an encoder under its masked-language-model head, in ``eval`` mode on the CPU.

    Args:
        dropout: Overrides every dropout probability of the model.
        seed: A fresh head is a function of the model's architecture and this alone.
        allow_fresh_head: Take an encoder that has no such head, for training.

    Raises:
        LoadError: see there; ``model_unsuitable`` where the head is missing and must not be.
    """
    folder = inspect_folder(path)
    config = _load_config(folder)
    if dropout is not None:
        override_dropout(config, dropout)
    with _seeded(seed):
        model, info = _load_model(AutoModelForMaskedLM, folder, config=config, dtype=dtype)
    missing = sorted(info["missing_keys"])
    _refuse_missing(folder, [name for name in missing if not _belongs_to_head(model, name)])
    if missing and not allow_fresh_head:
        raise LoadError(
            "model_unsuitable",
            f"model '{folder.name}' has no trained masked-language-model head: "
            f"{missing[0]} is missing",
            "Choose a model that was pretrained on masked text, or fine-tune it for fill-mask first.",
        )
    return model


def load_encoder(
    path: str | Path, *, dtype: torch.dtype, dropout: float | None = None
) -> PreTrainedModel:
    """Load the encoder below whatever head a folder has, in ``eval`` mode on the CPU.

    Its output is ``last_hidden_state``: a pooler that the folder lacks is made up, and not trained.

    Raises:
        LoadError: see there. No tensor but a pooler's may be missing.
    """
    folder = inspect_folder(path)
    config = _load_config(folder)
    if dropout is not None:
        override_dropout(config, dropout)
    with _seeded(0):
        model, info = _load_model(AutoModel, folder, config=config, dtype=dtype)
    missing = sorted(info["missing_keys"])
    _refuse_missing(folder, [name for name in missing if not name.startswith("pooler.")])
    return model


def load_seq2seq(
    path: str | Path, *, dtype: torch.dtype, dropout: float | None = None
) -> PreTrainedModel:
    """Load an encoder-decoder language model in ``eval`` mode on the CPU.

    Raises:
        LoadError: see there. No tensor may be missing.
    """
    folder = inspect_folder(path)
    config = _load_config(folder)
    if dropout is not None:
        override_dropout(config, dropout)
    model, info = _load_model(AutoModelForSeq2SeqLM, folder, config=config, dtype=dtype)
    _refuse_missing(folder, sorted(info["missing_keys"]))
    return model


def load_tokenizer(path: str | Path, **options: Any) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model folder; ``options`` as ``AutoTokenizer`` takes them
    (``padding_side="left"`` for generation).

    Raises:
        LoadError: see there.
    """
    folder = inspect_folder(path, weights=False)
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=False, **options
            )
    except MemoryError:
        raise
    except Exception as error:
        raise LoadError(
            "model_unsuitable",
            f"the tokenizer of model folder '{folder.name}' cannot be loaded: {first_line(error)}",
            "tokenizer.save_pretrained(folder) writes its files beside the model's.",
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise LoadError("model_unsuitable", f"model folder '{folder.name}' has no text tokenizer")
    # From a folder without any vocabulary Transformers makes one up that knows no word.
    vocabulary = {"tokenizer.json", *type(tokenizer).vocab_files_names.values()}
    if not any((folder / name).is_file() for name in vocabulary):
        raise LoadError(
            "model_unsuitable",
            f"model folder '{folder.name}' has no tokenizer files",
            "tokenizer.save_pretrained(folder) writes them beside the model's.",
        )
    return tokenizer


def _load_config(folder: Path) -> PreTrainedConfig:
    try:
        with quiet():
            config: PreTrainedConfig = AutoConfig.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=False
            )
    except Exception as error:
        raise LoadError(
            "model_unsuitable",
            f"config.json of '{folder.name}' describes no model that Transformers knows: "
            f"{first_line(error)}",
            "Models that bring their own code are not loaded.",
        ) from error
    # A folder may ask for a kernel from the hub here; what computes attention is ours to choose.
    config._attn_implementation = None
    return config


def _load_classifier(
    auto: Any,
    folder: Path,
    config: PreTrainedConfig,
    dtype: torch.dtype,
    seed: int,
    *,
    other_size: bool,
) -> Classifier:
    """``other_size``: a head of another size than the labels' number is replaced by a fresh one."""
    with _seeded(seed):
        model, info = _load_model(
            auto, folder, config=config, dtype=dtype, ignore_mismatched_sizes=other_size
        )
    mismatched = {
        entry[0] if isinstance(entry, tuple) else entry for entry in info["mismatched_keys"]
    }
    fresh = sorted({*info["missing_keys"], *mismatched})
    _refuse_missing(folder, [name for name in fresh if not _belongs_to_head(model, name)])
    return Classifier(model=model, fresh=tuple(fresh))


@contextmanager
def promised(tell: Callable[[str], object]) -> Iterator[None]:
    """Models that are loaded meanwhile are promised (``promises.py``): of their numbers none is read. All
    else about them is as ever. One that cannot be is loaded whole, and ``tell`` gets to hear why."""
    token = _told_if_whole.set(tell)
    try:
        yield
    finally:
        _told_if_whole.reset(token)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Fresh parameters follow the seed; the global generator is left as it was found: an engine loads
    while others sample."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def _load_model(
    auto: Any, folder: Path, *, config: PreTrainedConfig, **options: Any
) -> tuple[PreTrainedModel, dict[str, Any]]:
    tell = _told_if_whole.get()
    if tell is None:
        return _load_whole(auto, folder, config=config, **options)
    try:
        # What is new in a model is drawn by whichever of the two ways makes it.
        with quiet(), torch.random.fork_rng(devices=[]):
            model, info = load_promised(auto, folder, config=config, **options)
    except Exception as problem:
        # Of whatever kind: what is wrong with the folder itself is found, and said, by the other way.
        loaded = _load_whole(auto, folder, config=config, **options)
        why = first_line(problem)
        tell(f"note: each rank loads the whole of '{folder.name}' into host memory: {why}")
        return loaded
    model.eval()  # type: ignore[no-untyped-call]
    return model, info


def _load_whole(
    auto: Any, folder: Path, *, config: PreTrainedConfig, **options: Any
) -> tuple[PreTrainedModel, dict[str, Any]]:
    try:
        with quiet():
            model, info = auto.from_pretrained(
                str(folder),
                config=config,
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                **options,
            )
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except SafetensorError as error:
        raise LoadError(
            "model_damaged", f"the weights of '{folder.name}' are damaged: {first_line(error)}"
        ) from error
    except Exception as error:
        if "allocate memory" in str(error):
            raise
        if "Unrecognized configuration class" in str(error):
            raise LoadError(
                "model_unsuitable", f"a model of type '{config.model_type}' cannot {_USES[auto]}"
            ) from error
        raise LoadError(
            "model_damaged", f"model folder '{folder.name}' cannot be loaded: {first_line(error)}"
        ) from error
    if info["error_msgs"]:
        raise LoadError(
            "model_damaged", f"model folder '{folder.name}' does not load: {info['error_msgs'][0]}"
        )
    model.eval()
    return model, info


def _name_labels(config: PreTrainedConfig, labels: Sequence[str]) -> None:
    config.id2label = dict(enumerate(labels))
    config.label2id = {name: index for index, name in enumerate(labels)}


def _belongs_to_head(model: PreTrainedModel, name: str) -> bool:
    """Whether a parameter is part of the task's head. A pooler is: encoders that were
    pretrained on masked text alone have none."""
    base = f"{model.base_model_prefix}."
    return not name.startswith(base) or name.startswith(f"{base}pooler.")


def _refuse_missing(folder: Path, names: Sequence[str]) -> None:
    if names:
        shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        raise LoadError(
            "model_damaged",
            f"{len(names)} tensor(s) that the model needs are missing from '{folder.name}', "
            f"or have another shape: {shown}",
            "The folder is incomplete, or its config.json is of another model.",
        )


def override_dropout(config: PreTrainedConfig, value: float) -> None:
    """Set every dropout probability of a model's config."""
    for name, old in config.to_dict().items():
        # LayerDrop skips whole layers: that is another thing.
        if "drop" not in name or "layerdrop" in name:
            continue
        number = isinstance(old, int | float) and not isinstance(old, bool)
        if number or name == "classifier_dropout":
            setattr(config, name, value)


@contextmanager
def quiet() -> Iterator[None]:
    """Without progress bars and load reports: what they say is checked, and logs are for people."""
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]
