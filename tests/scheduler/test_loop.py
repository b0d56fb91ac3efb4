"""The whole scheduler on a real Postgres and a real Valkey: what lands on which queue, and why not."""

from __future__ import annotations

import base64
import json
import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis
from sqlalchemy import text

from gpuyard.local.servers import PostgresServer, ValkeyServer
from scheduler.loop import Scheduler
from shared.capability import GIB
from shared.errors import Unavailable
from shared.lifecycle import JobState
from shared.messages import RUN_TASK, Hint
from shared.resolved import Requirements
from shared.store import Store
from shared.store.cancel import cancel_job
from shared.store.read import events_after
from tests.stack import eventually
from tests.store import world

Start = Callable[..., Scheduler]
FAST = {
    "GPUYARD_RERING_EVERY": 0.3,
    "GPUYARD_TICK_EVERY": 0.2,
    "GPUYARD_LEADER_TTL": 4,
    "GPUYARD_DEVICE_TIMEOUT": 600,
}


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts schedulers in threads; all end with the test."""
    running: list[tuple[Scheduler, threading.Thread]] = []

    def make(store: Store, broker_url: str, **changed: Any) -> Scheduler:
        options = {name.lower().removeprefix("gpuyard_"): value for name, value in FAST.items()}
        settings = world.settings(store.url, broker_url, **{**options, **changed})
        scheduler = Scheduler(Store(store.url, pool_size=4), settings)
        thread = threading.Thread(target=scheduler.run, daemon=True)
        thread.start()
        running.append((scheduler, thread))
        return scheduler

    yield make
    for scheduler, thread in running:
        scheduler.stop()
        thread.join(timeout=20)
        assert not thread.is_alive(), "a scheduler did not end"


def queued(broker_url: str) -> dict[str, list[Hint]]:
    """What is in the broker: the hints by queue, of all priorities."""
    found: dict[str, list[Hint]] = {}
    with redis.Redis.from_url(broker_url) as client:
        for key in client.scan_iter():
            if client.type(key) != b"list":
                continue
            queue = key.decode().partition("\x06\x16")[0]
            for raw in client.lrange(key, 0, -1):
                message = json.loads(raw)
                assert message["headers"]["task"] == RUN_TASK
                args, kwargs, _ = json.loads(base64.b64decode(message["body"]))
                hint = Hint.model_validate(kwargs)
                assert (args, message["headers"]["id"]) == ([], hint.task_id)
                assert hint.job_id in message["headers"]["argsrepr"]
                assert message["headers"]["shadow"] == "train:tiny"
                found.setdefault(queue, []).append(hint)
    return found


def queue_of(broker_url: str, job_id: str) -> str | None:
    for queue, hints in queued(broker_url).items():
        if any(hint.job_id == job_id for hint in hints):
            return queue
    return None


def has_reason(store: Store, job_id: str, part: str) -> str | None:
    reason = world.job_of(store, job_id).waiting_reason
    return reason if reason and part in reason else None


def lands_on(broker_url: str, job_id: str) -> str:
    return eventually(
        lambda: queue_of(broker_url, job_id), what=f"a hint of {job_id} in the broker"
    )


def test_jobs_land_on_the_least_capable_class_that_fits(
    store: Store, valkey_url: str, start: Start
) -> None:
    world.register_simulated(store, "1xT4-16GB,2xA100-80GB,1xH100-80GB")
    start(store, valkey_url)
    any_device = world.submit(store)
    assert lands_on(valkey_url, any_device) == "cuda.sm75.16g"
    bf16 = world.submit(store, world.needs(features=("bf16",)))
    assert lands_on(valkey_url, bf16) == "cuda.sm80.80g"
    memory = world.submit(store, world.needs(memory_bytes=40 * GIB, memory_is_estimate=False))
    assert lands_on(valkey_url, memory) == "cuda.sm80.80g"
    hopper = world.submit(store, world.needs(features=("fp8",)))
    assert lands_on(valkey_url, hopper) == "cuda.sm90.80g"


@pytest.mark.parametrize(
    ("asked", "missed"),
    [
        (world.needs(features=("bf16",)), "needs bf16, sm75 has none"),
        (world.needs(memory_bytes=40 * GIB), "needs about 40 GB, has 16 GB"),
    ],
)
def test_never_on_the_t4(
    store: Store, valkey_url: str, start: Start, asked: Requirements, missed: str
) -> None:
    """Not while the T4 is all there is, and not while it is all that is free."""
    world.register_simulated(store, "1xT4-16GB")
    start(store, valkey_url)
    job_id = world.submit(store, asked)
    eventually(lambda: has_reason(store, job_id, missed))
    (a100,) = world.register_simulated(store, "1xA100-80GB", host="b")
    first = lands_on(valkey_url, job_id)
    assert first == "cuda.sm80.80g"
    second = world.submit(store, asked)
    reason = eventually(lambda: has_reason(store, second, "waits for"))
    assert reason == "waits for a device of class cuda.sm80.80g: 0 free, 1 busy"
    store.call(cancel_job, job_id, "test")
    assert lands_on(valkey_url, second) == "cuda.sm80.80g"
    assert "cuda.sm75.16g" not in queued(valkey_url)
    told = [e.message for e in store.call(events_after, second, 0) if e.type == "dispatched"]
    assert told == [
        f"attempt 1 goes to {a100}: cuda.sm80.80g, the least capable that fits"
    ]  # fmt: skip


def test_a_gang_gets_a_hint_for_each_device(store: Store, valkey_url: str, start: Start) -> None:
    world.register_simulated(store, "2xA100-80GB")
    start(store, valkey_url)
    job_id = world.submit(store, world.needs(devices=2))
    both = {"device.a100-0@a", "device.a100-1@a"}
    eventually(lambda: both <= set(queued(valkey_url)), what="hints of both ranks")
    ranks = {q: h[0].rank for q, h in queued(valkey_url).items() if h[0].job_id == job_id}
    assert sorted(ranks.values()) == [0, 1]
    assert set(ranks) == both


def test_what_waits_says_why(store: Store, valkey_url: str, start: Start) -> None:
    start(store, valkey_url)
    job_id = world.submit(store)
    eventually(lambda: has_reason(store, job_id, "no worker has registered"))
    world.register_simulated(store, "2xT4-16GB")
    lands_on(valkey_url, job_id)
    assert world.job_of(store, job_id).waiting_reason is None
    four = world.submit(store, world.needs(devices=4))
    eventually(lambda: has_reason(store, four, "needs 4 devices, the fleet has 2"))
    two = world.submit(store, world.needs(devices=2))
    eventually(lambda: has_reason(store, two, "waits for 1 of 2 devices"))
    small = world.submit(store)
    eventually(lambda: has_reason(store, small, "1 kept for jobs ahead; 1 job is ahead"))


def test_strict_priority_then_age(store: Store, valkey_url: str, start: Start) -> None:
    old = world.submit(store)
    urgent = world.submit(store, priority=5)
    new = world.submit(store)
    world.register_simulated(store, "1xT4-16GB")
    start(store, valkey_url)
    for job_id in (urgent, old, new):
        lands_on(valkey_url, job_id)
        store.call(cancel_job, job_id, "test")


def test_an_unclaimed_hint_is_sent_again_with_the_same_id(
    store: Store, new_valkey: Callable[[], ValkeyServer], start: Start
) -> None:
    server = new_valkey()
    world.register_simulated(store, "1xT4-16GB")
    start(store, server.url)
    job_id = world.submit(store)
    lands_on(server.url, job_id)
    before = queued(server.url)["cuda.sm75.16g"][0]
    with redis.Redis.from_url(server.url) as client:
        client.flushall()
    lands_on(server.url, job_id)
    assert queued(server.url)["cuda.sm75.16g"][0] == before
    assert len(world.hints(store, before.attempt_id)) == 1


def test_a_claimed_hint_is_not_sent_again(store: Store, valkey_url: str, start: Start) -> None:
    workers = world.register_simulated(store, "1xT4-16GB")
    start(store, valkey_url)
    job_id = world.submit(store)
    lands_on(valkey_url, job_id)
    (hint,) = {h.task_id: h for h in queued(valkey_url)["cuda.sm75.16g"]}.values()
    world.claim(store, hint, "t4-0@a", workers["t4-0@a"])
    other = world.submit(store, world.needs(devices=1))
    with redis.Redis.from_url(valkey_url) as client:
        client.flushdb()
    # Three rounds of ringing and more pass until the other job's reason is there and the list is read.
    eventually(lambda: has_reason(store, other, "0 free, 1 busy"))
    with redis.Redis.from_url(valkey_url) as client:
        assert client.blpop(["cuda.sm75.16g", "cuda.sm75.16g\x06\x163"], timeout=1) is None


@pytest.mark.timeout(120)
def test_a_broker_that_is_down_and_comes_back(
    store: Store,
    new_valkey: Callable[[], ValkeyServer],
    start: Start,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "scheduler")
    server = new_valkey()
    url = server.url
    server.kill()
    world.register_simulated(store, "3xT4-16GB")
    start(store, url)
    jobs = [world.submit(store) for _ in range(3)]
    eventually(
        lambda: all(world.job_of(store, j).state == JobState.DISPATCHED for j in jobs),
        what="dispatch goes on without a broker",
    )
    eventually(lambda: "the broker cannot be reached" in caplog.text)
    server.start()
    for job_id in jobs:
        lands_on(url, job_id)
    assert caplog.text.count("the broker cannot be reached") == 1, "said once an outage"
    eventually(lambda: "the broker is back" in caplog.text)


@pytest.mark.timeout(180)
def test_postgres_is_down_at_the_start_and_goes_away_later(
    new_postgres: Callable[[], PostgresServer],
    valkey_url: str,
    start: Start,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    server = new_postgres()
    store = Store(server.url)
    server.stop()
    start(store, valkey_url)
    eventually(lambda: "waiting: Postgres cannot be reached" in caplog.text)
    server.start()
    world.register_simulated(store, "2xT4-16GB")
    first = world.submit(store)
    lands_on(valkey_url, first)
    server.kill()
    eventually(lambda: "the job store cannot be reached" in caplog.text)
    server.start()
    second = eventually(lambda: try_to_submit(store), within=30)
    assert lands_on(valkey_url, second) == "cuda.sm75.16g"
    store.close()


def try_to_submit(store: Store) -> str | None:
    try:
        return world.submit(store)
    except Unavailable:
        return None


def test_a_lost_lease_is_rescued_and_the_job_goes_on(
    store: Store, valkey_url: str, start: Start
) -> None:
    workers = world.register_simulated(store, "2xT4-16GB")
    start(store, valkey_url, lease_ttl=1.0, lease_renew_every=0.3)
    job_id = world.submit(store)
    queue = lands_on(valkey_url, job_id)
    hint = queued(valkey_url)[queue][0]
    device = "t4-0@a"
    holder = world.claim(store, hint, device, workers[device], ttl=1.0).holder
    eventually(
        lambda: world.job_of(store, job_id).token == 2, what="a second attempt after the rescue"
    )
    with store.transaction() as session:
        query = text("SELECT failure_class FROM attempts WHERE id = :id")
        assert session.execute(query, {"id": holder.attempt_id}).scalar_one() == "lost_worker"


def test_a_tick_that_fails_does_not_end_the_loop(
    store: Store, valkey_url: str, start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    world.register_simulated(store, "1xT4-16GB")
    broken = world.submit(store)
    with store.transaction() as session:
        session.execute(text("UPDATE jobs SET resolved = '{\"model\": {}}'"))
    start(store, valkey_url)
    eventually(lambda: "a tick failed" in caplog.text)
    store.call(cancel_job, broken, "test")
    assert lands_on(valkey_url, world.submit(store)) == "cuda.sm75.16g"


def test_a_burst_is_answered_in_few_ticks(store: Store, valkey_url: str, start: Start) -> None:
    scheduler = start(store, valkey_url, tick_every=30.0)
    ticks = 0
    tick = scheduler.tick

    def counted() -> None:
        nonlocal ticks
        ticks += 1
        tick()

    scheduler.tick = counted  # type: ignore[method-assign]
    jobs = [world.submit(store) for _ in range(100)]
    eventually(lambda: has_reason(store, jobs[-1], "no worker"))
    assert 1 <= ticks < 60
