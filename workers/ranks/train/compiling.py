"""Compiled layers (torch.compile; Ansel et al., 2024): the repeated layers of a model, one by one.

They are alike, so all share what is compiled for the first; embeddings and heads stay as they are. Two
things keep a training that is killed and goes on bitwise equal to one that is not:

- **What is compiled does not depend on which batch comes first.** All code is made at the start of an
  attempt, for any number of rows and tokens, from batches that are a function of data and plan alone
  (``warm_up_indices``). A batch that none of it fits is computed without, in every attempt alike. So
  there is no storm of recompilations, and no step in the middle that takes a minute.
- **No kernel is chosen by the clock**, and dropout draws from the generator that each step seeds.

Evaluations are computed without: the same weights get the same scores as in any other training.
"""

from __future__ import annotations

import shutil
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from shared.lifecycle import FailureClass
from shared.messages import TrainAssignment
from workers.ranks.train.compile_cache import open_cache
from workers.ranks.train.device import Compute
from workers.ranks.train.examples import Batch, Examples
from workers.ranks.train.failures import Stopped, TrainingFailed, explain
from workers.ranks.train.gang import Gang
from workers.ranks.train.order import BatchPlan, Indices, micro_batches
from workers.ranks.train.reports import Reporter
from workers.ranks.train.sharding import layers
from workers.ranks.train.tasks.base import Objective

_VERSIONS = 64
"""Of a layer's function that may be compiled, at most: one for each kind of layer and batch."""
_ADVICE = {
    "cpu": "install a C++ compiler (g++, or name another one in CXX)",
    "cuda": "install a C compiler, and triton as it comes with torch for CUDA",
}
_NOT_OURS = (FailureClass.OUT_OF_MEMORY, FailureClass.LOST_WORKER, FailureClass.LOST_DEVICE)
"""Failures that are none of compilation, though they happen in its midst."""


class Compiled:
    """The layers of a training's models, compiled in place. No parameter gets another name."""

    def __init__(self, models: Sequence[nn.Module], rank: int, reporter: Reporter) -> None:
        self._rank = rank
        self._reporter = reporter
        self._ready = False
        self._told = False
        self._hooks: list[Any] = []
        self._layers = [layer for model in models for layer in layers(model)]
        for layer in self._layers:
            first = next(part for part in layer.modules() if next(part.children(), None) is None)
            # Compiled code has no trace of the hook, so it is called only where a layer is run without.
            self._hooks.append(first.register_forward_pre_hook(self._runs_without))
            # Not ``layer.compile()``: what goes around a layer (the hooks of FSDP, gradient
            # checkpointing) is to stay outside.
            layer.forward = torch.compile(layer.forward, dynamic=True)

    def __len__(self) -> int:
        return len(self._layers)

    def ready(self) -> None:
        """From here on nothing more is compiled."""
        torch.compiler.set_stance("eager_on_recompile")
        self._ready = True

    @contextmanager
    def set_aside(self) -> Iterator[None]:
        """Layers are run without for as long."""
        before, self._ready = self._ready, False
        try:
            with torch.compiler.set_stance("force_eager"):
                yield
        finally:
            self._ready = before

    def undo(self) -> None:
        """Leave layers as if they had never been compiled."""
        self._ready = False
        for hook in self._hooks:
            hook.remove()
        for layer in self._layers:
            vars(layer).pop("forward", None)

    def _runs_without(self, _: nn.Module, inputs: tuple[Any, ...]) -> None:
        if torch.compiler.is_compiling() or not self._ready or self._told:
            return
        self._told = True
        shape = " x ".join(str(size) for size in inputs[0].shape) if inputs else "unknown"
        self._reporter.notice(
            "batch_not_compiled",
            f"rank {self._rank} met a batch ({shape} in the layers) of a kind that nothing was compiled "
            "for: such ones are computed without, which is slower and comes to the same",
            rank=self._rank,
        )


def compile_layers(
    assignment: TrainAssignment,
    objective: Objective,
    models: Sequence[nn.Module],
    data: Examples,
    plan: BatchPlan,
    compute: Compute,
    gang: Gang,
    reporter: Reporter,
) -> Compiled | None:
    """Compile what ``objective`` calls, all ranks together; None, with a notice, where a rank cannot.
    Parameters must have the ``requires_grad`` that they are trained with; gradients are left None.

    Raises:
        TrainingFailed: layers of a model in shards cannot be compiled (user_error).
        Stopped: the worker ordered it, or is gone.
    """
    began = time.monotonic()
    batches = [objective.batch(data, rows, seed=0) for rows in warm_up_indices(data, plan)]
    shapes = [{name: list(t.shape) for name, t in batch.inputs.items()} for batch in batches]
    _configure()
    problem, cache = None, None
    try:
        cache = open_cache(assignment, compute.device.type, shapes)
        torch.compile(_trifle, dynamic=True)(torch.ones(8, device=compute.device))
    except Exception as error:
        problem = _reason(error)
    if _anyone_fails(problem, compute, gang, reporter):
        return None
    compiled = Compiled(models, gang.rank, reporter)
    if not len(compiled):
        if gang.rank == 0:
            reporter.notice("compile_unavailable", "the model has no repeated layers to compile")
        return None
    problem = _warm_up(objective, models, batches, compute, gang, reporter)
    if _anyone_fails(problem, compute, gang, reporter):
        compiled.undo()
        return None
    compiled.ready()
    if cache is not None and cache.private:
        shutil.rmtree(cache.folder, ignore_errors=True)
    reporter.say(
        f"{len(compiled)} layers compiled for {len(batches)} kind(s) of batches in "
        f"{time.monotonic() - began:.1f} s"
    )
    return compiled


