"""How many bytes a configuration takes: its step is computed on tensors without memory, and counted."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from shared.footprint import Configuration
from shared.specs import TrainPrecision
from workers.ranks.footprint.pretend import FusedAttention, PretendedBytes, pretend
from workers.ranks.footprint.step import Step
from workers.ranks.footprint.subject import Subject, make_batch, make_subject
from workers.ranks.footprint.tracker import LiveBytes
from workers.ranks.train.device import Compute
from workers.ranks.train.parallel import set_aside_unused

EVALUATED_TOGETHER = 16
"""Rows of an evaluation's batch, at least."""


def measure(configuration: Configuration) -> int:
    """Bytes of all tensors at the moment at which they are most. No weights are read or made.

    Precision ``auto`` is fp32 on some devices and bf16 on others: what takes more counts. bf16 keeps
    copies of weights beside them, and may.

    Raises:
        TrainingFailed: freeze or LoRA patterns match nothing.
        Exception: whatever a model raises that cannot be computed without content.
    """
    precision = configuration.spec.hyperparameters.precision
    ways: tuple[TrainPrecision, ...] = ("fp32", "bf16") if precision == "auto" else (precision,)
    return max(_measure(configuration, way) for way in ways)


def _measure(configuration: Configuration, precision: TrainPrecision) -> int:
    fused = configuration.device == "cuda"
    subject = make_subject(configuration, torch.device("meta"))
    pretend(subject.models)
    attention: AbstractContextManager[object] = FusedAttention() if fused else nullcontext()
    with attention:
        return peak_of(configuration, subject, PretendedBytes(), precision)


def peak_of(
    configuration: Configuration, subject: Subject, counted: LiveBytes, precision: TrainPrecision
) -> int:
    """The peak over a training step, once the optimizer has its state, and an evaluation's batch.

    Works on real and on fake subjects alike: see ``tests/footprint``.
    """
    half = torch.bfloat16 if precision == "bf16" else None
    compute = Compute(device=torch.device("cpu"), backend="gloo", half=half)
    batch = make_batch(configuration, subject, configuration.rows)
    counted.add(subject.tensors)
    with counted:
        set_aside_unused(subject.objective, subject.model, batch, compute)
        step = Step(subject.objective, subject.model, configuration.spec.hyperparameters, compute)
        step.make_optimizer_state()
        if configuration.gradients_stay:
            step.keep_gradients()
        waiting = [step.like_gradients() for _ in range(configuration.waiting_sums)]
        counted.peak = counted.now
        step.train(batch)
        del waiting
        if configuration.evaluates:
            rows = max(EVALUATED_TOGETHER, configuration.rows)
            step.evaluate(make_batch(configuration, subject, rows))
    return counted.peak
