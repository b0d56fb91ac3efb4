"""What a checkpoint holds, and how training goes on from one.

Parameters, whatever the optimizer keeps of each, and where the training stood. No generator and no
loader state: order and randomness are functions of the position (``order.py``).
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from shared.lifecycle import FailureClass
from shared.messages import CheckpointRef, TrainAssignment
from shared.specs import TrainSpec
from workers.ranks.checkpoint import CheckpointDamaged, read_state
from workers.ranks.train.failures import TrainingFailed
from workers.ranks.train.gang import Gang
from workers.ranks.train.history import Row
from workers.ranks.train.means import Means
from workers.ranks.train.order import same_bits
from workers.ranks.train.pieces import load, require_parts
from workers.ranks.train.reports import Reporter
from workers.ranks.train.scaling import LossScale
from workers.ranks.train.sharding import local, span
from workers.ranks.train.stopping import Best

_FORMAT = 4
BUFFER = "buffer."
"""How the names of buffers begin. Ranks do not agree on these: rank 0's are everyone's after a resume."""
_SAMPLED = 256
"""Numbers of a weight that are looked at, about."""

_LISTS = ("evaluations", "history", "attempts")

Fingerprint = dict[str, str]


@dataclass(slots=True)
class Position:
    """Where training stands: how many steps are done, and what was measured on the way."""

    step: int = 0
    seconds: float = 0.0
    """Spent in the steps, over all attempts that this one continues."""
    evaluations: list[dict[str, float]] = field(default_factory=list)
    history: list[Row] = field(default_factory=list)
    attempts: list[dict[str, Any]] = field(default_factory=list)
    """Those that led here, by number: from which step, on how many ranks, on which device of rank 0."""
    loss_scale: LossScale = field(default_factory=LossScale)
    """Moves with fp16 alone."""
    kept: Means = field(default_factory=Means)
    """Over the steps since the last kept metric, so that a resumed training keeps the same ones."""

    def as_json(self) -> dict[str, Any]:
        """A copy that stays as it is. Faster than ``asdict``: training waits for it."""
        copied = {name: list(map(copy.copy, getattr(self, name))) for name in _LISTS}
        moving = {"loss_scale": asdict(self.loss_scale), "kept": asdict(self.kept)}
        return {"step": self.step, "seconds": self.seconds, **copied, **moving}

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Position:
        """That of a checkpoint, as JSON has it."""
        values = dict(state["position"])
        scale, kept = LossScale(**values["loss_scale"]), Means(**values["kept"])
        return cls(**{**values, "loss_scale": scale, "kept": kept})


@dataclass(frozen=True, slots=True)
class Resumed:
    """The checkpoint that training goes on from, and where it stood."""

    checkpoint: CheckpointRef
    position: Position
    best: CheckpointRef | None = None
    """Where the best model so far is, on rank 0, if early stopping is to deliver it."""


def sample_weights(model: nn.Module, gang: Gang) -> dict[str, bytes]:
    """Some numbers of each weight, to know it by. All ranks of a model in shards call it together, and
    get the same, however it is cut."""
    some = {}
    for name, parameter in model.named_parameters():
        held = local(parameter.detach()).flatten()
        step = max(1, parameter.numel() // _SAMPLED)
        first = 0
        if gang.sharded and len(parameter):
            rows, _ = span(len(parameter), gang.world_size, gang.rank)
            first = rows * (parameter.numel() // len(parameter))
        places = torch.arange(0, parameter.numel(), step) - first
        own = (places >= 0) & (places < len(held))
        # Bits, not numbers: sums over ranks of which one has each keep them, a NaN's as well.
        bits = torch.zeros(len(places), dtype=torch.int32)
        bits[own] = held[places[own].to(held.device)].float().cpu().view(torch.int32)
        some[name] = bits
    if gang.sharded:
        summed = gang.sum(torch.cat(list(some.values())).tolist())
        bits = torch.tensor(summed, dtype=torch.float64).to(torch.int32)
        lengths = [len(each) for each in some.values()]
        some = dict(zip(some, torch.split(bits, lengths), strict=True))
    return {name: each.numpy().tobytes() for name, each in some.items()}


def fingerprint(
    spec: TrainSpec, data: str, model: nn.Module, samples: Mapping[str, bytes]
) -> Fingerprint:
    """Digests of all that must be equal for a checkpoint to continue this training. ``samples`` are
    those of the model before training.

    Of the spec counts what shapes the training: a job may go on under another priority.
    """
    chosen = spec.model_dump(
        mode="json",
        include={
            "model", "architecture", "task", "problem", "method", "lora", "teacher", "distillation",
            "preference", "data", "hyperparameters", "early_stopping",
        },
    )  # fmt: skip
    shapes = [[n, list(p.shape), p.requires_grad] for n, p in model.named_parameters()]
    return {
        "spec": _digest(chosen),
        "data": data,
        "parameters": _digest(shapes),
        "frozen": _frozen_digest(model, samples),
    }


def _frozen_digest(model: nn.Module, samples: Mapping[str, bytes]) -> str:
    """Of some numbers of each weight that training leaves alone. No checkpoint holds those: they have
    to be in the model folder what they were."""
    sha = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            sha.update(name.encode() + samples[name])
    return sha.hexdigest()


def require_agreement(gang: Gang, own: Fingerprint, topic: str = "fingerprint") -> None:
    """Raises TrainingFailed on a rank that sees other data or another model than rank 0."""
    theirs = gang.share(topic, own)
    differing = sorted(name for name in own if own[name] != theirs[name])
    if differing:
        raise TrainingFailed(
            FailureClass.INFRASTRUCTURE,
            "ranks_disagree",
            f"rank {gang.rank} and rank 0 do not see the same {', '.join(differing)}",
            "Hosts of one gang must have the same files under the same paths.",
        )


def tensors_of(
    model: nn.Module, optimizer: torch.optim.Optimizer
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of the training under a name, in an order that all ranks share."""
    yield from _model_tensors(model)
    for name, parameter in model.named_parameters():
        for kept, value in sorted(optimizer.state.get(parameter, {}).items()):
            if isinstance(value, torch.Tensor):
                yield f"{kept}.{name}", value


