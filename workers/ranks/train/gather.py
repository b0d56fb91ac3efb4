"""What is written about a training, gathered from what rank 0 has of it in the end."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from typing import Any

import numpy as np
import torch

from shared.messages import TrainAssignment
from shared.specs import InstalledDataset
from workers.ranks.train.device import Compute
from workers.ranks.train.examples import Examples
from workers.ranks.train.history import points
from workers.ranks.train.order import BatchPlan
from workers.ranks.train.state import Position
from workers.ranks.train.tasks import Task
from workers.ranks.train.tasks.base import Evaluation
from workers.writeup.facts import Facts, Part, Rows

_PACKAGES = ("gpuyard", "torch", "transformers", "tokenizers", "numpy")


def gather(
    assignment: TrainAssignment,
    task: Task,
    plan: BatchPlan,
    position: Position,
    evaluation: Evaluation | None,
    summary: Mapping[str, Any],
    training: Examples,
    validation: Examples | None,
    samples: Sequence[Mapping[str, Any]],
    compute: Compute,
) -> Facts:
    """``summary`` is the job's, ``samples`` are of the delivered model."""
    spec, model = assignment.spec, task.loaded.model
    counts = {p: p.numel() for p in model.parameters()}
    details = dict(evaluation.details) if evaluation else {}
    return Facts(
        job_id=assignment.job_id,
        spec=spec.model_dump(mode="json", exclude_none=True),
        parameters=sum(counts.values()),
        trained_parameters=sum(n for p, n in counts.items() if p.requires_grad),
        rows=_rows(assignment, training, validation),
        labels=task.loaded.labels,
        batch=f"{plan.ranks} ranks × {plan.micro_batch} micro-batch × {plan.accumulation} accumulation"
        f" = {plan.global_batch}",
        precision=compute.precision,
        device_kind=compute.device.type,
        steps=position.step,
        total_steps=plan.total_steps,
        steps_per_epoch=plan.steps_per_epoch,
        seconds=position.seconds,
        stopped_early=bool(summary["stopped_early"]),
        judged_by=task.judged_by,
        goal=summary["objective"]["goal"],
        values=evaluation.values if evaluation else {},
        details=details,
        points=points(position.history),
        evaluations=position.evaluations,
        parts=[Part(**part) for part in position.attempts],
        ended=assignment.ended,
        versions=versions(spec.method == "lora", compute),
        finished_at=datetime.now(UTC),
        peak_memory_bytes=summary["peak_memory_bytes"],
        samples=details.get("samples") or samples,
    )


def versions(lora: bool, compute: Compute) -> dict[str, str]:
    """Of what the training ran with."""
    found = {"python": platform.python_version()}
    for name in (*_PACKAGES, *(["peft"] if lora else [])):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue  # run from a folder that is not installed
    if compute.device.type == "cuda":
        found["CUDA"] = str(torch.version.cuda)
        found["GPU"] = torch.cuda.get_device_name(compute.device)
    return found


def _rows(
    assignment: TrainAssignment, training: Examples, validation: Examples | None
) -> list[Rows]:
    data = assignment.spec.data
    found = [_described("train", _source(data.train), training)]
    if validation is not None:
        source = _source(data.validation)
        if data.validation is None:
            source = f"{data.validation_split:g} of {_source(data.train)}"
        found.append(_described("validation", source, validation))
    return found


def _described(split: str, source: str, examples: Examples) -> Rows:
    return Rows(
        split=split,
        source=source,
        examples=len(examples),
        sha256=examples.digest(),
        median_tokens=int(np.median(examples.lengths)),
        longest_tokens=int(examples.lengths.max()),
        cut=int(examples.cut.sum()),
    )


def _source(source: str | InstalledDataset | None) -> str:
    return (
        f"dataset {source.dataset}" if isinstance(source, InstalledDataset) else str(source or "")
    )
