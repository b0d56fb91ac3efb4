"""Whatever is killed, at whatever moment: every job succeeds, each row once, nothing remains."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.facts import (
    assert_devices_are_free,
    assert_nothing_stale_was_accepted,
    assert_rows_delivered_once,
)
from tests.e2e.faults import ENDS_ATTEMPTS, FAULTS
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
        "generation": {"max_new_tokens": 48},
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

    # The gang takes both devices, so the batch jobs wait when the first fault strikes.
    trained = client.submit(training(labelled, epochs=10), upload=True)
    batches = [client.submit(generation(prompts), upload=True) for _ in range(2)]

    after_step = chance.randrange(30, 150)
    eventually(
        lambda: (p := client.job(trained.id).progress) is not None and p.step >= after_step,
        within=60,
        what=f"step {after_step} of the training",
    )
    struck.append(strike(stack, trained.id, chance))
    client.wait(trained.id, timeout=120)

    struck_job = batches[0].id
    after_rows = chance.randrange(20, 200)
    eventually(
        lambda: (client.job(struck_job).rows_done or 0) >= after_rows,
        within=60,
        what=f"row {after_rows} of the batch job",
    )
    struck.append(strike(stack, struck_job, chance))
    for batch in batches:
        client.wait(batch.id, timeout=120)

    assert len(struck) == 2
    if fault in ENDS_ATTEMPTS:
        assert len(client.job(trained.id).attempts) >= 2, struck
        assert len(client.job(struck_job).attempts) >= 2, struck
        resumed = client.job(trained.id).summary or {}
        assert resumed["resumed_from"] is not None, "it began anew instead of from a checkpoint"
    for job in (trained, *batches):
        assert_nothing_stale_was_accepted(stack.store, job.id)
        eventually(
            lambda job=job: not processes_of_job(stack.data, job.id),
            within=10,
            what=f"the processes of {job.id} to be gone",
        )
    for batch in batches:
        assert_rows_delivered_once(client, batch.id, [f"p{i}" for i in range(600)])
    assert_devices_are_free(stack.store)
