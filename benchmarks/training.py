"""Fine-tuning through the service against bare torchrun, and the time to the first step.

The same model, texts, global batch and number of ranks; ours includes reports, logs and the lease. In
turn, ours and theirs, several times; the ratios are of the medians.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.service import Service
from shared.lifecycle import JobState

ROOT = Path(__file__).resolve().parents[1]
TEXTS = ROOT / "examples" / "data" / "glosses-train.jsonl"
RANKS, BATCH = 2, 32


def bench(service: Service, *, rounds: int = 3, steps: int = 20) -> dict[str, Any]:
    """Examples and steps per second of three ways to train, and seconds to the first step."""
    ours, bare = [], []
    for _ in range(rounds):
        ours.append(_through_service(service, steps))
        bare.append(_torchrun(service.encoder, steps, "grouped")["examples_per_second"])
    padded = _torchrun(service.encoder, 4, "512")["examples_per_second"]
    warm = [_seconds_to_first_step(service) for _ in range(rounds)]
    cold = []
    for _ in range(rounds):
        _kill_nursery(service)
        cold.append(_seconds_to_first_step(service))
    torchrun = [_torchrun(service.encoder, 1, "grouped")["first_step"] for _ in range(rounds)]
    return {
        "examples_per_second": {
            "gpuyard": statistics.median(ours),
            "torchrun, same batches": statistics.median(bare),
            "torchrun, padded to 512": padded,
        },
        "seconds_to_first_step": {
            "gpuyard, warm": statistics.median(warm),
            "gpuyard, cold": statistics.median(cold),
            "torchrun": statistics.median(torchrun),
        },
    }


def _spec(service: Service, steps: int) -> dict[str, Any]:
    return {
        "kind": "train",
        "task": "text-classification",
        "model": service.encoder.name,
        "data": {"train": str(TEXTS)},
        "hyperparameters": {
            "max_steps": steps,
            "batch_size": BATCH,
            "learning_rate": 3e-4,
            "precision": "fp32",
            "max_length": 512,
        },
        "checkpoint": {"every_seconds": None},
        "resources": {"devices": RANKS},
    }


def _through_service(service: Service, steps: int) -> float:
    job = service.client.submit(_spec(service, steps), upload=True)
    ended = service.client.wait(job.id)
    assert ended.summary is not None
    return float(ended.summary["examples_per_second"])


def _seconds_to_first_step(service: Service) -> float:
    """From the call of submit to the first step in the API; the file is uploaded before."""
    spec = _spec(service, 3)
    spec["data"]["train"] = service.client.upload(TEXTS).id
    began = time.perf_counter()
    job = service.client.submit(spec)
    while (now := service.client.job(job.id)).progress is None:
        assert now.state is not JobState.FAILED
        time.sleep(0.005)
    seconds = time.perf_counter() - began
    service.client.wait(job.id)
    return seconds


def _kill_nursery(service: Service) -> None:
    """Afterwards a rank has to wait until torch and transformers are imported again."""
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            argv = (entry / "cmdline").read_bytes().split(b"\0")
            parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
        except OSError:
            continue
        if b"workers.ranks.nursery" in argv and parent == service.running.pids()["workers"]:
            os.kill(int(entry.name), signal.SIGKILL)


def _torchrun(model: Path, steps: int, padding: str) -> dict[str, float]:
    began = time.time()
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={RANKS}",
            "--master-port=0", "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0",
            "-m", "benchmarks.baselines.ddp_loop", f"--model={model}", f"--data={TEXTS}",
            f"--steps={steps}", f"--batch-size={BATCH}", f"--padding={padding}",
        ],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    answer: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    answer["first_step"] = answer.pop("first_step_at") - began
    return answer
