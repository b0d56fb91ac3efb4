"""Models that the engine keeps loaded between attempts."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from shared.errors import ModelNotFound, UnsupportedModel
from shared.specs import SEQ2SEQ, Task
from workers.ranks.engine.bases import (
    CAUSAL,
    ENCODED,
    same_base,
    same_model,
    share_base,
    shared_bytes,
)
from workers.ranks.engine.choosing import VLLM_PYTHON, EngineName
from workers.ranks.engine.crossing import measure_crossing
from workers.ranks.engine.device import release_unused
from workers.ranks.engine.families import context_length, form_of, load_for_task, refuse_tokenizer
from workers.ranks.engine.fused import fuse_encoder
from workers.ranks.engine.lockstep import CacheCost, measure_decoder
from workers.ranks.engine.padding import pad_token, same_when_padded
from workers.ranks.engine.quantised import quantise, quantised_bytes
from workers.ranks.engine.rewrite import rewrite_for_speed
from workers.ranks.engine.runners import measure_slots
from workers.ranks.engine.vllm_process import VllmProcess
from workers.ranks.loading import LoadError, load_tokenizer


@dataclass(frozen=True, slots=True)
class ModelKey:
    """Which model, as what, and in which state its folder was: another state is another model."""

    task: Task
    path: str
    dtype: torch.dtype
    """``int8``: linear layers alone, the rest in fp32; see :mod:`workers.ranks.engine.quantised`."""
    device: torch.device
    engine: EngineName
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
    """For text2text: see :func:`workers.ranks.engine.crossing.measure_crossing`."""
    padded: bool = True
    """Rows of different length get in one pass what each gets alone."""
    server: VllmProcess | None = None
    """What computes in place of ``model``, which then is a form without numbers."""

    def close(self) -> None:
        """It is not used any more."""
        if self.server is not None:
            self.server.close()


class ModelCache:
    """The loaded models of one device. What was not used for longest makes room for what is wanted.

    ``get`` frees what has to go *before* it loads, so that two models never need room at once.
    """

    def __init__(self) -> None:
        self._loaded: dict[ModelKey, LoadedModel] = {}
        """By when they were used: the last one last."""

    def get(
        self,
        task: Task,
        path: str,
        dtype: torch.dtype,
        device: torch.device,
        *,
        engine: EngineName = "gpuyard",
        budget: int | None = None,
        in_use: Collection[ModelKey] = (),
    ) -> tuple[LoadedModel, bool]:
        """The model, and whether it was warm.

        Args:
            budget: bytes that the weights of all models may take together; None: of one model.
            in_use: models that cannot go now.

        Raises:
            ModelNotFound, UnsupportedModel: the folder is gone, or the model cannot do ``task``.
        """
        key = model_key(task, path, dtype, device, engine)
        if (found := self._loaded.pop(key, None)) is not None:
            self._loaded[key] = found
            return found, True
        alike = [found for found in self._loaded.values() if _alike(found.key, key)]
        for found in alike:
            if same_model(found.key.task, task):
                self._loaded[key] = _for_task(found, key)
                return self._loaded[key], True
        kin = [found for found in alike if same_base(found.key.task, task)]
        self._make_room(key, budget, {*in_use, *(found.key for found in kin)})
        self._loaded[key] = _load(key, kin) if engine == "gpuyard" else _load_in_vllm(key)
        return self._loaded[key], False

    @property
    def paths(self) -> list[str]:
        """Folders of the models, the one used last first."""
        return list(dict.fromkeys(key.path for key in reversed(self._loaded)))

    @property
    def weight_bytes(self) -> int:
        """What they take together: weights that several have in common count once."""
        whole = sum(model.weight_bytes for model in self._loaded.values())
        return whole - shared_bytes(model.model for model in self._loaded.values())

    def _make_room(
        self, wanted: ModelKey, budget: int | None, in_use: Collection[ModelKey]
    ) -> None:
        size = expected_bytes(wanted)
        stale = [
            key for key in self._loaded if key.path == wanted.path and key.files != wanted.files
        ]
        spare = [*stale, *(key for key in self._loaded if key not in stale)]
        for key in spare:
            fits = budget is not None and self.weight_bytes + size <= budget
            if key in in_use or (fits and key not in stale):
                continue
            print(f"model {Path(key.path).name} is unloaded", flush=True)
            self._loaded.pop(key).close()
            release_unused(key.device)


def expected_bytes(key: ModelKey) -> int:
    """What the weights of a model that is not loaded yet will take, by their files' headers. One that is
    quantised is loaded in fp32 first.

    Files that cannot be read count as nothing: loading them says what is wrong.
    """
    numbers = 0
    for name, _, _ in key.files:
        if name.endswith(".safetensors"):
            try:
                with safe_open(Path(key.path) / name, framework="pt") as file:
                    numbers += sum(
                        math.prod(file.get_slice(tensor).get_shape())
                        for tensor in file.keys()  # noqa: SIM118
                    )
            except (OSError, SafetensorError):
                continue
    return numbers * loaded_as(key.dtype).itemsize


def loaded_as(dtype: torch.dtype) -> torch.dtype:
    """The precision in which the weights of a model are read."""
    return torch.float32 if dtype == torch.int8 else dtype


def model_key(
    task: Task,
    path: str,
    dtype: torch.dtype,
    device: torch.device,
    engine: EngineName = "gpuyard",
) -> ModelKey:
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
    return ModelKey(task, path, dtype, device, engine, files)


def _alike(key: ModelKey, other: ModelKey) -> bool:
    """Whether two are the same folder on the same device in the same precision."""
    return replace(key, task=other.task) == other


def _for_task(loaded: LoadedModel, key: ModelKey) -> LoadedModel:
    """The very same model for another task."""
    batches = _batches(key.task, loaded.slot_bytes_per_position, loaded.padded)
    return replace(loaded, key=key, batches=batches)


def _batches(task: Task, slots: int | None, padded: bool) -> bool:
    return slots is not None if task == "text-generation" else padded


def _load(key: ModelKey, kin: Sequence[LoadedModel] = ()) -> LoadedModel:
    """``kin``: models that may have the same base."""
    started = time.monotonic()
    with _explained():
        model = load_for_task(key.task, key.path, loaded_as(key.dtype))
        tokenizer = load_tokenizer(key.path)
    refuse_tokenizer(key.task, key.path, tokenizer)
    rewrite_for_speed(model)
    model.to(key.device)  # type: ignore[arg-type]  # (a decorated method that mypy misreads)
    weight_bytes = _parameter_bytes(model)
    shares = any(share_base(model, other.model, tokenizer) for other in kin)
    if key.task in ENCODED and key.dtype == torch.float32 and not shares:
        fuse_encoder(model)
    slots = measure_slots(model) if key.task in CAUSAL else None
    cost = None
    if key.task in SEQ2SEQ:
        cost = measure_crossing(model, tokenizer) or measure_decoder(model, tokenizer)
    padded = cost.batches if cost is not None else same_when_padded(model, tokenizer)
    if key.dtype == torch.int8:
        # What the proofs above found is the model's structure, and in fp32 they are sharp.
        layers = quantise(model)
        print(f"{layers} linear layers of {Path(key.path).name} are quantised to int8", flush=True)
        weight_bytes = _parameter_bytes(model) + quantised_bytes(model)
    return LoadedModel(
        key=key,
        model=model,
        tokenizer=tokenizer,
        seconds=time.monotonic() - started,
        weight_bytes=weight_bytes,
        context=context_length(key.task, key.path, model, tokenizer),
        pad_token=pad_token(model, tokenizer),
        batches=_batches(key.task, slots, padded),
        slot_bytes_per_position=slots,
        cache_cost=cost,
        padded=padded,
    )


def _parameter_bytes(model: PreTrainedModel) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def _load_in_vllm(key: ModelKey) -> LoadedModel:
    started = time.monotonic()
    with _explained():
        model = form_of(key.task, key.path)
        tokenizer = load_tokenizer(key.path)
    refuse_tokenizer(key.task, key.path, tokenizer)
    context = context_length(key.task, key.path, model, tokenizer)
    python = Path(os.environ[VLLM_PYTHON])
    server = VllmProcess(python, key.path, key.dtype, key.device, context)
    return LoadedModel(
        key=key,
        model=model,
        tokenizer=tokenizer,
        seconds=time.monotonic() - started,
        weight_bytes=expected_bytes(key),
        context=context,
        pad_token=pad_token(model, tokenizer),
        batches=True,
        server=server,
    )


@contextmanager
def _explained() -> Iterator[None]:
    """What is wrong with a folder, as an error of the job."""
    try:
        yield
    except LoadError as error:
        if error.code == "model_not_found":
            raise ModelNotFound(error.message, param="model", hint=error.hint) from error
        code = "unsupported_model" if error.code == "model_unsuitable" else error.code
        raise UnsupportedModel(error.message, param="model", hint=error.hint, code=code) from error
