"""Gangs over two hosts, one of which is lost: the training goes on with what is left, or what comes back."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import pytest

from shared.resolved import ResolvedInput
from shared.store import read
from tests.stack import eventually
from tests.training.harness import make_bert, make_rows, write_rows
from tests.workers import networks
from tests.workers.fleet import Fleet

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]
HOSTS = ("one", "two")
_PROCESSORS = sorted(os.sched_getaffinity(0))
ONE_PROCESSOR = [("taskset", "-c", str(_PROCESSORS[host % len(_PROCESSORS)])) for host in (0, 1)]
"""Runs a host on a processor of its own: else each takes those of the machine for its own."""
LOOPBACK = ("127.0.0.2", "127.0.0.3")


@pytest.fixture
def ready(new_fleet: Callable[..., Fleet], database: str, valkey_url: str) -> Fleet:
    """A fleet with a scheduler, data and a tiny model, and no host yet."""
    # Long enough that loading on a busy machine is no lost lease.
    fleet = new_fleet(database, valkey_url, lease_ttl="15", claim_timeout="60")
    fleet.start_scheduler()
    write_rows(fleet.data / "train.jsonl", make_rows(256, seed=1))
    make_bert(fleet.data / "bert")
    return fleet


def train(fleet: Fleet, devices: Any) -> str:
    return fleet.submit(
        {
            "kind": "train",
            "task": "text-classification",
            "data": {"train": "x"},
            "resources": {"devices": devices},
            "hyperparameters": {
                "batch_size": 16, "micro_batch_size": 2, "epochs": 8, "learning_rate": 3e-3,
            },
            "checkpoint": {"every_steps": 4},
        },
        {"train": ResolvedInput(path=str(fleet.data / "train.jsonl"), size=1)},
        model=str(fleet.data / "bert"),
    )  # fmt: skip


def weights(fleet: Fleet, job_id: str) -> str:
    artifacts = fleet.store.call(read.list_artifacts, job_id)
    return next(a.sha256 for a in artifacts if a.name.endswith("model.safetensors"))


def lose_a_host_in(fleet: Fleet, job_id: str) -> None:
    fleet.wait_for_event(job_id, "checkpoint", within=90)
    fleet.lose_host("two")
    eventually(
        lambda: fleet.attempts(job_id)[0].failure is not None,
        60,
        lambda: f"the first attempt to end: {fleet.story(job_id)}",
    )


def test_it_goes_on_with_the_devices_that_are_left(ready: Fleet) -> None:
    """Host ``two`` is gone for good: the rest of the training is that of one device, and the model in
    every bit that of two, which is that of one."""
    fleet, either = ready, {"min": 1, "max": 2}
    for name, inside, address in zip(HOSTS, ONE_PROCESSOR, LOOPBACK, strict=True):
        fleet.start_host(name, "--devices=cpu:1", real=True, inside=inside, rank_host=address)
    on_two = train(fleet, either)
    fleet.wait(on_two, "succeeded", within=120)
    lost = train(fleet, either)
    lose_a_host_in(fleet, lost)
    summary = fleet.wait(lost, "succeeded", within=150).summary
    assert summary is not None and summary["resumed_from"]["step"] >= 4
    assert [attempt.world_size for attempt in fleet.attempts(lost)] == [2, 1], fleet.story(lost)
    messages = [e.message for e in fleet.events(lost) if e.type == "dispatched"]
    assert "2 of 1 to 2 devices, 2 being free" in messages[0]
    assert "1 of 1 to 2 devices, 1 being free" in messages[1]
    notices = [event.message for event in fleet.events(lost) if event.type == "notice"]
    assert len(notices) == 1 and notices[0].endswith("the result is the same"), notices
    on_one = train(fleet, either)
    fleet.wait(on_one, "succeeded", within=120)
    assert weights(fleet, lost) == weights(fleet, on_two) == weights(fleet, on_one)


@pytest.mark.skipif(not networks.can_be_made(), reason="needs root and `ip netns`")
def test_a_gang_over_two_networks_goes_on_when_a_host_is_back(ready: Fleet) -> None:
    fleet = ready
    port = urlsplit(fleet.settings.broker_url).port
    assert port is not None
    with networks.TwoNetworks(port) as two:

        def start(host: int) -> None:
            fleet.start_host(
                HOSTS[host],
                "--devices=cpu:1",
                real=True,
                inside=(*two.inside[host], *ONE_PROCESSOR[host]),
                rank_host=two.addresses[host],
            )

        start(0)
        start(1)
        undisturbed = train(fleet, 2)
        fleet.wait(undisturbed, "succeeded", within=120)
        lost = train(fleet, 2)
        lose_a_host_in(fleet, lost)
        eventually(lambda: "waits for 1 of 2 devices" in (fleet.job(lost).waiting_reason or ""), 60)
        start(1)
        summary = fleet.wait(lost, "succeeded", within=150).summary
        assert summary is not None and summary["resumed_from"]["step"] >= 4
        assert [attempt.world_size for attempt in fleet.attempts(lost)] == [2, 2]
        assert weights(fleet, lost) == weights(fleet, undisturbed)
        leases = fleet.store.call(read.list_leases, [fleet.attempts(lost)[-1].id])
        assert {lease.device_id for lease in leases} == {"cpu0@one", "cpu0@two"}
        assert [fleet.stop_host(name) for name in HOSTS] == [0, 0]
