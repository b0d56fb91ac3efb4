"""Opens model folders that somebody else wrote, safely.

A folder is data: no code of its own runs, no pickle is opened, nothing outside it is read, nothing
is fetched. Transformers alone does not promise all of that: it follows an index to
``../other.safetensors``, an ``adapter_config.json`` to another model, and silently makes up tensors
that are missing. So the folder is inspected first, and afterwards what was loaded.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
Problem = Literal["single_label_classification", "multi_label_classification", "regression"]
"""What Transformers calls a classifier's ``problem_type``."""
_JSON_LIMIT = 64 * 1024 * 1024
_ENTRY_LIMIT = 10_000


class LoadError(Exception):
    """A model folder that cannot be used. ``code`` is stable, ``hint`` says what to do.

    Codes: ``model_not_found``, ``model_unsafe`` (reaches outside itself or needs code or pickle),
    ``model_damaged`` (truncated, tensors missing), ``model_unsuitable`` (sound, for another use).
    """

    def __init__(self, code: str, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.hint = hint


@dataclass(frozen=True, slots=True)
class Classifier:
    """A sequence classifier in ``eval`` mode on the CPU, and the parameters its folder lacked."""

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
        config.id2label = dict(enumerate(labels))
        config.label2id = {name: index for index, name in enumerate(labels)}
        config.problem_type = problem
    if dropout is not None:
        _override_dropout(config, dropout)
    # The global generator is left as it was found: an engine loads while others sample.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model, info = _load_model(
            AutoModelForSequenceClassification,
            folder,
            config=config,
            dtype=dtype,
            ignore_mismatched_sizes=labels is not None,
        )
    mismatched = {
        entry[0] if isinstance(entry, tuple) else entry for entry in info["mismatched_keys"]
    }
    fresh = sorted({*info["missing_keys"], *mismatched})
    _refuse_missing(folder, [name for name in fresh if not _belongs_to_head(model, name)])
    return Classifier(model=model, fresh=tuple(fresh))


def known_labels(path: str | Path) -> tuple[str, ...] | None:
    """The label names by class index that a model folder declares; None where it has none of its own.

    Raises:
        LoadError: see there.
    """
    config = _read_json(inspect_folder(path) / "config.json", required=True)
    names = config.get("id2label")
    if not isinstance(names, dict) or not names:
        return None
    try:
        return tuple(str(names[str(index)]) for index in range(len(names)))
    except KeyError:
        return None


def load_causal_lm(path: str | Path, dtype: torch.dtype) -> PreTrainedModel:
    """Load a decoder-only language model in ``eval`` mode on the CPU.

    Raises:
        LoadError: see there. No tensor may be missing.
    """
    folder = inspect_folder(path)
    model, info = _load_model(
        AutoModelForCausalLM, folder, config=_load_config(folder), dtype=dtype
    )
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
            f"the tokenizer of model folder '{folder.name}' cannot be loaded: {_first_line(error)}",
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


def inspect_folder(path: str | Path, *, weights: bool = True) -> Path:
    """Look a model folder over without loading anything; returns its resolved path.

    Raises:
        LoadError: not a folder, no safetensors weights (where ``weights``), or something in it
            names a file outside of it, another model, or code.
    """
    given = Path(path)
    if not given.is_absolute() or not given.is_dir():
        # Transformers would take a path that does not exist for a hub id.
        raise LoadError("model_not_found", f"'{path}' is no model folder")
    folder = given.resolve()
    _refuse_links_outside(folder)
    config = _read_json(folder / "config.json", required=weights)
    if "transformers_weights" in config:
        raise LoadError("model_unsafe", f"config.json of '{folder.name}' names its own weight file")
    if (folder / "adapter_config.json").exists():
        raise LoadError(
            "model_unsuitable",
            f"'{folder.name}' holds an adapter, not a whole model",
            "Merge the adapter into its base model (merge_and_unload) and save that.",
        )
    tokenizer = _read_json(folder / "tokenizer_config.json", required=False)
    for name in _strings(tokenizer.get("fast_tokenizer_files")):
        _require_plain_name(folder, name, "tokenizer_config.json")
    if weights:
        _inspect_weights(folder)
    return folder


