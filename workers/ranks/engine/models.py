"""Models that the engine keeps loaded between attempts."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from shared.errors import ModelNotFound, UnsupportedModel
from shared.specs import Task
from workers.ranks.engine.device import release_unused
from workers.ranks.engine.rewrite import rewrite_for_speed
from workers.ranks.engine.runners import measure_slots
from workers.ranks.loading import (
    LoadError,
    inspect_folder,
    load_causal_lm,
    load_sequence_classifier,
    load_tokenizer,
)


@dataclass(frozen=True, slots=True)
class ModelKey:
    """Which model, as what, and in which state its folder was: another state is another model."""

    task: Task
    path: str
    dtype: torch.dtype
    device: torch.device
    files: tuple[tuple[str, int, int], ...]
    """Name, size and modification time (ns) of each file of the folder."""


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model in ``eval`` mode on its device, with its tokenizer."""

    key: ModelKey
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    seconds: float
    """How long loading took."""
    weight_bytes: int
    context: int
    """Tokens that a row, input and output together, may have."""
    slot_bytes_per_position: int | None
    """For text-generation: see :func:`workers.ranks.engine.runners.measure_slots`."""


class ModelCache:
    """The loaded models of one device: at present one, the last used.

    ``get`` frees what has to go *before* it loads, so that two models never need room at once.
    """

    def __init__(self) -> None:
        self._loaded: LoadedModel | None = None

    def get(
        self, task: Task, path: str, dtype: torch.dtype, device: torch.device
    ) -> tuple[LoadedModel, bool]:
        """The model, and whether it was warm.

        Raises:
            ModelNotFound, UnsupportedModel: the folder is gone, or the model cannot do ``task``.
        """
        key = model_key(task, path, dtype, device)
        if self._loaded is not None and self._loaded.key == key:
            return self._loaded, True
        if self._loaded is not None:
            print(f"model {Path(self._loaded.key.path).name} is unloaded", flush=True)
            self._loaded = None
            release_unused(device)
        self._loaded = _load(key)
        return self._loaded, False


def model_key(task: Task, path: str, dtype: torch.dtype, device: torch.device) -> ModelKey:
    """What a model is known by.

    Raises:
        ModelNotFound: ``path`` is no folder.
    """
    folder = Path(path)
    try:
        states = [(entry.name, entry.stat()) for entry in folder.iterdir()]
    except OSError:
        raise ModelNotFound(f"'{path}' is no model folder", param="model") from None
    files = tuple(sorted((name, state.st_size, state.st_mtime_ns) for name, state in states))
    return ModelKey(task, path, dtype, device, files)


def _load(key: ModelKey) -> LoadedModel:
    started = time.monotonic()
    try:
        model = _load_for_task(key)
        tokenizer = load_tokenizer(key.path)
    except LoadError as error:
        if error.code == "model_not_found":
            raise ModelNotFound(error.message, param="model", hint=error.hint) from error
        code = "unsupported_model" if error.code == "model_unsuitable" else error.code
        raise UnsupportedModel(error.message, param="model", hint=error.hint, code=code) from error
    rewrite_for_speed(model)
    model.to(key.device)  # type: ignore[arg-type]  # (a decorated method that mypy misreads)
    slots = measure_slots(model) if key.task == "text-generation" else None
    return LoadedModel(
        key=key,
        model=model,
        tokenizer=tokenizer,
        seconds=time.monotonic() - started,
        weight_bytes=sum(p.numel() * p.element_size() for p in model.parameters()),
        context=_context_length(model, tokenizer, key.task),
        slot_bytes_per_position=slots,
    )


def _load_for_task(key: ModelKey) -> PreTrainedModel:
    if key.task == "text-classification":
        classifier = load_sequence_classifier(key.path, dtype=key.dtype)
        if classifier.fresh_head:
            raise UnsupportedModel(
                f"model '{Path(key.path).name}' has no trained classification head",
                param="model",
                hint="Fine-tune it for text-classification first and use that job's model.",
            )
        return classifier.model
    folder = inspect_folder(key.path)
    made_as = json.loads((folder / "config.json").read_bytes()).get("architectures") or ()
    if made_as and not set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()).intersection(made_as):
        raise _not_generative(folder, str(made_as[0]))
    model = load_causal_lm(key.path, key.dtype)
    # BERT and kin load under a language-model head too, but they see the future: only their
    # configurations have ``is_decoder``, and it is off.
    if getattr(model.config, "is_decoder", True) is False:
        raise _not_generative(folder, type(model).__name__)
    return model


def _not_generative(folder: Path, made_as: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"model '{folder.name}' was made as {made_as} and cannot generate text",
        param="model",
        hint="Choose a causal language model (GPT, Llama and kin).",
    )


def _context_length(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task) -> int:
    config = model.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None) or 1_000_000
    if task == "text-generation":
        return int(positions)
    for name, module in model.named_modules():
        # RoBERTa and kin number positions from padding_idx + 1: the table has fewer of use.
        if name.endswith("position_embeddings") and isinstance(module, torch.nn.Embedding):
            positions = module.num_embeddings
            if module.padding_idx is not None:
                positions -= module.padding_idx + 1
    return int(min(positions, tokenizer.model_max_length))
