"""The gradient of large embeddings, by the rows that a batch touches.

A global batch has hundreds or thousands of different tokens, a vocabulary tens of thousands. The rows of
all others have a gradient of 0; with them it is the largest tensor of a small model's step, and DDP
exchanges it last, when no computation is left to go on meanwhile. So it is kept, exchanged and clipped
as the rows that are touched, with their numbers. The optimizer gets it whole: moments and weight decay
move the other rows too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from workers.ranks.train.gang import Gang

_SMALLEST = 1 << 20
"""Elements. An embedding of fewer is exchanged as fast whole."""


@dataclass(slots=True, eq=False)
class _Apart:
    """An embedding whose gradient is kept by rows."""

    name: str
    """Its weight's in the model."""
    weight: torch.Tensor
    padding: int | None
    """The row that learns nothing."""
    hook: RemovableHandle | None = None
    seen: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    """Row numbers [any] and gradients [any, width], of one lookup after the other."""
    numbers: torch.Tensor | None = None
    rows: torch.Tensor | None = None
    whole: torch.Tensor | None = None
    """Memory of the weight's shape; 0 but between ``put`` and ``clear``."""

    def note(self, _module: nn.Module, args: tuple[Any, ...], found: torch.Tensor) -> torch.Tensor:
        """A forward hook: what was looked up, cut off from the weight."""
        if not found.requires_grad:
            return found
        numbers, cut = args[0].detach().reshape(-1), found.detach().requires_grad_()
        cut.register_hook(lambda g: self.seen.append((numbers, g.reshape(len(numbers), -1))))  # type: ignore[no-untyped-call]
        return cut


class TouchedRows:
    """The embeddings of one model that are trained by rows. After the backward passes of a step:
    ``exchange``, ``put``, the optimizer's step, ``clear``. All ranks make the same calls."""

    def __init__(self, model: nn.Module, tokens: float, gang: Gang) -> None:
        """From here on backward leaves no gradient at these weights.

        Args:
            tokens: Of a global batch, about. An embedding with fewer rows is left alone: most of
                them would be touched.
        """
        self._gang = gang
        self._apart: list[_Apart] = []
        for name, module in _embeddings(model):
            weight = module.weight
            if weight.requires_grad and weight.numel() >= _SMALLEST and len(weight) >= tokens:
                apart = _Apart(f"{name}.weight", weight, module.padding_idx)
                apart.hook = module.register_forward_hook(apart.note)
                self._apart.append(apart)
        trained = sum(parameter.requires_grad for parameter in model.parameters())
        if trained == len(self._apart):
            self._leave_alone(self._apart)  # DDP refuses a model that leaves it nothing to exchange

    @property
    def names(self) -> list[str]:
        """Of the parameters."""
        return [apart.name for apart in self._apart]

    def try_out(self, backward: Callable[[], object]) -> None:
        """Leave alone what gets a gradient in a ``backward`` pass all the same: some models use the
        weight in other ways than the lookup, and no module shows it."""
        if not self._apart:
            return
        backward()
        self._leave_alone([apart for apart in self._apart if apart.weight.grad is not None])
        self.clear()

    def exchange(self) -> list[torch.Tensor]:
        """The mean over the ranks: gradients [rows, width] that ``put`` takes as they are then, so
        they may be changed in place."""
        gradients = []
        for apart in self._apart:
            own = _pack(*_summed(*_together(apart)))
            numbers, rows = _unpack(torch.cat(self._gang.gather(own)))
            apart.numbers, apart.rows = _summed(numbers, rows)
            apart.rows.div_(self._gang.world_size)
            gradients.append(apart.rows)
        return gradients

    def put(self) -> None:
        """Give the weights their whole gradients."""
        for apart in self._apart:
            if apart.numbers is None or apart.rows is None:
                continue
            if apart.whole is None:
                apart.whole = torch.zeros_like(apart.weight)
            apart.whole.index_copy_(0, apart.numbers, apart.rows)
            apart.weight.grad = apart.whole

    def clear(self) -> None:
        """Forget what the passes left."""
        for apart in self._apart:
            if apart.whole is not None and apart.numbers is not None:
                apart.whole.index_fill_(0, apart.numbers, 0.0)
            apart.seen.clear()
            apart.numbers = apart.rows = apart.weight.grad = None

    def _leave_alone(self, some: Sequence[_Apart]) -> None:
        for apart in some:
            if apart.hook is not None:
                apart.hook.remove()
        self._apart = [apart for apart in self._apart if apart not in some]


def _embeddings(model: nn.Module) -> list[tuple[str, nn.Embedding]]:
    """Those whose weight nothing else has, such as a head, and whose lookup is plain."""
    users: dict[torch.Tensor, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                users[parameter] = users.get(parameter, 0) + 1
    return [
        (name, module)
        for name, module in model.named_modules()
        if type(module) is nn.Embedding
        and users[module.weight] == 1
        and module.max_norm is None
        and not module.scale_grad_by_freq
        and not module.sparse
    ]


def _together(apart: _Apart) -> tuple[torch.Tensor, torch.Tensor]:
    """Row numbers and gradients of all lookups, without those of the row that learns nothing."""
    weight = apart.weight
    numbers = torch.cat([weight.new_empty(0, dtype=torch.long), *(n for n, _ in apart.seen)])
    rows = torch.cat([weight.new_empty(0, weight.shape[1]), *(rows for _, rows in apart.seen)])
    if apart.padding is None:
        return numbers, rows
    learns = numbers != apart.padding
    return numbers[learns], rows[learns]


def _summed(numbers: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each number once, in ascending order, and the sum of its rows, added up in the order given."""
    once, places = numbers.unique(return_inverse=True)  # type: ignore[no-untyped-call]
    return once, rows.new_zeros(len(once), rows.shape[1]).index_add_(0, places, rows)


def _pack(numbers: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Both as one tensor, to be exchanged at once: the bits of a number stand for a float."""
    return torch.cat([rows, numbers.to(torch.int32).view(torch.float32).unsqueeze(1)], dim=1)


def _unpack(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    numbers = packed[:, -1].contiguous().view(torch.int32).long()
    return numbers, packed[:, :-1]
