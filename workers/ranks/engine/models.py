"""Models that the engine keeps loaded between attempts."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from shared.errors import ModelNotFound, UnsupportedModel
from shared.specs import SEQ2SEQ, Task
from workers.ranks.engine.device import release_unused
from workers.ranks.engine.families import context_length, load_for_task, refuse_tokenizer
from workers.ranks.engine.lockstep import CacheCost, measure_decoder
from workers.ranks.engine.padding import pad_token, same_when_padded
from workers.ranks.engine.rewrite import rewrite_for_speed
from workers.ranks.engine.runners import measure_slots
from workers.ranks.loading import LoadError, load_tokenizer


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
    """Tokens that a row may have; for text-generation input and output together."""
    pad_token: int
    batches: bool
    """Rows share a pass, proved by a small computation; otherwise each is computed alone."""
    slot_bytes_per_position: int | None = None
    """For text-generation: see :func:`workers.ranks.engine.runners.measure_slots`."""
    cache_cost: CacheCost | None = None
    """For text2text: see :func:`workers.ranks.engine.lockstep.measure_decoder`."""


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
        model = load_for_task(key.task, key.path, key.dtype)
        tokenizer = load_tokenizer(key.path)
    except LoadError as error:
        if error.code == "model_not_found":
            raise ModelNotFound(error.message, param="model", hint=error.hint) from error
        code = "unsupported_model" if error.code == "model_unsuitable" else error.code
        raise UnsupportedModel(error.message, param="model", hint=error.hint, code=code) from error
    refuse_tokenizer(key.task, key.path, tokenizer)
    rewrite_for_speed(model)
    model.to(key.device)  # type: ignore[arg-type]  # (a decorated method that mypy misreads)
    slots = measure_slots(model) if key.task == "text-generation" else None
    cost = measure_decoder(model, tokenizer) if key.task in SEQ2SEQ else None
    if key.task == "text-generation":
        batches = slots is not None
    else:
        batches = cost.batches if cost is not None else same_when_padded(model, tokenizer)
    return LoadedModel(
        key=key,
        model=model,
        tokenizer=tokenizer,
        seconds=time.monotonic() - started,
        weight_bytes=sum(p.numel() * p.element_size() for p in model.parameters()),
        context=context_length(key.task, key.path, model, tokenizer),
        pad_token=pad_token(model, tokenizer),
        batches=batches,
        slot_bytes_per_position=slots,
        cache_cost=cost,
    )
