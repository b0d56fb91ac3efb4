"""Tensors without memory that a training step can be computed on.

Weights, and all that follows from them, are fake: they have a shape and no content. A batch is real, so
that what depends on its content (which tokens are predicted, whether there is padding) is as it will be.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode

from workers.ranks.footprint.tracker import LiveBytes

aten = torch.ops.aten
_INDEXING = (
    *(aten.index.Tensor, aten.index_put.default, aten.index_put_.default),
    *(aten._index_put_impl_.default, aten._unsafe_index.Tensor),
)


def pretend(models: Iterable[nn.Module]) -> None:
    """Turn models that were made on the meta device into ones that claim to lie on the CPU. What is tied
    stays tied."""
    made: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        # The one that it takes the place of is kept: while it lives, its id is nobody else's.
        if id(tensor) not in made:
            like = torch.empty_strided(
                tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu"
            )
            if isinstance(tensor, nn.Parameter):
                like = nn.Parameter(like, tensor.requires_grad)
            made[id(tensor)] = (tensor, like)
        return made[id(tensor)][1]

    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in (module for model in models for module in model.modules()):
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = cast(nn.Parameter, fake(parameter))
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = fake(buffer)


class PretendedBytes(LiveBytes):  # type: ignore[no-untyped-call]  # torch's own
    """Also answers what no fake tensor can: every number that is read is 1, and a fused optimizer step
    changes nothing in place."""

    def compute(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if func is aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return torch.ones((), dtype=args[0].dtype).item()
        if str(func).startswith("aten._fused_") and str(func).split(".")[1].endswith("_"):
            return None
        if func in _INDEXING:
            # The mask is real: where it is true decides the size of what comes out.
            args = (args[0], _places(args[1]), *args[2:])
        return func(*args, **kwargs)


def _places(indices: Any) -> list[torch.Tensor | None]:
    found: list[torch.Tensor | None] = []
    for index in indices:
        if index is None or index.dtype is not torch.bool or isinstance(index, FakeTensor):
            found.append(index)
        else:
            found.extend(index.nonzero().unbind(1))
    return found


class FusedAttention(TorchFunctionMode):
    """Attention as CUDA's fused kernels compute it: with dropout, too, nothing of the size of length
    times length is kept. The CPU's does so only without dropout."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.nn.functional.scaled_dot_product_attention:
            kwargs["dropout_p"] = 0.0
        return func(*args, **kwargs)
