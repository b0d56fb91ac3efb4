"""Models loaded without their numbers, for ranks of which each will hold a part.

Transformers puts the model together as ever (names, ties, new heads), but of the tensors in the folder's
files it gets no more than shape and type: each becomes a ``Promise``, which knows its place in a file
and takes next to no memory. Once it is known what a rank is to hold, that is read (``fulfil``), and cast.

What stands for a tensor tells if something was done to it on its way: it is NaN throughout, and its strides
are those of no view or copy of it. A model for which Transformers computes weights from those in
the files is refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import safe_open
from torch import nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from workers.ranks.folders import INDEX, WEIGHTS

Rows = Callable[[int], tuple[int, int]]
"""How many rows a tensor has -> which of them are wanted: the first, and one behind the last."""
_FRACTIONS = frozenset({"F64", "F32", "F16", "BF16"})
"""Types that a file may have and training's own is made of, as safetensors names them."""


class Unpromised(Exception):
    """Of this model the numbers are needed at once; says why."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where the numbers of a tensor are."""

    file: Any
    """Open, as ``safe_open`` gives it."""
    key: str

    def read(self, first: int, behind: int) -> torch.Tensor:
        """Its rows, in the type of the file."""
        rows: torch.Tensor = self.file.get_slice(self.key)[first:behind]
        return rows


class Promise(nn.Parameter):
    """A parameter whose numbers are still in their file. What it holds instead means nothing."""

    source: Source

    @classmethod
    def of(cls, standing_for_it: torch.Tensor, source: Source, *, trained: bool) -> Self:
        made = cls(standing_for_it, trained)
        made.source = source
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A copy is promised the same numbers (PEFT trains a copy of a head)."""
        if id(self) not in memo:
            memo[id(self)] = self.of(self.data, self.source, trained=self.requires_grad)
        copied: Self = memo[id(self)]
        return copied


def load_promised(
    auto: Any, folder: Path, *, config: PreTrainedConfig, dtype: torch.dtype, **options: Any
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """As ``auto.from_pretrained`` with ``output_loading_info``, from a folder that has been inspected;
    new parameters and buffers are there, those from the files are promises.

    Raises:
        Unpromised: it takes the numbers to make this model.
        Exception: whatever Transformers raises.
    """
    if getattr(config, "quantization_config", None) is not None:
        raise Unpromised("it is quantized")
    given: dict[str, torch.Tensor] = {}
    standing: dict[int, tuple[torch.Tensor, Source]] = {}
    for source in _sources(folder):
        tensor = _standing_for(source, dtype)
        if tensor is None:
            given[source.key] = source.file.get_tensor(source.key)
        else:
            given[source.key] = tensor
            standing[tensor.untyped_storage().data_ptr()] = (tensor, source)
    with torch.device("meta"):
        kind = type(auto.from_config(config, trust_remote_code=False))
    model, info = kind.from_pretrained(
        None, config=config, dtype=dtype, state_dict=given, output_loading_info=True, **options
    )
    if info["error_msgs"]:
        raise Unpromised(info["error_msgs"][0])
    _promise(model, standing)
    model.config.name_or_path = model.name_or_path = str(folder)
    if model.can_generate():
        model.generation_config = _generation_config(folder)
    return model, info


@torch.no_grad()
def fulfil(module: nn.Module, rows: Rows) -> None:
    """Put plain parameters in the place of promises, with those of their numbers that are wanted; what is
    in the other rows means nothing, and is memory that nobody has touched. Parameters that parts of
    ``module`` share stay one.
    """
    done: dict[Promise, nn.Parameter] = {}
    for part in module.modules():
        for name, promise in list(part._parameters.items()):
            if not isinstance(promise, Promise):
                continue
            if promise not in done:
                first, behind = rows(promise.shape[0])
                # Not zeros, and not only the rows that are wanted: those that are not touched take no
                # memory, and what cuts the parameter afterwards sees one of its whole shape.
                held = torch.empty(promise.shape, dtype=promise.dtype)
                held[first:behind].copy_(promise.source.read(first, behind))
                done[promise] = nn.Parameter(held, promise.requires_grad)
            part._parameters[name] = done[promise]


def _sources(folder: Path) -> Iterator[Source]:
    names = {WEIGHTS}
    if not (folder / WEIGHTS).is_file():
        names = set(json.loads((folder / INDEX).read_bytes())["weight_map"].values())
    for name in sorted(names):
        file = safe_open(folder / name, framework="pt")
        for key in file.keys():  # type: ignore[no-untyped-call]  # noqa: SIM118  no mapping
            yield Source(file, key)


def _standing_for(source: Source, dtype: torch.dtype) -> torch.Tensor | None:
    """What stands for a tensor: one of the shape and ``dtype`` that it is going to have, all NaN. None
    for what is read at once: vectors, which are small and which Transformers pads, and whole numbers."""
    found = source.file.get_slice(source.key)
    shape = found.get_shape()
    if found.get_dtype() not in _FRACTIONS or len(shape) < 2 or 0 in shape:
        return None
    strides = range(len(shape), 0, -1)
    length = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    return torch.full((length,), torch.nan, dtype=dtype).as_strided(shape, list(strides))


def _promise(model: nn.Module, standing: dict[int, tuple[torch.Tensor, Source]]) -> None:
    """Make promises of the parameters that stand for tensors, by the memory in which these are, and
    read such buffers."""
    made: dict[nn.Parameter, Promise] = {}
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is None or (source := _source_of(parameter, standing)) is None:
                continue
            if parameter not in made:
                trained = parameter.requires_grad
                made[parameter] = Promise.of(parameter.data, source, trained=trained)
            module._parameters[name] = made[parameter]
        for name, buffer in list(module._buffers.items()):
            if buffer is not None and (source := _source_of(buffer, standing)) is not None:
                module._buffers[name] = source.read(0, len(buffer)).to(buffer.dtype, copy=True)


def _source_of(
    tensor: torch.Tensor, standing: dict[int, tuple[torch.Tensor, Source]]
) -> Source | None:
    """Where the numbers of ``tensor`` are; None where it has its own."""
    origin = standing.get(tensor.untyped_storage().data_ptr())
    if origin is None:
        if tensor.is_floating_point() and tensor.isnan().any():
            raise Unpromised("Transformers computes its weights from those in the files")
        return None
    whole, source = origin
    if (tensor.data_ptr(), tensor.shape, tensor.stride()) != (
        whole.data_ptr(), whole.shape, whole.stride(),
    ):  # fmt: skip
        raise Unpromised("Transformers takes its weights from parts of those in the files")
    return source


def _generation_config(folder: Path) -> GenerationConfig:
    """As ``from_pretrained`` finds it: in a file of its own, else in the model's config."""
    if (folder / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(folder, local_files_only=True)
    return GenerationConfig.from_pretrained(
        folder, config_file_name="config.json", local_files_only=True, _from_model_config=True
    )
