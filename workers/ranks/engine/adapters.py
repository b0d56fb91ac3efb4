"""LoRA adapters (Hu et al., 2021) over a base model whose weights stay what and where they are.

An adapter's small matrices are added to what the base's layers give, in the passes of the jobs that use it and in no
others: jobs on the base, and on other adapters of it, share the very same weights.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from shared.errors import UnsupportedModel
from workers.ranks.engine.computation import Computation, Step
from workers.ranks.engine.prompts import Prompt

_PREFIX = "base_model.model."
"""What PEFT puts before the name of a layer."""
_A, _B = ".lora_A.weight", ".lora_B.weight"


@dataclass(frozen=True, slots=True)
class Update:
    """What is added to a layer's output: ``x · down · up``."""

    down: torch.Tensor
    """[inputs, r]"""
    up: torch.Tensor
    """[r, outputs], with the adapter's scale in it."""

    def __call__(
        self, _: torch.nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor
    ) -> torch.Tensor:
        """As a forward hook of the layer."""
        return output + args[0] @ self.down @ self.up


class Adapter:
    """The adapter of a folder, on a model.

    Raises:
        UnsupportedModel: the folder is gone or damaged, or was made for another model.
    """

    def __init__(self, folder: Path, model: PreTrainedModel) -> None:
        self._name = folder.name
        config, tensors = _read(folder)
        self._updates: list[tuple[torch.nn.Module, Update]] = []
        root = config.get("lora_alpha", 8)
        for layer in sorted({_layer_of(name, self._name) for name in tensors}):
            down, up = (tensors.get(f"{_PREFIX}{layer}{end}") for end in (_A, _B))
            if down is None or up is None:
                raise self._refused(f"has only half of what it adds to layer '{layer}'")
            rank = len(down)
            scale = root / (math.sqrt(rank) if config.get("use_rslora") else rank)
            module = self._find(model, layer)
            update = Update(
                down.T.to(model.device, model.dtype).contiguous(),
                (up.T.float() * scale).to(model.device, model.dtype).contiguous(),
            )
            shape = (getattr(module, "in_features", None), getattr(module, "out_features", None))
            if shape != (len(update.down), update.up.shape[1]) or rank != len(update.up):
                raise self._refused(
                    f"does not fit layer '{layer}', which is {shape[0]} × {shape[1]}"
                )
            self._updates.append((module, update))

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within it, the model computes with the adapter."""
        hooks = [module.register_forward_hook(update) for module, update in self._updates]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _find(self, model: PreTrainedModel, layer: str) -> torch.nn.Module:
        try:
            return model.get_submodule(layer)
        except AttributeError:
            raise self._refused(f"is of another model: this one has no layer '{layer}'") from None

    def _refused(self, what: str) -> UnsupportedModel:
        return _unusable(self._name, what)


class Adapted:
    """A computation whose passes are those of the model with an adapter.

    See :class:`workers.ranks.engine.computation.Computation`.
    """

    def __init__(self, computation: Computation, adapter: Adapter) -> None:
        self._computation = computation
        self._adapter = adapter

    def join(self, owner: str, rows: int) -> None:
        self._computation.join(owner, rows)

    def leave(self, owner: str) -> None:
        self._computation.leave(owner)

    @property
    def busy(self) -> bool:
        return self._computation.busy

    def wants_rows(self, owner: str) -> bool:
        return self._computation.wants_rows(owner)

    def add(self, prompts: Sequence[Prompt]) -> None:
        self._computation.add(prompts)

    def step(self) -> Step:
        with self._adapter.applied():
            return self._computation.step()


def state_of(folder: Path) -> tuple[tuple[str, int, int], ...]:
    """What tells an adapter from another one in the same place: name, size and time of its files.

    Raises:
        UnsupportedModel: it is not there.
    """
    try:
        files = [(path.name, path.stat()) for path in folder.iterdir()]
    except OSError:
        raise _unusable(folder.name, "is gone") from None
    return tuple(sorted((name, state.st_size, state.st_mtime_ns) for name, state in files))


def _read(folder: Path) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    try:
        config = json.loads((folder / "adapter_config.json").read_bytes())
        with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
            return config, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, ValueError, SafetensorError) as error:
        raise _unusable(folder.name, f"cannot be read: {error}") from None


def _layer_of(tensor: str, name: str) -> str:
    for end in (_A, _B):
        if tensor.startswith(_PREFIX) and tensor.endswith(end):
            return tensor.removeprefix(_PREFIX).removesuffix(end)
    raise _unusable(name, f"holds '{tensor[:200]}', which is not applied")


def _unusable(name: str, what: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"adapter '{name}' {what}",
        param="model",
        hint="Merge it into its base (merge_and_unload) and use that model.",
        code="unsupported_adapter",
    )