def describe(own: Fingerprint, gang: Gang, position: Position) -> dict[str, Any]:
    """What goes beside the tensors, as JSON."""
    return {
        "format": _FORMAT,
        "fingerprint": own,
        "world_size": gang.world_size,
        "position": position.as_json(),
    }


def resume(
    assignment: TrainAssignment,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    own: Fingerprint,
    gang: Gang,
    reporter: Reporter,
    best_of: Callable[[Position], Best | None],
) -> Resumed | None:
    """Go on from the newest checkpoint that is whole; None where there is none.

    ``best_of`` says which model training would deliver from a position, if it were to end there with
    another than its last; a checkpoint without that one is not whole.

    Rank 0 alone decides, so all agree.
    """
    chosen: dict[str, Any] | None = None
    best: CheckpointRef | None = None
    if gang.rank == 0:
        for index, checkpoint in enumerate(assignment.resume_from):
            try:
                state = read_state(checkpoint)
                _require_same_training(state, own)
                needed = best_of(Position.of(state))
                best = _find_best(needed, checkpoint, assignment.best_from, own)
                require_parts(checkpoint)
            except CheckpointDamaged as problem:
                reporter.notice(
                    "checkpoint_damaged",
                    f"the checkpoint of step {checkpoint.step} was skipped: {problem}",
                    checkpoint=checkpoint.id,
                    step=checkpoint.step,
                )
                continue
            if (before := state["world_size"]) != gang.world_size:
                in_one_tree = assignment.spec.elastic and not gang.sharded
                same = in_one_tree and same_bits(before, gang.world_size)
                reporter.notice(
                    "world_size_changed",
                    f"the checkpoint of step {checkpoint.step} was made by {before} rank(s) and is "
                    f"continued by {gang.world_size}: the global batch stays what it is, and the "
                    "result is "
                    + (
                        "the same"
                        if same and assignment.micro_batch is None
                        else "the same but for rounding, in the last bits"
                    ),
                )
            chosen = {"index": index, "position": state["position"]}
            break
    chosen = gang.share("resume", chosen)
    if chosen is None:
        return None
    position = Position.of(chosen)
    if position.step > position.loss_scale.skipped:
        # An optimizer that has not moved a weight yet keeps nothing.
        _allocate_state(optimizer)
    checkpoint = assignment.resume_from[chosen["index"]]
    load(checkpoint, tensors_of(model, optimizer), gang)
    return Resumed(checkpoint, position, best)


def restore_best(model: nn.Module, best: CheckpointRef | None, gang: Gang) -> None:
    """Give the model of every rank the weights of the checkpoint ``best``, which rank 0 knows of.

    Raises:
        TrainingFailed: it is no longer what was written (infrastructure): the next attempt sees that
            when it starts, and goes on from before it.
    """
    if gang.rank == 0:
        assert best is not None  # noqa: S101  written by this attempt, or found when it began
        try:
            read_state(best)
            require_parts(best)
        except CheckpointDamaged as problem:
            raise TrainingFailed(
                FailureClass.INFRASTRUCTURE,
                "best_model_damaged",
                f"the best model, of step {best.step}, cannot be delivered: {problem}",
                "Look at the disk of the service's data folder.",
            ) from problem
    found = gang.share("best", best and best.model_dump(mode="json"))
    load(CheckpointRef.model_validate(found), _model_tensors(model), gang)


def _find_best(
    needed: Best | None,
    checkpoint: CheckpointRef,
    candidates: Iterable[CheckpointRef],
    own: Fingerprint,
) -> CheckpointRef | None:
    """The checkpoint of the best model that ``checkpoint``, which is whole, builds on: itself, or one
    of ``candidates``. Attempts on other world sizes may have made others at the same step, so the value
    must be the same too.

    Raises:
        CheckpointDamaged: there is none that is whole.
    """
    if needed is None:
        return None
    if needed.step == checkpoint.step:
        return checkpoint
    why = "it is not there"
    for candidate in candidates:
        if candidate.step == needed.step:
            try:
                state = read_state(candidate)
                _require_same_training(state, own)
            except CheckpointDamaged as problem:
                why = str(problem)
                continue
            evaluated = state["position"]["evaluations"]
            if evaluated and evaluated[-1].get(needed.metric) == needed.value:
                return candidate
    raise CheckpointDamaged(f"the best model that it builds on, of step {needed.step}: {why}")


def _require_same_training(state: Mapping[str, Any], own: Fingerprint) -> None:
    if state.get("format") != _FORMAT:
        raise CheckpointDamaged(f"it is of format {state.get('format')}, not {_FORMAT}")
    differing = sorted(name for name in own if state["fingerprint"].get(name) != own[name])
    if differing:
        raise CheckpointDamaged(f"it belongs to a training with other {', '.join(differing)}")


def _model_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Trained parameters, and those buffers that are saved with them."""
    persistent = model.state_dict(keep_vars=True)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield f"parameter.{name}", parameter.detach()
    for name, buffer in model.named_buffers():
        if name in persistent:
            yield f"{BUFFER}{name}", buffer


def _allocate_state(optimizer: torch.optim.Optimizer) -> None:
    """Make the optimizer's state as its first step does, by a step that moves nothing. What it holds
    then is of no use but to be overwritten (as torch.distributed.checkpoint goes about it)."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def _digest(value: Any) -> str:
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()
