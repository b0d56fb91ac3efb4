"""A rank that hangs, through a real worker: the attempt ends soon, and the next one goes on."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

import pytest

from shared.resolved import ResolvedInput
from tests.stack import eventually
from tests.training.harness import make_bert, make_rows, write_rows
from tests.workers.fleet import Fleet

pytestmark = pytest.mark.slow


def test_a_training_whose_rank_is_stopped_is_tried_again(
    new_fleet: Callable[..., Fleet], database: str, valkey_url: str
) -> None:
    fleet = new_fleet(database, valkey_url, lease_ttl="20", claim_timeout="60", hung_after="4")
    fleet.start_scheduler()
    write_rows(fleet.data / "train.jsonl", make_rows(256, seed=1))
    fleet.start_host("one", "--devices=cpu:2", real=True, devices=2)
    job_id = fleet.submit(
        {
            "kind": "train",
            "task": "text-classification",
            "data": {"train": "x"},
            "resources": {"devices": 2},
            "hyperparameters": {"batch_size": 16, "epochs": 20, "learning_rate": 3e-3},
            "checkpoint": {"every_steps": 4},
        },
        {"train": ResolvedInput(path=str(fleet.data / "train.jsonl"), size=1)},
        model=str(make_bert(fleet.data / "bert")),
    )
    fleet.wait_for_event(job_id, "checkpoint", within=90)
    victim = [pid for pid, name in fleet.processes().items() if name == "gpuyard-rank"][-1]
    os.kill(victim, signal.SIGSTOP)
    job = fleet.wait(job_id, "succeeded", within=120)
    first, second = fleet.attempts(job_id)
    assert first.failure is not None
    assert (first.failure_class, first.failure["code"]) == ("infrastructure", "rank_hung")
    assert first.failure["message"].startswith(("rank 0 (cpu0@one)", "rank 1 (cpu1@one)"))
    assert first.started_at is not None and first.finished_at is not None
    assert second.number == 2
    assert job.summary is not None
    assert job.summary["resumed_from"]["step"] >= 4
    assert fleet.stop_host() == 0
    eventually(lambda: not fleet.processes())
