"""From the SIGKILL of a rank to the first step that had not been done before, ours and torchrun's.

Both save every ``SAVE_STEPS`` steps. Ours goes on from its newest checkpoint; torchrun with
``--max-restarts`` starts its script again, which begins at step 1, as the tutorials' scripts do: what
counts there is the first step after the restart.
"""

from __future__ import annotations

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


def bench(service: Service, texts: Path, *, rounds: int = 3) -> dict[str, Any]:
    """Seconds, and the steps that had to be computed twice."""
    ours = [_killed(service, texts) for _ in range(rounds)]
    return {
        "seconds_to_first_new_step": {
            "gpuyard": statistics.median(seconds for seconds, _ in ours),
            "torchrun --max-restarts": statistics.median(
                _torchrun_killed(service.encoder, texts) for _ in range(rounds)
            ),
        },
        "steps_computed_twice": statistics.median(again for _, again in ours),
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


def _torchrun_killed(model: Path, texts: Path) -> float:
    with tempfile.TemporaryDirectory(prefix="torchrun-") as folder:
        steps = Path(folder) / "steps.jsonl"
        command = [
            sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--max-restarts=1",
            "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0",
            "-m", "benchmarks.baselines.ddp_loop", f"--model={model}", f"--data={texts}",
            f"--steps={STEPS}", f"--tell={steps}",
        ]  # fmt: skip
        agent = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            _await_line(steps, agent, KILLED_AT)
            done = _lines(steps)
            os.kill(children(agent.pid)[-1], signal.SIGKILL)
            killed = time.time()
            while not [at for pid, at in _lines(steps) if at > killed and pid not in dict(done)]:
                assert agent.poll() is None, "torchrun gave up"
                time.sleep(0.01)
            return next(at for pid, at in _lines(steps) if pid not in dict(done)) - killed
        finally:
            agent.terminate()
            agent.wait()


def _await_line(steps: Path, agent: subprocess.Popen[bytes], many: int) -> None:
    while len(_lines(steps)) < many:
        assert agent.poll() is None, "torchrun gave up"
        time.sleep(0.01)


def _lines(path: Path) -> list[tuple[int, float]]:
    """(process, time) of each step of rank 0 so far."""
    if not path.exists():
        return []
    return [tuple(json.loads(line)) for line in path.read_text().splitlines() if line.endswith("]")]
