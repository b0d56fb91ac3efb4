"""Batch jobs whose engines, workers and scheduler are killed at random moments.

``TEST_CHAOS_SEEDS`` ("1 2 3") and ``TEST_CHAOS_ROWS`` choose longer runs. The acceptance's are 20 seeds of
5,000 rows::

    TEST_CHAOS_SEEDS="$(seq -s ' ' 1 20)" TEST_CHAOS_ROWS=5000 pytest -m chaos tests/workers/test_batch_chaos.py
"""

from __future__ import annotations

import math
import os
import random
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest

from shared.specs import InferSpec
from tests.stack import eventually
from tests.workers.fleet import ROOT, Fleet
from workers.attempt.feed import SECONDS_IN_FLIGHT, shards_in_flight

SEEDS = [int(seed) for seed in os.environ.get("TEST_CHAOS_SEEDS", "1 2").split()]
ROWS = int(os.environ.get("TEST_CHAOS_ROWS", "1500"))
SECONDS_PER_ROW = 0.01
"""What an engine of a ``brisk`` job needs at the least."""
KILLED = ("engine", "engine", "worker", "scheduler")


@pytest.mark.chaos
@pytest.mark.timeout(300 + ROWS // 5)
@pytest.mark.parametrize("seed", SEEDS)
def test_every_row_once_whatever_is_killed(
    new_fleet: Callable[..., Fleet], database: str, valkey_url: str, seed: int
) -> None:
    """1% of the rows are bad."""
    chance = random.Random(seed)
    bad = set(chance.sample(range(ROWS), ROWS // 100))
    rows: list[Any] = ["no json" if row in bad else {"prompt": f"row {row}"} for row in range(ROWS)]
    # Each falls into a part of the job of its own, at a random row.
    part = ROWS // (len(KILLED) + 1)
    moments = [part * n + chance.randrange(part) for n in range(len(KILLED))]
    fleet = new_fleet(database, valkey_url)
    scheduler = SchedulerProcess(fleet)
    killed: Counter[str] = Counter()
    try:
        fleet.start_host("one", "--devices=cpu:2", devices=2)
        job_id = fleet.infer(rows, "brisk", shard_rows=5, batch_size=4)
        for moment, what in zip(moments, chance.sample(KILLED, len(KILLED)), strict=True):
            eventually(lambda m=moment: len(fleet.begun(job_id)) > m, 60 + ROWS / 20)
            killed[what] += kill(fleet, scheduler, what, chance)
        fleet.wait(job_id, "succeeded", within=100 + ROWS / 20)
    finally:
        scheduler.close()
    found = [(row["row"], row["output"], row["error"]) for row in fleet.results(job_id)]
    assert [row for row, _, _ in found] == list(range(ROWS)), "every row exactly once"
    for row, output, error in found:
        if row in bad:
            assert (output, error["code"]) == (None, "invalid_json")
        else:
            assert (output["text"], error) == (f"ROW {row}", None)
    again = len(fleet.begun(job_id)) - ROWS
    losses = killed["engine"] + killed["worker"]
    assert 0 <= again <= losses * most_in_flight(fleet, job_id), killed
    print(f"seed {seed}: {ROWS} rows, killed {dict(killed)}, {again} rows computed again")


def most_in_flight(fleet: Fleet, job_id: str) -> int:
    """Rows that a rank may have in its engine at once."""
    spec = InferSpec.model_validate(fleet.job(job_id).spec)
    in_time = math.ceil(SECONDS_IN_FLIGHT / SECONDS_PER_ROW / spec.shard_rows)
    return max(shards_in_flight(spec), in_time) * spec.shard_rows


class SchedulerProcess:
    """``python -m scheduler run``, which a test may kill."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        with self._fleet.log("scheduler").open("ab") as out:
            return subprocess.Popen(
                [sys.executable, "-m", "scheduler", "run"],
                cwd=ROOT, env=self._fleet.environment, stdout=out, stderr=out,
            )  # fmt: skip

    def kill(self) -> None:
        self.close()
        self._process = self._start()

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def kill(fleet: Fleet, scheduler: SchedulerProcess, what: str, chance: random.Random) -> bool:
    """SIGKILL; False where no such process lived just then."""
    if what == "scheduler":
        scheduler.kill()
        return True
    if what == "worker":
        os.kill(fleet.worker_pid(chance.choice(["cpu0@one", "cpu1@one"])), signal.SIGKILL)
        return True
    engines = [pid for pid, name in fleet.processes().items() if name == "gpuyard-rank"]
    with suppress(ProcessLookupError, IndexError):
        os.kill(chance.choice(engines), signal.SIGKILL)
        return True
    return False
