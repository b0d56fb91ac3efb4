"""A device whose worker is well, heartbeats and all, but hears nothing of the broker."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

from shared.capability import device_queue
from shared.store import read
from shared.tables import Device
from tests.stack import eventually
from tests.workers.fleet import Fleet

DEAF = "cpu0@one"


def test_a_gang_gets_away_from_a_deaf_device_and_a_restart_clears_it(
    new_fleet: Callable[..., Fleet], database: str, valkey_url: str
) -> None:
    fleet = new_fleet(database, valkey_url, claim_timeout="10")
    fleet.start_scheduler()
    fleet.start_host("one", "--devices=cpu:3", devices=3)
    deafen(fleet)

    job_id = fleet.train("quick", devices=2)
    fleet.wait(job_id, "succeeded", within=120)
    dispatched = [e.data["devices"] for e in fleet.events(job_id) if e.type == "dispatched"]
    assert DEAF in dispatched[0], "it was drawn, being the first"
    assert DEAF not in dispatched[-1]
    suspected = [e.data["device"] for e in fleet.events(job_id) if e.type == "device_suspect"]
    assert DEAF in suspected
    assert device(fleet).suspect_reason is not None

    before = fleet.worker_pid(DEAF)
    os.kill(before, signal.SIGKILL)
    eventually(lambda: fleet.worker_pid(DEAF) != before, 60)
    assert device(fleet).suspect_until is None
    fleet.wait(
        fleet.train("quick", devices=3, hyperparameters={"batch_size": 3}), "succeeded", within=120
    )


def deafen(fleet: Fleet) -> None:
    """Take its consumer off both of its queues; it goes on beating."""
    with fleet.celery() as client:
        for queue in ("cpu", device_queue(DEAF)):
            (reply,) = client.control.cancel_consumer(
                queue, destination=[DEAF], reply=True, timeout=30, limit=1
            )
            assert "ok" in reply[DEAF]
        inspect = client.control.inspect([DEAF], timeout=30, limit=1)
        eventually(lambda: inspect.active_queues() == {DEAF: []}, 30)


def device(fleet: Fleet) -> Device:
    return next(row.device for row in fleet.store.call(read.list_devices) if row.device.id == DEAF)
