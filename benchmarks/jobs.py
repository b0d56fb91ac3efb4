"""Jobs that do next to nothing, a second: what the promises of a job cost against a bare Celery task.

A job here is validated, committed, placed, leased, claimed, computed by an engine process, its row
committed with its token, and its events recorded. A Celery task is a message and a function call.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.service import Service

ROOT = Path(__file__).resolve().parents[1]


def bench(service: Service, *, jobs: int = 100, tasks: int = 2000) -> dict[str, Any]:
    """Jobs and tasks a second, on two devices and two Celery workers, on the same Valkey."""
    spec = {
        "kind": "infer",
        "task": "text-generation",
        "model": "tiny",
        "rows": [{"prompt": "w1"}],
        "generation": {"max_new_tokens": 1},
    }
    for _ in range(4):  # engines warm
        service.client.wait(service.client.submit(spec).id)
    began = time.perf_counter()
    submitted = [service.client.submit(spec).id for _ in range(jobs)]
    accepted = time.perf_counter() - began
    for job_id in submitted:
        service.client.wait(job_id, poll_seconds=0.05)
    done = time.perf_counter() - began
    latencies = []
    for _ in range(10):
        began = time.perf_counter()
        service.client.wait(service.client.submit(spec).id, poll_seconds=0.01)
        latencies.append(time.perf_counter() - began)
    return {
        "jobs_per_second": jobs / done,
        "submissions_per_second": jobs / accepted,
        "seconds_for_one_job": sorted(latencies)[len(latencies) // 2],
        "celery_tasks_per_second": _celery(service, tasks),
    }


def _celery(service: Service, tasks: int) -> float:
    """The same work the way a user of bare Celery would do it: two workers with a thread each."""
    environ = Path(f"/proc/{service.running.pids()['scheduler']}/environ").read_bytes().split(b"\0")
    broker = next(e[11:].decode() for e in environ if e.startswith(b"BROKER_URL="))
    environment = {**os.environ, "BENCH_BROKER_URL": broker.rsplit("/", 1)[0] + "/9"}
    workers = [
        subprocess.Popen(
            [
                sys.executable, "-m", "celery", "-A", "benchmarks.baselines.celery_tasks", "worker",
                "-P", "threads", "-c", "1", "-n", f"bench{number}@%h", "--without-gossip",
                "--without-mingle", "-l", "ERROR",
            ],
            cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )
        for number in range(2)
    ]  # fmt: skip
    try:
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.baselines.celery_tasks", str(tasks)],
            cwd=ROOT, env=environment, capture_output=True, text=True, check=True, timeout=120,
        )  # fmt: skip
        return float(done.stdout)
    finally:
        for worker in workers:
            worker.terminate()
        for worker in workers:
            worker.wait(30)
