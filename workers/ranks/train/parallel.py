"""The model as DDP computes it."""

from __future__ import annotations

import warnings

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from workers.ranks.train.device import Compute
from workers.ranks.train.examples import Batch, Examples
from workers.ranks.train.gang import Gang
from workers.ranks.train.order import BatchPlan
from workers.ranks.train.tasks.base import Objective


def warm_up_batch(objective: Objective, data: Examples, plan: BatchPlan, compute: Compute) -> Batch:
    """For passes that are thrown away. On CUDA the largest micro-batch there is, so that a lack of
    memory shows at once and not in the middle of an epoch; on a CPU the cheapest."""
    by_length = data.lengths.argsort(kind="stable")
    chosen = by_length[-plan.micro_batch :] if compute.device.type == "cuda" else by_length[:1]
    return objective.batch(data, chosen, seed=0).to(compute.device)


def set_aside_unused(objective: Objective, model: nn.Module, batch: Batch, compute: Compute) -> int:
    """Exclude the parameters that the loss does not depend on (a pooler that the head skips) from
    training; returns how many numbers they are. DDP would wait for gradients that never come."""
    model.train()
    objective.loss(model, batch, compute).backward()  # type: ignore[no-untyped-call]
    unused = 0
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.grad is None:
            parameter.requires_grad_(False)
            unused += parameter.numel()
    model.zero_grad(set_to_none=True)
    return unused


def parallelise(
    objective: Objective, model: PreTrainedModel, batch: Batch, compute: Compute, gang: Gang
) -> nn.Module:
    """The model as the gang computes it, warmed up with ``batch``; a gang of one needs no DDP."""
    model.train()
    if gang.world_size == 1:
        return model
    with warnings.catch_warnings():
        # Renamed in torch 2.13; the name that older versions know still works.
        warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
        wrapped = DistributedDataParallel(
            model,
            device_ids=[compute.device] if compute.device.type == "cuda" else None,
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
        )
    # DDP lays its gradient buckets out anew after the first pass. With three ranks or more the
    # layout decides in which order gradients are added up, so the first step after a restart would
    # differ in its last bits from the same step without one. Two passes that are thrown away put
    # that behind us, in fresh and in resumed runs alike.
    for _ in range(2):
        objective.loss(wrapped, batch, compute).backward()  # type: ignore[no-untyped-call]
        model.zero_grad(set_to_none=True)
    return wrapped
