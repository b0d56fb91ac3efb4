"""Faults that strike a running stack. Each proves that it struck, or fails the test."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable
from pathlib import Path

import redis

from tests.e2e.processes import alive, parent_of, ranks_of_job, writing_below
from tests.e2e.stack_process import StackProcess
from tests.stack import eventually


def _kill(pid: int) -> str:
    command = alive(pid)
    assert command, f"{pid} was gone before it was struck"
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: alive(pid) is None, within=30, what=f"{pid} to die")
    return f"SIGKILL {pid} {command[:80]}"


def kill_rank(stack: StackProcess, job_id: str, chance: random.Random) -> str:
    """A rank of a training job, or the engine that computes for an inference job."""
    if stack.client.job(job_id).kind == "train":
        ranks = eventually(
            lambda: ranks_of_job(stack.data, job_id), within=30, what=f"ranks of {job_id}"
        )
        return _kill(chance.choice(ranks))
    device = eventually(
        lambda: next(
            (d.id for d in stack.client.devices() if any(run.job_id == job_id for run in d.runs)),
            None,
        ),
        within=30,
        what=f"a device that runs {job_id}",
    )

    def engine() -> int | None:
        found = {
            pid
            for pid in writing_below(stack.data)
            if str(Path(f"/proc/{pid}/fd/1").readlink()).endswith(f"engine.{device}.log")
        }
        return next((pid for pid in found if parent_of(pid) in found), None)

    return _kill(eventually(engine, within=30, what=f"the engine of {device}"))


def kill_worker(stack: StackProcess, job_id: str, chance: random.Random) -> str:
    """The Celery worker process of a device that runs the job."""

    def running() -> list[str]:
        return [d.id for d in stack.client.devices() if any(run.job_id == job_id for run in d.runs)]

    device = chance.choice(eventually(running, within=30, what=f"devices that run {job_id}"))
    workers = [w for w in stack.client.workers() if w.device_id == device and not w.ended_at]
    return _kill(workers[0].pid)


def kill_scheduler(stack: StackProcess, job_id: str, chance: random.Random) -> str:
    return _kill(stack.pid("scheduler"))


def empty_broker(stack: StackProcess, job_id: str, chance: random.Random) -> str:
    with redis.Redis.from_url(stack.setting("BROKER_URL")) as broker:
        flushes = broker.info("commandstats").get("cmdstat_flushall", {"calls": 0})["calls"]
        broker.flushall()
        assert broker.info("commandstats")["cmdstat_flushall"]["calls"] == flushes + 1
    return "FLUSHALL"


def restart_broker(stack: StackProcess, job_id: str, chance: random.Random) -> str:
    """SIGKILL; `gpuyard up` starts it again."""
    return _kill(stack.pid("valkey"))


Fault = Callable[[StackProcess, str, random.Random], str]
FAULTS: dict[str, Fault] = {
    "rank": kill_rank,
    "worker": kill_worker,
    "scheduler": kill_scheduler,
    "broker-emptied": empty_broker,
    "broker-restarted": restart_broker,
}
ENDS_ATTEMPTS = frozenset({"rank", "worker"})
