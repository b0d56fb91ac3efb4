"""From the SIGKILL of a rank to the first step that had not been done before, ours and torchrun's.

Both save every ``SAVE_STEPS`` steps. Ours goes on from its newest checkpoint; torchrun with
``--max-restarts`` starts its script again, which begins at step 1, as the tutorials' scripts do: what
counts there is the first step after the restart.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.processes import children, ranks_below
from benchmarks.service import Service
from benchmarks.training import spec
from shared.lifecycle import JobState

ROOT = Path(__file__).resolve().parents[1]
STEPS, SAVE_STEPS, KILLED_AT = 60, 5, 12
PATIENCE = 90.0


def bench(service: Service, texts: Path, *, rounds: int = 3) -> dict[str, Any]:
    """Seconds, and the steps that had to be computed twice."""
    ours = [_killed(service, texts) for _ in range(rounds)]
    tried = [_torchrun_killed(service.encoder, texts) for _ in range(rounds)]
    back = [seconds for seconds in tried if seconds is not None]
    seconds = {"gpuyard": statistics.median(seconds for seconds, _ in ours)}
    if back:
        seconds["torchrun --max-restarts=3"] = statistics.median(back)
    return {
        "seconds_to_first_new_step": seconds,
        "steps_computed_twice": statistics.median(again for _, again in ours),
        "torchrun_came_back": f"{len(back)} of {rounds}",
    }


def _killed(service: Service, texts: Path) -> tuple[float, int]:
    wanted = spec(service, texts, STEPS, every_steps=SAVE_STEPS)
    job = service.client.submit(wanted, upload=True)
    reached = _await_step(service, job.id, KILLED_AT)
    os.kill(ranks_below(service.data / "jobs" / job.id)[-1], signal.SIGKILL)
    killed = time.perf_counter()
    _await_step(service, job.id, reached + 1, attempt=2)
    seconds = time.perf_counter() - killed
    saved = [c.step for c in service.client.checkpoints(job.id) if c.step <= reached]
    service.client.cancel(job.id)
    while not service.client.job(job.id).over:
        time.sleep(0.05)
    return seconds, reached - max(saved, default=0)


def _await_step(service: Service, job: str, step: int, attempt: int = 1) -> int:
    while True:
        now = service.client.job(job)
        assert now.state is not JobState.FAILED, now.failure
        progress = now.progress
        if progress and progress.attempt == attempt and progress.step >= step:
            return progress.step
        time.sleep(0.01)


def _torchrun_killed(model: Path, texts: Path) -> float | None:
    """Seconds; None where torchrun gave up, or hung: its new ranks may look for those that are gone."""
    with tempfile.TemporaryDirectory(prefix="torchrun-") as folder:
        told = Path(folder) / "steps.jsonl"
        command = [
            sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--max-restarts=3",
            "--standalone", "-m", "benchmarks.baselines.ddp_loop",
            f"--model={model}", f"--data={texts}", f"--steps={STEPS}", f"--tell={told}",
        ]  # fmt: skip
        agent = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            deadline = time.monotonic() + PATIENCE
            while len(_steps(told)) < KILLED_AT and time.monotonic() < deadline:
                time.sleep(0.01)
            before = {process for process, _ in _steps(told)}
            os.kill(children(agent.pid)[-1], signal.SIGKILL)
            killed = time.time()
            while time.monotonic() < deadline and agent.poll() is None:
                new = [at for process, at in _steps(told) if process not in before]
                if new:
                    return new[0] - killed
                time.sleep(0.01)
            return None
        finally:
            ranks = children(agent.pid)
            agent.kill()
            agent.wait()
            for rank in ranks:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(rank, signal.SIGKILL)


def _steps(told: Path) -> list[tuple[int, float]]:
    """(process, time) of each step of rank 0 so far."""
    lines = told.read_text().splitlines() if told.exists() else []
    return [tuple(json.loads(line)) for line in lines if line.endswith("]")]
