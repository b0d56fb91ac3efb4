"""A model in shards (FSDP2; Zhao et al., 2023): each rank keeps a part of every weight, gradient and moment.

A layer's weights are gathered from all ranks when it is computed, and let go behind it. So every call of
the model is one of all ranks together. Parameters are ``DTensor``s of their whole shape, cut along
their first dimension, from which the optimizer and the clipping of gradients need nothing special.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from workers.ranks.promises import fulfil
from workers.ranks.train.device import Compute
from workers.ranks.train.gang import Gang


def shard(model: nn.Module, compute: Compute, gang: Gang) -> None:
    """Cut the parameters of ``model`` in place, layer by layer, and put each rank's on its device, which
    holds its shards and one whole layer at most. Of what was promised this rank reads its own rows,
    when it comes to the layer; so the host holds no more than the device does.

    With a half precision layers are gathered in it: half the traffic and memory. Gradients are added
    up in fp32.
    """
    mesh = init_device_mesh(compute.device.type, (gang.world_size,))
    policy = MixedPrecisionPolicy(param_dtype=compute.half, reduce_dtype=torch.float32)
    for part in (*layers(model), model):
        fulfil(part, lambda rows: span(rows, gang.world_size, gang.rank))
        fully_shard(part, mesh=mesh, mp_policy=policy)


def layers(model: nn.Module) -> Iterator[nn.Module]:
    """The repeated parts of a model, the outermost where they contain one another."""
    for child in model.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield from layers(child)


def span(rows: int, ranks: int, rank: int) -> tuple[int, int]:
    """Which rows (first, one behind the last) of a tensor a rank has: as many as any other, but for
    the last ones, which may have fewer, or none."""
    each = -(-rows // ranks)
    return min(rank * each, rows), min((rank + 1) * each, rows)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank has of a tensor, in shards or not; shares its memory."""
    part: torch.Tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return part


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor, in shards or not; all ranks call it together."""
    full: torch.Tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full


@torch.no_grad()
def gather(model: nn.Module, gang: Gang) -> None:
    """Make rank 0's model whole again, in host memory, to be saved; the others' is of no more use. All
    ranks call it together, and no device holds more than its shards and one whole parameter."""
    known: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if parameter not in known:
                full = whole(parameter.detach())
                if gang.rank == 0:
                    known[parameter] = nn.Parameter(full.cpu(), parameter.requires_grad)
                else:
                    known[parameter] = parameter
            module._parameters[name] = known[parameter]
    if gang.rank == 0:
        for module in model.modules():
            if isinstance(module, FSDPModule):
                # What ``fully_shard`` made of it is a class whose name would end up in its config.
                _, own = type(module).__bases__
                module.__class__ = own
