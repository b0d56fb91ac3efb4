"""Many small jobs: store, broker and Flower agree on every one of them."""

from __future__ import annotations

import pytest
import redis

from tests.stack import eventually
from tests.workers.fleet import Fleet, Monitor

DEVICES = 2


@pytest.mark.slow
def test_store_broker_and_flower_agree(shared_fleet: Fleet) -> None:
    fleet = shared_fleet
    with fleet.celery() as client, Monitor(client) as flower:
        jobs = [fleet.infer([{"prompt": f"{n}"}]) for n in range(60)]
        jobs += [fleet.train("quick", devices=1 + n % 2) for n in range(6)]
        cancelled = fleet.train("wait")
        jobs += [fleet.infer([{"prompt": f"{n}"}]) for n in range(20)]
        fleet.wait_until_set_up(cancelled, within=90)
        fleet.cancel(cancelled)
        for job_id in jobs:
            fleet.wait(job_id, "succeeded", within=120)
        fleet.wait(cancelled, "cancelled")
        for job_id in [*jobs, cancelled]:
            wanted = "SUCCESS" if job_id != cancelled else "REVOKED"
            [attempt] = fleet.attempts(job_id)
            for rank in range(attempt.world_size):
                task_id = f"{attempt.id}.{rank}"
                eventually(
                    lambda: flower.state_of(task_id) == wanted,  # noqa: B023 - called at once
                    10,
                    lambda: f"{wanted}: {flower.events_of(task_id)}",  # noqa: B023
                )
    with redis.Redis.from_url(fleet.settings.broker_url) as broker:
        for queue in ("cpu", "device.cpu0@one", "device.cpu1@one"):
            assert broker.llen(queue) == 0
        assert broker.hlen("unacked") == 0
    assert fleet.free()
