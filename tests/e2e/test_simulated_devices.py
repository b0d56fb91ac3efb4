"""Routing on a fleet of simulated GPUs: the least capable class that fits, and reasons."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from shared.errors import GpuyardError, Unsatisfiable
from tests.e2e.stack_process import StackProcess
from tests.stack import eventually

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

T4, A100, H100 = "cuda.sm75.16g", "cuda.sm80.80g", "cuda.sm90.80g"


@pytest.fixture(scope="module")
def fleet(start_stack: Callable[..., StackProcess]) -> StackProcess:
    return start_stack(simulate="1xT4-16GB,1xA100-80GB,1xH100-80GB")


def job(**resources: Any) -> dict[str, Any]:
    return {
        "kind": "infer",
        "task": "text-generation",
        "model": "tinyllama",
        "rows": [{"prompt": "w1 w2"}],
        "generation": {"max_new_tokens": 2},
        "resources": resources,
    }


def queues(fleet: StackProcess, job_id: str) -> list[str]:
    events = [e for e in fleet.client.events(job_id, follow=False) if e.type == "dispatched"]
    return list(events[-1].data["queues"])


@pytest.mark.parametrize(
    ("resources", "queue"),
    [
        ({}, T4),
        ({"memory_gb": 14}, T4),
        ({"features": ["bf16"]}, A100),
        ({"memory_gb": 40}, A100),
        ({"min_compute_capability": 8.0}, A100),
        ({"min_compute_capability": 9.0}, H100),
        ({"features": ["fp8"]}, H100),
    ],
)
def test_the_least_capable_class_that_fits(
    fleet: StackProcess, resources: dict[str, Any], queue: str
) -> None:
    submitted = fleet.client.submit(job(**resources))
    fleet.client.wait(submitted.id, timeout=90)
    assert queues(fleet, submitted.id) == [queue]


def test_devices_say_that_they_are_simulated(fleet: StackProcess) -> None:
    devices = fleet.client.devices()
    assert {d.queue for d in devices} == {T4, A100, H100}
    assert all(d.simulated for d in devices)


def test_more_devices_than_the_fleet_has_waits_with_that_reason(fleet: StackProcess) -> None:
    spec = {
        "kind": "infer", "task": "text-generation", "model": "tinyllama",
        "rows": [{"prompt": "w1"}], "resources": {"memory_gb": 200},
    }  # fmt: skip
    with pytest.raises(Unsatisfiable, match="200"):
        fleet.client.submit(spec)


def test_a_gang_larger_than_the_fleet_waits_and_fail_fast_refuses(
    fleet: StackProcess, labelled: dict[str, Any]
) -> None:
    spec = {
        "kind": "train", "task": "text-classification", "model": "tinybert",
        "data": {"train": str(labelled["train"])}, "resources": {"devices": 8},
        "hyperparameters": {"batch_size": 32},
    }  # fmt: skip
    waiting = fleet.client.submit(spec, upload=True)
    reason = eventually(
        lambda: fleet.client.job(waiting.id).waiting_reason, within=30, what="a reason to wait"
    )
    assert "8" in reason
    assert "3" in reason
    fleet.client.cancel(waiting.id)
    with pytest.raises(GpuyardError, match="8"):
        fleet.client.submit({**spec, "fail_fast": True}, upload=True)
