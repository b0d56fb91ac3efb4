"""Fine-tuning through the service against what users start with bare torchrun.

The same model, texts, global batch, precision, checkpoint interval and number of ranks; ours includes
reports, logs and the lease. In turn, ours and theirs, several times; the ratios are of the medians.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.processes import kill_nursery
from benchmarks.service import Service
from benchmarks.texts import write_texts

ROOT = Path(__file__).resolve().parents[1]
RANKS, BATCH = 2, 32
PADDED_STEPS = 3


def bench(service: Service, *, rounds: int = 3) -> dict[str, Any]:
    """Examples per second, by the kind of texts and the way to train, and seconds to the first step."""
    texts = {each: write_texts(service.data, each) for each in ("short", "mixed", "long")}
    rates: dict[str, dict[str, float]] = {}
    rates["short texts, a checkpoint every 10 steps"] = _in_turn(
        rounds, _against_trainer(service, texts["short"], steps=40, saved=10, batches="ours")
    )
    rates["mixed texts, a checkpoint every 4 steps"] = _in_turn(
        rounds, _against_trainer(service, texts["mixed"], steps=12, saved=4, batches="own")
    )
    rates["short texts"] = _in_turn(1, _against_padding(service, texts["short"], steps=40))
    rates["long texts"] = _in_turn(1, _against_padding(service, texts["long"], steps=6))
    return {
        "examples_per_second": rates,
        "seconds_to_first_step": _first_steps(service, texts["short"], rounds),
    }


def _against_trainer(
    service: Service, texts: Path, *, steps: int, saved: int, batches: str
) -> dict[str, Callable[[], float]]:
    """Transformers' Trainer with a checkpoint every ``saved`` steps, on our batches or its own."""
    what = {"ours": "the same batches", "own": "its own batches, dynamic padding"}[batches]
    options = (f"--batches={batches}", f"--save-steps={saved}")

    def trainer() -> float:
        answer = _torchrun("hf_trainer", service.encoder, texts, steps, *options)
        return answer["examples_per_second"]

    return {
        "gpuyard": lambda: _through_service(service, texts, steps, saved),
        f"Trainer under torchrun, {what}": trainer,
    }


def _against_padding(
    service: Service, texts: Path, *, steps: int
) -> dict[str, Callable[[], float]]:
    """The tutorials' loop, which pads every text to the model's maximum."""

    def padded() -> float:
        answer = _torchrun("ddp_loop", service.encoder, texts, PADDED_STEPS, "--padding=512")
        return answer["examples_per_second"]

    return {
        "gpuyard": lambda: _through_service(service, texts, steps),
        "the tutorials' loop under torchrun, padded to 512": padded,
    }


def _in_turn(rounds: int, ways: dict[str, Callable[[], float]]) -> dict[str, float]:
    """The median of each way over the rounds."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, measure in ways.items():
            found[name].append(measure())
    return {name: statistics.median(values) for name, values in found.items()}


def _first_steps(service: Service, texts: Path, rounds: int) -> dict[str, float]:
    def cold() -> float:
        kill_nursery(service.running.pids()["workers"])
        return _seconds_to_first_step(service, texts)

    def torchrun() -> float:
        began = time.time()
        return _torchrun("ddp_loop", service.encoder, texts, 1)["first_step_at"] - began

    return {
        **_in_turn(rounds, {"gpuyard, warm": lambda: _seconds_to_first_step(service, texts)}),
        **_in_turn(rounds, {"gpuyard, cold": cold, "torchrun": torchrun}),
    }


def spec(
    service: Service, texts: Path, steps: int, every_steps: int | None = None
) -> dict[str, Any]:
    """A training of ``steps`` on both CPU devices, with a checkpoint every ``every_steps``."""
    return {
        "kind": "train",
        "task": "text-classification",
        "model": service.encoder.name,
        "data": {"train": str(texts)},
        "hyperparameters": {
            "max_steps": steps,
            "batch_size": BATCH,
            "learning_rate": 3e-4,
            "precision": "fp32",
            "max_length": 512,
        },
        "checkpoint": {"every_steps": every_steps, "every_seconds": None},
        "resources": {"devices": RANKS},
    }


def _through_service(
    service: Service, texts: Path, steps: int, every_steps: int | None = None
) -> float:
    job = service.client.submit(spec(service, texts, steps, every_steps), upload=True)
    ended = service.client.wait(job.id)
    assert ended.summary is not None
    return float(ended.summary["examples_per_second"])


def _seconds_to_first_step(service: Service, texts: Path) -> float:
    """From the call of submit to the first step in the API; the file is uploaded before."""
    wanted = spec(service, texts, 3)
    wanted["data"]["train"] = service.client.upload(texts).id
    began = time.perf_counter()
    job = service.client.submit(wanted)
    while (now := service.client.job(job.id)).progress is None:
        assert not now.over, now.failure
        time.sleep(0.005)
    seconds = time.perf_counter() - began
    service.client.wait(job.id)
    return seconds


def _torchrun(way: str, model: Path, texts: Path, steps: int, *options: str) -> dict[str, float]:
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={RANKS}",
            "--master-port=0", "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0",
            "-m", f"benchmarks.baselines.{way}", f"--model={model}", f"--data={texts}",
            f"--steps={steps}", f"--batch-size={BATCH}", *options,
        ],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    answer: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return answer