def _inspect_weights(folder: Path) -> None:
    if (folder / ".metadata").exists() or any(folder.glob("shard-*-model-*.safetensors")):
        raise LoadError(
            "model_unsuitable",
            f"'{folder.name}' is a distributed checkpoint, not a model folder",
            "Load it where it was made and save it with model.save_pretrained(folder).",
        )
    if (folder / WEIGHTS).is_file():
        return
    if not (folder / INDEX).is_file():
        pickles = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
        if pickles:
            raise LoadError(
                "model_unsafe",
                f"'{folder.name}' has its weights only as a pickle ({pickles[0]}): it could run code",
                "Convert it where you trust it: model.save_pretrained(folder) writes safetensors.",
            )
        raise LoadError(
            "model_not_found",
            f"'{folder.name}' has no {WEIGHTS} and no {INDEX}",
            "A model folder is what model.save_pretrained(folder) writes.",
        )
    index = _read_json(folder / INDEX, required=True)
    files = index.get("weight_map")
    if not isinstance(files, dict) or not files:
        raise LoadError("model_damaged", f"{INDEX} of '{folder.name}' has no weight_map")
    for name in sorted({str(value) for value in files.values()}):
        _require_plain_name(folder, name, INDEX)
        if not name.endswith(".safetensors"):
            raise LoadError(
                "model_unsafe", f"{INDEX} of '{folder.name}' names '{name}', not safetensors"
            )
        if not (folder / name).is_file():
            raise LoadError("model_damaged", f"'{name}' is missing from '{folder.name}'")


def _refuse_links_outside(folder: Path) -> None:
    for count, entry in enumerate(folder.rglob("*")):
        if count >= _ENTRY_LIMIT:
            raise LoadError(
                "model_unsuitable",
                f"'{folder.name}' has over {_ENTRY_LIMIT} entries: it is no model folder",
            )
        if entry.is_symlink() and not entry.resolve().is_relative_to(folder):
            raise LoadError(
                "model_unsafe",
                f"'{entry.relative_to(folder)}' in '{folder.name}' links to a place outside it",
                "Copy the folder with its links followed (cp -rL).",
            )


def _require_plain_name(folder: Path, name: str, where: str) -> None:
    if name in ("", ".", "..") or Path(name).name != name or "\\" in name or "\0" in name:
        raise LoadError(
            "model_unsafe", f"{where} of '{folder.name}' names '{name}', a file outside the folder"
        )


def _read_json(path: Path, *, required: bool) -> dict[str, Any]:
    if not path.is_file():
        if required:
            raise LoadError(
                "model_not_found",
                f"'{path.parent.name}' has no {path.name}",
                "A model folder is what model.save_pretrained(folder) writes.",
            )
        return {}
    try:
        if path.stat().st_size > _JSON_LIMIT:
            raise ValueError("it is far too large")
        content = json.loads(path.read_bytes())
        if not isinstance(content, dict):
            raise ValueError("it is no JSON object")
    except ValueError as error:
        raise LoadError(
            "model_damaged",
            f"{path.name} of '{path.parent.name}' cannot be read: {_first_line(error)}",
        ) from error
    return content


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
            f"{_first_line(error)}",
            "Models that bring their own code are not loaded.",
        ) from error
    # A folder may ask for a kernel from the hub here; what computes attention is ours to choose.
    config._attn_implementation = None
    return config


def _load_model(
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
            "model_damaged", f"the weights of '{folder.name}' are damaged: {_first_line(error)}"
        ) from error
    except Exception as error:
        if "allocate memory" in str(error):
            raise
        if "Unrecognized configuration class" in str(error):
            use = "classify text" if auto is AutoModelForSequenceClassification else "generate text"
            raise LoadError(
                "model_unsuitable", f"a model of type '{config.model_type}' cannot {use}"
            ) from error
        raise LoadError(
            "model_damaged", f"model folder '{folder.name}' cannot be loaded: {_first_line(error)}"
        ) from error
    if info["error_msgs"]:
        raise LoadError(
            "model_damaged", f"model folder '{folder.name}' does not load: {info['error_msgs'][0]}"
        )
    model.eval()
    return model, info


def _belongs_to_head(model: PreTrainedModel, name: str) -> bool:
    """Whether a parameter is part of the classification head. A pooler is: encoders that were
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


def _override_dropout(config: PreTrainedConfig, value: float) -> None:
    for name, old in config.to_dict().items():
        # LayerDrop skips whole layers: that is another thing.
        if "drop" not in name or "layerdrop" in name:
            continue
        number = isinstance(old, int | float) and not isinstance(old, bool)
        if number or name == "classifier_dropout":
            setattr(config, name, value)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, Iterable) and not isinstance(value, str | bytes):
        yield from (str(item) for item in value)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:300]


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
