"""The engine's whole path for one attempt, in this process: from the input file to the rows of its shards."""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from shared.messages import DeviceHandle, InferAssignment
from shared.rows import cut_into_shards
from shared.specs import InferSpec
from workers.ranks.engine.attempt import Attempt, compute_dtype
from workers.ranks.engine.models import ModelCache
from workers.ranks.engine.sharing import Computations

T = TypeVar("T")
Answers = list[tuple[int, str]]
"""Of each request: how many tokens were generated, and the text."""


def compute(
    cache: ModelCache, folder: Path, rows: Sequence[dict[str, Any]], **fields: Any
) -> list[dict[str, Any]]:
    """Results in input order. ``fields`` are those of the spec; the model is loaded unless it is warm."""
    threads = torch.get_num_threads()
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
        file.flush()
        assignment = InferAssignment(
            job_id="bench",
            attempt_id="bench",
            attempt=1,
            token=1,
            device=DeviceHandle(id="cpu0", kind="cpu", memory_bytes=8 << 30, threads=threads),
            spec=InferSpec(model="bench", input=file.name, **fields),
            model_path=str(folder),
            input_path=file.name,
        )
        device, dtype = torch.device("cpu"), compute_dtype(assignment)
        loaded, warm = cache.get(assignment.spec.task, str(folder), dtype, device)
        computations = Computations()
        shared = computations.join(assignment, loaded)
        attempt = Attempt(assignment, shared, warm)
        attempt.order(tuple(cut_into_shards(Path(file.name), 64)))
        shards = []
        while attempt.busy:
            shards += attempt.feed()
            if not shared.computation.busy:
                continue
            step, seconds = shared.step()
            results = [answered.result for answered in step.results]
            shards += attempt.take(results, step.tokens.get(attempt.id, 0), seconds)
        computations.leave(shared, attempt.id)
    return [row for shard in sorted(shards, key=lambda s: s.index) for row in shard.results]


def timed(run: Callable[[], T]) -> tuple[T, float, float]:
    """What it gave, without what it printed; seconds by the clock and of the processor."""
    wall, cpu = time.perf_counter(), time.process_time()
    with contextlib.redirect_stdout(io.StringIO()):
        found = run()
    return found, time.perf_counter() - wall, time.process_time() - cpu


def measure(name: str, run: Callable[[], Answers], reference: Answers | None) -> dict[str, Any]:
    """A row of a table of engines that write text. ``reference``: answers to be compared with."""
    answers, wall, cpu = timed(run)
    tokens = sum(count for count, _ in answers)
    same = (
        None if reference is None else sum(a == b for a, b in zip(answers, reference, strict=True))
    )
    return {
        "engine": name,
        "seconds": round(wall, 2),
        "tokens_per_second": round(tokens / wall, 1),
        "tokens_per_cpu_second": round(tokens / cpu, 1),
        "identical": same,
        "answers": answers,
    }