def warm_up_indices(data: Examples, plan: BatchPlan) -> list[Indices]:
    """Examples of one batch for each kind that layers tell apart: with padding, which needs a mask, and
    without; and of a single row, where there will be such.

    They are of usual length. What is compiled fits any other one, but may be tuned to what it was made
    with; so this has to be the same in every attempt.
    """
    able = np.flatnonzero(data.weights > 0)
    able = able if len(able) else np.arange(len(data.weights))
    by_length = able[np.argsort(data.lengths[able], kind="stable")].astype(np.int64)
    middle, rows = by_length[len(by_length) // 2], min(plan.micro_batch, plan.examples)
    alike = np.repeat(middle, rows)
    if rows == 1:
        return [alike]
    chosen = [alike]
    lengths = data.lengths[by_length]
    if lengths[0] != lengths[-1]:
        other = by_length[0] if data.lengths[middle] != lengths[0] else by_length[-1]
        chosen.insert(0, np.append(alike[1:], other))
    return [*chosen, alike[:1]] if _has_single_rows(plan) else chosen


def _has_single_rows(plan: BatchPlan) -> bool:
    """Whether some rank computes a single row, or does so for nothing beside others (``Stepper``)."""
    for size in {min(plan.global_batch, plan.examples), plan.last_batch}:
        of_ranks = [micro_batches(np.arange(size), plan, rank) for rank in range(plan.ranks)]
        if any(len(part.indices) == 1 for own in of_ranks for part in own):
            return True
        if len({len(own) for own in of_ranks}) > 1:
            return True
    return False


def _configure() -> None:
    # Imported here: these take seconds, and most trainings do without them.
    import torch._dynamo as dynamo
    import torch._inductor.config as inductor
    import torch.fx.experimental._config as shapes

    # Dropout as without: the same numbers of the same generator.
    inductor.fallback_random = True
    # Nothing is measured to choose a kernel by.
    inductor.deterministic = True
    # Else helper processes would compile, and outlive it.
    inductor.compile_threads = 1
    # As many rows as tokens are by chance: code for one batch must not take them for the same number.
    shapes.use_duck_shape = False
    # No memory of what other processes have seen.
    dynamo.config.automatic_dynamic_local_pgo = False
    # It would cut layers where DDP's buckets end; they end between layers, more or less, as it is.
    dynamo.config.optimize_ddp = False
    dynamo.config.recompile_limit = _VERSIONS


def _trifle(numbers: torch.Tensor) -> torch.Tensor:
    """Compiled before anything else, for what it needs of a host."""
    return numbers.sin() + 1


def _warm_up(
    objective: Objective,
    models: Sequence[nn.Module],
    batches: Sequence[Batch],
    compute: Compute,
    gang: Gang,
    reporter: Reporter,
) -> str | None:
    """Passes that are thrown away, one a batch; why not, where one cannot be compiled."""
    models[0].train()
    try:
        for batch in batches:
            reporter.check_orders()
            objective.loss(models[0], batch.to(compute.device), compute).backward()  # type: ignore[no-untyped-call]
    except (Stopped, TrainingFailed):
        raise
    except Exception as error:
        if explain(error).failure_class in _NOT_OURS:
            raise
        traceback.print_exception(error)
        if gang.sharded:
            # The others may be waiting for a layer's weights.
            raise TrainingFailed(
                FailureClass.USER_ERROR,
                "compile_failed",
                f"the model's layers cannot be compiled: {_reason(error)}",
                "Leave out hyperparameters.compile.",
            ) from error
        return _reason(error)
    finally:
        models[0].zero_grad(set_to_none=True)
    return None


def _anyone_fails(problem: str | None, compute: Compute, gang: Gang, reporter: Reporter) -> bool:
    """Ranks compile all, or none. The first that cannot tells why."""
    failing = [float(problem is not None and rank == gang.rank) for rank in range(gang.world_size)]
    failing = gang.sum(failing)
    if not any(failing):
        return False
    if failing.index(1.0) == gang.rank:
        reporter.notice(
            "compile_unavailable",
            f"layers are not compiled, so steps take as long as ever, as rank {gang.rank} cannot: "
            f"{problem}. To have it, {_ADVICE[compute.device.type]}, or look at the job's log",
            rank=gang.rank,
        )
    return True


def _reason(error: BaseException) -> str:
    """The first line that says something, of the error that began it."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}"[:300] if lines else type(error).__name__
