"""Whatever is killed, at whatever moment: every job succeeds, each row once, nothing remains."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest
import redis

from shared.capability import device_queue
from tests.e2e.broker import hints_in
from tests.e2e.facts import (
    assert_devices_are_free,
    assert_nothing_stale_was_accepted,
    assert_rows_delivered_once,
)
from tests.e2e.faults import ENDS_ATTEMPTS, FAULTS
from tests.e2e.inputs import ROWS
from tests.e2e.processes import processes_of_job
from tests.e2e.stack_process import StackProcess
from tests.stack import eventually

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(300)]


def training(
    labelled: dict[str, Path], *, epochs: int, devices: int = 2, **more: Any
) -> dict[str, Any]:
    return {
        "kind": "train",
        "task": "text-classification",
        "model": "tinybert",
        "data": {"train": str(labelled["train"]), "validation": str(labelled["test"])},
        "hyperparameters": {"epochs": epochs, "batch_size": 16, "learning_rate": 1e-3},
        "checkpoint": {"every_steps": 25},
        "resources": {"devices": devices},
        "retry": {"backoff_seconds": 0.2},
        **more,
    }


def generation(prompts: Path) -> dict[str, Any]:
    return {
        "kind": "infer",
        "task": "text-generation",
        "model": "tinyllama",
        "input": str(prompts),
        "generation": {"max_new_tokens": 100},
        "shard_rows": 20,
        "retry": {"backoff_seconds": 0.2},
    }


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("fault", sorted(FAULTS))
def test_jobs_survive(
    stack: StackProcess, labelled: dict[str, Path], prompts: Path, fault: str, seed: int
) -> None:
    chance = random.Random(f"{fault}-{seed}")
    strike, client = FAULTS[fault], stack.client
    struck: list[str] = []

    # The gang takes both devices, so a batch job waits when the first fault strikes.
    trained = client.submit(training(labelled, epochs=8), upload=True)
    waiting = client.submit(generation(prompts), upload=True)
    after_step = chance.randrange(30, 120)
    eventually(
        lambda: (p := client.job(trained.id).progress) is not None and p.step >= after_step,
        within=60,
        what=f"step {after_step} of the training",
    )
    struck.append(strike(stack, trained.id, chance))
    client.wait(trained.id, timeout=120)
    client.wait(waiting.id, timeout=120)

    batch = client.submit(generation(prompts), upload=True)
    after_rows = chance.randrange(20, 200)
    eventually(
        lambda: (client.job(batch.id).rows_done or 0) >= after_rows,
        within=60,
        what=f"row {after_rows} of the batch job",
    )
    struck.append(strike(stack, batch.id, chance))
    client.wait(batch.id, timeout=120)

    assert len(struck) == 2
    if fault in ENDS_ATTEMPTS:
        assert len(client.job(trained.id).attempts) >= 2, struck
        # Of a batch job neither does: a fresh engine goes on in it, and so do other ranks.
        story = {event.type for event in client.events(batch.id, follow=False)}
        assert story & {"engine_died", "rank_lost", "retry"}, struck
        resumed = client.job(trained.id).summary or {}
        assert resumed["resumed_from"] is not None, "it began anew instead of from a checkpoint"
    for job in (trained, waiting, batch):
        assert_nothing_stale_was_accepted(stack.store, job.id)
        eventually(
            lambda job=job: not processes_of_job(stack.data, job.id),
            within=30,
            what=f"the processes of {job.id} to be gone",
        )
    for job in (waiting, batch):
        assert_rows_delivered_once(client, job.id, [f"p{i}" for i in range(ROWS)])
    assert_devices_are_free(stack.store)


def test_hints_that_the_broker_lost_are_sent_again(
    stack: StackProcess, labelled: dict[str, Path], prompts: Path
) -> None:
    """The workers are dead when the hints arrive, and the broker is emptied before new ones start.

    Stopped workers would not do: what the broker hands to a client that sleeps is not in a list.
    """
    client = stack.client
    devices = [device.id for device in client.devices()]
    for worker in client.workers():
        if worker.ended_at is None:
            os.kill(worker.pid, signal.SIGKILL)
    trained = client.submit(training(labelled, epochs=1), upload=True)
    with redis.Redis.from_url(stack.setting("BROKER_URL")) as broker:
        eventually(
            lambda: any(hints_in(broker, device_queue(device)) for device in devices),
            within=30,
            what="a hint that nobody took",
        )
        broker.flushall()
    ended = client.wait(trained.id, timeout=60)
    assert len(ended.attempts) == 1, "the same attempt, with its hints sent again"
    assert_nothing_stale_was_accepted(stack.store, trained.id)
