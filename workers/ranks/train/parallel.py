"""How the ranks compute one model together: each has all of it (DDP), or each a part (FSDP2)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from workers.ranks.loading import promised
from workers.ranks.train.compiling import Compiled
from workers.ranks.train.device import Compute
from workers.ranks.train.examples import Batch, Examples
from workers.ranks.train.gang import Gang
from workers.ranks.train.order import BatchPlan
from workers.ranks.train.sharding import gather, shard, whole
from workers.ranks.train.tasks.base import Objective

_AS_TORCH = 1e-6
"""What ``torch.nn.utils.clip_grad_norm_`` adds to the norm that it divides by."""


def warm_up_batch(objective: Objective, data: Examples, plan: BatchPlan, compute: Compute) -> Batch:
    """For passes that are thrown away. On CUDA the largest micro-batch there is, so that a lack of
    memory shows at once and not in the middle of an epoch; on a CPU the cheapest of a usual kind: single
    rows are one that compiled layers may not be made for."""
    by_length = data.lengths.argsort(kind="stable")
    chosen = (
        by_length[-plan.micro_batch :]
        if compute.device.type == "cuda"
        else by_length[: min(2, plan.micro_batch)]
    )
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


class Parallel:
    """How one model is computed. All ranks make the same calls, in the order of the methods.

    With ``gang.sharded`` the model is in shards, else every rank has all of it; a gang of one needs
    neither.
    """

    def __init__(self, compute: Compute, gang: Gang) -> None:
        self._compute = compute
        self._gang = gang
        self.compiled: Compiled | None = None
        """Layers that are to be set aside in evaluations."""

    def loading(self, tell: Callable[[str], object]) -> AbstractContextManager[None]:
        """For the model that is going to be trained: of one that is cut no numbers are read yet.
        ``tell`` gets to hear why that cannot be done with it, if so."""
        if not self._gang.sharded:
            return nullcontext()
        self._compute.return_freed_memory()
        return promised(tell)

    def place(self, model: PreTrainedModel) -> None:
        """Put the model as it was loaded on the device; one that is going to be cut stays on the host."""
        if not self._gang.sharded:
            model.to(self._compute.device)  # type: ignore[arg-type]

    def divide(self, model: PreTrainedModel) -> None:
        """Cut the model, once it has all its layers and it is known what of it is frozen."""
        if self._gang.sharded:
            shard(model, self._compute, self._gang)

    def wrap(
        self, objective: Objective, model: PreTrainedModel, batch: Batch, apart: Sequence[str] = ()
    ) -> nn.Module:
        """The model as training calls it, warmed up with ``batch``. The parameters named in ``apart``
        are exchanged by the caller."""
        model.train()
        if self._gang.world_size == 1 or self._gang.sharded:
            return model
        return _replicate(objective, model, batch, self._compute, apart)

    def adding_up(self, wrapped: nn.Module) -> AbstractContextManager[None]:
        """For the passes of a step but the last one: gradients are exchanged once a step, in that.

        Those of a model in shards are, in every pass: each rank keeps its part of the sum. To keep
        all of them for one exchange would take the memory that it is in shards to save.
        """
        if isinstance(wrapped, DistributedDataParallel):
            return wrapped.no_sync()
        return nullcontext()

    @torch.no_grad()
    def clip(self, gradients: list[torch.Tensor], limit: float | None) -> float:
        """The norm of the gradient, the same on every rank; above ``limit`` it is brought down to it."""
        norm = float(whole(nn.utils.get_total_norm(gradients)))
        if limit is not None and norm > limit:
            torch._foreach_mul_(gradients, limit / (norm + _AS_TORCH))
        return norm

    @contextmanager
    def evaluating(self, model: nn.Module) -> Iterator[None]:
        """For evaluations, which may call a part of the model by itself, as generation does with an
        encoder: what belongs to no layer is there for them all along."""
        with nullcontext() if self.compiled is None else self.compiled.set_aside():
            if not isinstance(model, FSDPModule):
                yield
                return
            model.unshard()
            yield
            model.reshard()

    def gather(self, model: PreTrainedModel) -> None:
        """Make rank 0's model whole, to be delivered."""
        if self._gang.sharded:
            gather(model, self._gang)


def _replicate(
    objective: Objective,
    model: PreTrainedModel,
    batch: Batch,
    compute: Compute,
    apart: Sequence[str],
) -> nn.Module:
    ignore = DistributedDataParallel._set_params_and_buffers_to_ignore_for_model
    ignore(model, list(apart))  # type: ignore[no-untyped-call]
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
