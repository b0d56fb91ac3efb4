"""What the workers survive: killed and stopped processes, servers that go away, hints gone astray."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

import pytest
import redis

from gpuyard.local.servers import PostgresServer, ValkeyServer
from shared.messages import RUN_TASK, Hint
from shared.store import read
from shared.store.devices import register_device
from tests.stack import eventually
from tests.workers.fleet import Fleet, Monitor
from workers.inventory import take_stock

pytestmark = pytest.mark.chaos


def test_worker_killed_is_restarted_and_its_attempt_tried_again(
    new_fleet: Callable[..., Fleet], database: str, valkey_url: str
) -> None:
    fleet = new_fleet(database, valkey_url, lease_ttl="60")  # so that no rescue is quicker
    fleet.start_scheduler()
    fleet.start_host()
    job_id = fleet.train("deaf")
    rank = fleet.wait_until_set_up(job_id)
    left = set(fleet.rank_processes())
    assert {rank} < left
    killed = fleet.worker_pid("cpu0@one")
    os.kill(killed, signal.SIGKILL)
    # The successor ends the ranks before it registers; that ends the attempt, not its lease's end.
    eventually(lambda: len(fleet.attempts(job_id)) == 2, 15, lambda: fleet.story(job_id))
    assert not left & set(fleet.rank_processes())
    first = fleet.attempts(job_id)[0]
    assert (first.state, first.failure_class) == ("lost", "lost_worker")
    assert first.failure is not None
    assert first.failure["code"] == "worker_restarted"
    assert fleet.worker_pid("cpu0@one") != killed
    fleet.wait_for_event(job_id, "running")
    fleet.cancel(job_id)
    fleet.wait(job_id, "cancelled")


def test_nursery_killed_harms_no_running_attempt(fleet: Fleet) -> None:
    fleet.start_host()
    job_id = fleet.train("wait")
    fleet.wait_until_set_up(job_id)
    [nursery] = [p for p, name in fleet.processes().items() if name == "gpuyard-nursery"]
    os.kill(nursery, signal.SIGKILL)
    eventually(
        lambda: [p for p, n in fleet.processes().items() if n == "gpuyard-nursery" and p != nursery]
    )
    (fleet.data / "go").touch()
    fleet.wait(job_id, "succeeded")
    assert len(fleet.attempts(job_id)) == 1
    fleet.wait(fleet.train("quick"), "succeeded")


def test_supervisor_killed_leaves_nothing_and_is_tried_again(fleet: Fleet) -> None:
    fleet.start_host()
    job_id = fleet.train("deaf")
    fleet.wait_until_set_up(job_id)
    left = set(fleet.rank_processes())
    [supervisor] = [p for p, name in fleet.rank_processes().items() if name == "gpuyard-attempt"]
    os.kill(supervisor, signal.SIGKILL)
    eventually(lambda: len(fleet.attempts(job_id)) == 2)
    first = fleet.attempts(job_id)[0]
    assert first.failure is not None
    assert first.failure["code"] == "supervisor_killed"
    assert not left & set(fleet.rank_processes())


def test_worker_stopped_past_its_lease_can_write_nothing(fleet: Fleet) -> None:
    """The job is rescued and finished on another host; the first worker wakes up to nothing."""
    fleet.start_host("one")
    job_id = fleet.train("steps", hyperparameters={"max_steps": 60})
    fleet.wait_for_event(job_id, "checkpoint")
    worker = fleet.worker_pid("cpu0@one")
    os.kill(worker, signal.SIGSTOP)
    fleet.start_host("two")
    job = fleet.wait(job_id, "succeeded", within=40)
    first, second = fleet.attempts(job_id)
    assert first.failure is not None
    assert first.failure["code"] == "lease_expired"
    assert job.summary is not None
    assert 0 < job.summary["first"] < 60

    def everything() -> tuple[object, ...]:
        checkpoints = [c.id for c in fleet.store.call(read.list_checkpoints, job_id)]
        logs = [c.id for c in fleet.store.call(read.logs_after, job_id, 0, limit=10_000)]
        events = [event.id for event in fleet.events(job_id)]
        return fleet.job(job_id).model_dump(), checkpoints, logs, events

    before = everything()
    refused = fleet.log("one").read_text().count("stale write refused")
    os.kill(worker, signal.SIGCONT)
    # That it did try is part of the test: its rank went on and its reports waited in the channel.
    eventually(lambda: fleet.log("one").read_text().count("stale write refused") > refused)
    eventually(lambda: "cpu0@one" in live_devices(fleet))
    assert everything() == before
    owners = {c.attempt_id for c in fleet.store.call(read.list_checkpoints, job_id)}
    assert owners == {second.id}
    eventually(lambda: not fleet.rank_processes())
    fleet.wait(fleet.train("quick"), "succeeded")


def test_postgres_away_for_longer_than_the_lease_harms_no_run(
    new_fleet: Callable[..., Fleet],
    new_postgres: Callable[[], PostgresServer],
    valkey_url: str,
) -> None:
    postgres = new_postgres()
    fleet = new_fleet(postgres.url, valkey_url)
    fleet.start_scheduler()
    fleet.start_host()
    job_id = fleet.train("outlast")  # some 6 s of work
    eventually(lambda: fleet.job(job_id).progress is not None)
    postgres.stop()  # not killed: a test's Postgres does not sync what it commits
    pause(5.0)  # longer than the lease (3 s)
    postgres.start()
    fleet.wait(job_id, "succeeded", within=40)
    assert len(fleet.attempts(job_id)) == 1
    metrics = fleet.store.call(read.list_metrics, job_id)
    assert [metric.step for metric in metrics] == list(range(1, 301))
    assert len(fleet.store.call(read.list_checkpoints, job_id)) == 1


def test_worker_cut_off_for_too_long_gives_up(
    new_fleet: Callable[..., Fleet],
    new_postgres: Callable[[], PostgresServer],
    valkey_url: str,
) -> None:
    """After ``abandon_after`` its ranks end, also with Postgres away; the job is tried again."""
    postgres = new_postgres()
    fleet = new_fleet(postgres.url, valkey_url, abandon_after="4")
    fleet.start_scheduler()
    fleet.start_host()
    job_id = fleet.train("wait")
    fleet.wait_until_set_up(job_id)
    postgres.stop()
    assert fleet.rank_processes()
    eventually(lambda: not fleet.rank_processes(), 15)
    postgres.start()
    eventually(lambda: len(fleet.attempts(job_id)) == 2, 30, lambda: fleet.story(job_id))
    assert fleet.attempts(job_id)[0].failure_class == "lost_worker"
    (fleet.data / "go").touch()
    fleet.wait(job_id, "succeeded")


def test_broker_restarted_and_emptied_harms_nothing(
    new_fleet: Callable[..., Fleet], new_valkey: Callable[[], ValkeyServer], database: str
) -> None:
    valkey = new_valkey()
    fleet = new_fleet(database, valkey.url)
    fleet.start_scheduler()
    fleet.start_host()
    job_id = fleet.train("wait")
    fleet.wait_until_set_up(job_id)
    waiting = fleet.train("quick")
    valkey.kill()
    valkey.start()
    with redis.Redis.from_url(valkey.url) as client:
        client.flushall()
    (fleet.data / "go").touch()
    for each in (job_id, waiting):
        fleet.wait(each, "succeeded", within=40)
        assert len(fleet.attempts(each)) == 1


def test_hints_late_doubled_stale_and_senseless(fleet: Fleet) -> None:
    """A second device takes the strays while the first one runs the job. In Flower the task stays
    that of the run."""
    fleet.start_host("one", "--devices=cpu:2", devices=2)
    with fleet.celery() as client, Monitor(client) as flower:
        job_id = fleet.train("wait")
        fleet.wait_until_set_up(job_id)
        [attempt] = fleet.attempts(job_id)
        hint = Hint(job_id=job_id, attempt_id=attempt.id, token=attempt.token, rank=0)
        astray = [
            hint,  # doubled
            hint,
            hint.model_copy(update={"token": 99}),
            hint.model_copy(update={"rank": 5}),
            hint.model_copy(update={"attempt_id": "att_unknown"}),
            hint.model_copy(update={"job_id": "job_unknown"}),
        ]

        def send(stray: Hint) -> None:
            # Who invents a hint cannot know the id of the task that it would have.
            task_id = stray.task_id if stray == hint else None
            client.send_task(RUN_TASK, kwargs=stray.model_dump(), task_id=task_id, queue="cpu")

        def led_to_nothing() -> int:
            return fleet.log("one").read_text().count("leads to nothing")

        for stray in astray:
            send(stray)
        client.send_task(RUN_TASK, kwargs={"what": "is this"}, queue="cpu")
        eventually(lambda: led_to_nothing() == 6, 20, lambda: fleet.story(job_id))
        assert "leads to nothing: claimed" in fleet.log("one").read_text()
        assert flower.events_of(hint.task_id).count("task-started") == 1
        assert flower.state_of(hint.task_id) == "STARTED"
        (fleet.data / "go").touch()
        fleet.wait(job_id, "succeeded")
        send(hint)  # late
        eventually(lambda: led_to_nothing() == 7)
        eventually(lambda: flower.state_of(hint.task_id) == "SUCCESS")
    eventually(lambda: "no hint" in fleet.log("one").read_text())
    assert len(fleet.attempts(job_id)) == 1
    assert [event.type for event in fleet.events(job_id)].count("claimed") == 1
    assert "ERROR/MainProcess" not in fleet.log("one").read_text()


def test_flower_shows_class_and_message_of_a_failure(fleet: Fleet) -> None:
    fleet.start_host()
    with fleet.celery() as client, Monitor(client) as flower:
        job_id = fleet.train("crash", retry={"max_attempts": 1})
        fleet.wait(job_id, "failed")
        [attempt] = fleet.attempts(job_id)
        task_id = f"{attempt.id}.0"
        eventually(lambda: flower.state_of(task_id) == "FAILURE")
        event = flower.last_event_of(task_id)
    assert event["exception"].startswith("AttemptFailed('infrastructure: rank 0 ended with exit")
    assert "flux capacitor" in event["exception"]
    assert event["traceback"] == ""


def test_job_ends_while_the_broker_is_down(
    new_fleet: Callable[..., Fleet], new_valkey: Callable[[], ValkeyServer], database: str
) -> None:
    """The store knows at once; Flower hears of it when the broker is back."""
    valkey = new_valkey()
    fleet = new_fleet(database, valkey.url)
    fleet.start_scheduler()
    fleet.start_host()
    with fleet.celery() as client, Monitor(client) as flower:
        job_id = fleet.train("wait")
        fleet.wait_until_set_up(job_id)
        [attempt] = fleet.attempts(job_id)
        task_id = f"{attempt.id}.0"
        eventually(lambda: flower.state_of(task_id) == "STARTED")
    valkey.kill()
    (fleet.data / "go").touch()
    fleet.wait(job_id, "succeeded")
    assert fleet.free()
    valkey.start()
    fleet.wait(fleet.train("quick"), "succeeded", within=40)


def test_worker_whose_device_another_serves_ends(fleet: Fleet) -> None:
    fleet.start_host()
    before = fleet.worker_pid("cpu0@one")
    [device] = take_stock("one", "cpu:1")
    fleet.store.call(register_device, device.facts, 4711, "0")
    eventually(lambda: "another process serves" in fleet.log("one").read_text())
    # Its manager starts it anew, and that one is the latest.
    eventually(lambda: fleet.worker_pid("cpu0@one") not in (before, 4711), 30)
    fleet.wait(fleet.train("quick"), "succeeded")


def test_revoke_in_flower_cancels_the_job(fleet: Fleet) -> None:
    """Flower calls ``control.revoke``; store and events must say the same afterwards."""
    fleet.start_host()
    job_id = fleet.train("deaf")
    fleet.wait_until_set_up(job_id)
    [attempt] = fleet.attempts(job_id)
    task_id = f"{attempt.id}.0"
    with fleet.celery() as client, Monitor(client) as flower:
        client.control.revoke(task_id, terminate=True)
        eventually(lambda: "task-revoked" in flower.events_of(task_id), 15)
        assert flower.state_of(task_id) == "REVOKED"
    job = fleet.wait(job_id, "cancelled")
    assert job.cancel_reason == "revoked in Flower"
    assert not fleet.rank_processes()
    fleet.wait(fleet.train("quick"), "succeeded")


def test_worker_answers_while_it_runs_and_shows_its_device(fleet: Fleet) -> None:
    fleet.start_host("one", "--simulate=1xT4-16GB")
    job_id = fleet.train("wait")
    fleet.wait_until_set_up(job_id)
    with fleet.celery() as client:
        stats = client.control.inspect(timeout=3).stats()
    device = stats["gpu0@one"]["device"]
    assert device["class"] == "cuda.sm75.16g"
    assert device["simulated"]
    assert "simulated" in device["model"]
    assert device["runs"][0]["job_id"] == job_id
    assert device["runs"][0]["label"] == "train:tiny"
    (fleet.data / "go").touch()
    fleet.wait(job_id, "succeeded")


def live_devices(fleet: Fleet) -> list[str]:
    rows = fleet.store.call(read.list_devices)
    return [row.device.id for row in rows if row.seconds_silent < 1.5]


def pause(seconds: float) -> None:
    """An outage of that length; there is no event to wait for."""
    time.sleep(seconds)
