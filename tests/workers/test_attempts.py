"""Attempts on one device: what a rank reports reaches the store, and every end is told rightly."""

from __future__ import annotations

import re

import pytest

from shared.store import read
from tests.stack import eventually
from tests.workers.fleet import Fleet

DEVICES = 2


def test_training_job_from_hint_to_artifact(shared_fleet: Fleet) -> None:
    job_id = shared_fleet.train("quick")
    job = shared_fleet.wait(job_id, "succeeded")
    assert job.summary is not None
    assert (job.summary["steps"], set(job.summary)) == (2, {"steps", "device_seconds"})
    assert job.progress is not None
    assert (job.progress["step"], job.progress["total_steps"]) == (2, 2)
    types = [event.type for event in shared_fleet.events(job_id)]
    assert types == [
        *["submitted", "dispatched", "claimed", "running", "ready"],
        *["notice", "checkpoint", "succeeded"],
    ]
    [checkpoint] = shared_fleet.store.call(read.list_checkpoints, job_id)
    assert (shared_fleet.data / checkpoint.path / "state").read_text() == "state of step 1"
    [artifact] = shared_fleet.store.call(read.list_artifacts, job_id)
    assert artifact.name == "model/weights.bin"
    assert (shared_fleet.data / artifact.path).read_bytes() == b"weights"
    [metric] = shared_fleet.store.call(read.list_metrics, job_id)
    assert metric.values == {"loss": 0.5}
    text = shared_fleet.log_text(job_id)
    assert text.startswith("rank 0 of 1 on cpu")
    assert text.endswith("a last line without its end")
    assert shared_fleet.free()
    eventually(lambda: not shared_fleet.rank_processes())


@pytest.mark.parametrize(
    ("name", "failure_class", "code", "says", "attempts"),
    [
        ("crash", "infrastructure", "rank_exited", "flux capacitor is empty", 3),
        ("leave", "infrastructure", "rank_ended_early", "without saying", 3),
        ("blame_user", "user_error", "bad_column", "it is bad_column", 1),
        ("lie", "infrastructure", "report_refused", "/etc is not below", 3),
    ],
)
def test_failures_are_classified(
    shared_fleet: Fleet, name: str, failure_class: str, code: str, says: str, attempts: int
) -> None:
    job = shared_fleet.wait(shared_fleet.train(name), "failed")
    assert job.failure_class == failure_class
    assert job.failure is not None
    assert job.failure["code"] == code
    assert says in job.failure["message"]
    assert len(shared_fleet.attempts(job.id)) == attempts


def test_rank_killed_is_classified_and_resumed(shared_fleet: Fleet) -> None:
    job = shared_fleet.wait(shared_fleet.train("die_once"), "succeeded")
    first, second = shared_fleet.attempts(job.id)
    assert first.failure_class == "infrastructure"
    assert first.failure is not None
    assert first.failure["code"] == "rank_killed"
    assert "SIGKILL" in first.failure["message"]
    assert second.state == "succeeded"
    assert job.summary is not None
    assert job.summary["resumed"] == [7]
    # What it left unfinished is gone, and what it had finished is there.
    [checkpoint] = shared_fleet.store.call(read.list_checkpoints, job.id)
    folders = (shared_fleet.data / checkpoint.path).parent.iterdir()
    assert [folder.name for folder in folders] == ["step-7"]


def test_old_checkpoints_are_forgotten_and_deleted(shared_fleet: Fleet) -> None:
    job_id = shared_fleet.train("steps", hyperparameters={"max_steps": 6}, checkpoint={"keep": 2})
    shared_fleet.wait(job_id, "succeeded")
    kept = shared_fleet.store.call(read.list_checkpoints, job_id)
    assert [checkpoint.step for checkpoint in kept] == [6, 5]
    folders = (shared_fleet.data / kept[0].path).parent.iterdir()
    assert sorted(folder.name for folder in folders) == ["step-5", "step-6"]


def test_deadline_ends_the_attempt_for_good(shared_fleet: Fleet) -> None:
    job_id = shared_fleet.train("deaf", timeout_seconds=1.5)
    job = shared_fleet.wait(job_id, "failed")
    assert job.failure_class == "deadline"
    assert len(shared_fleet.attempts(job_id)) == 1
    eventually(
        lambda: not shared_fleet.rank_processes(), 5, lambda: str(shared_fleet.rank_processes())
    )


def test_cancel_while_running_frees_the_device_in_seconds(shared_fleet: Fleet) -> None:
    job_id = shared_fleet.train("deaf")
    shared_fleet.wait_until_set_up(job_id)
    assert "gpuyard-rank" in shared_fleet.rank_processes().values()
    shared_fleet.cancel(job_id)
    # end_grace is 2 s, and the rank ignores SIGTERM; the order itself comes by NOTIFY.
    job = shared_fleet.wait(job_id, "cancelled", within=6)
    assert job.cancel_reason == "by the test"
    assert shared_fleet.free()
    assert not shared_fleet.rank_processes()
    shared_fleet.wait(shared_fleet.train("quick"), "succeeded")


def test_log_arrives_complete(shared_fleet: Fleet) -> None:
    job_id = shared_fleet.train("chatty")
    shared_fleet.wait(job_id, "succeeded")
    lines = shared_fleet.log_text(job_id).splitlines()
    assert lines == [f"line {n} äöü ☃ {'x' * (n % 20)}" for n in range(20_000)]


def test_log_in_the_store_is_limited(new_fleet, database: str, valkey_url: str) -> None:  # type: ignore[no-untyped-def]
    fleet = new_fleet(database, valkey_url, max_log_bytes="100000")
    fleet.start_scheduler()
    fleet.start_host()
    job_id = fleet.train("chatty")
    fleet.wait(job_id, "succeeded")
    text = fleet.log_text(job_id)
    assert 100_000 <= len(text.encode()) < 101_000
    where = re.search(r"only in (\S+)\]$", text.strip())
    assert where is not None
    assert len(open(where[1]).read().splitlines()) == 20_000  # noqa: PTH123, SIM115


def test_gang_of_two_meets_and_finishes(shared_fleet: Fleet) -> None:
    job_id = shared_fleet.train("gang", devices=2)
    shared_fleet.wait_until_set_up(job_id)
    go = shared_fleet.data / "go"
    go.touch()
    shared_fleet.wait(job_id, "succeeded")
    go.unlink()
    for rank in (0, 1):
        assert f"rank {rank} joins 127.0.0.1:4711" in shared_fleet.log_text(job_id, rank)


def test_gang_tells_the_cause_and_not_the_peer_that_noticed(shared_fleet: Fleet) -> None:
    job_id = shared_fleet.train("lose_a_peer", devices=2)
    shared_fleet.wait(job_id, "succeeded")
    first, _ = shared_fleet.attempts(job_id)
    assert first.failure is not None
    assert first.failure["code"] == "out_of_memory"


def test_cancel_of_a_gang_ends_all_ranks(shared_fleet: Fleet) -> None:
    job_id = shared_fleet.train("gang", devices=2)
    shared_fleet.wait_until_set_up(job_id)
    shared_fleet.cancel(job_id)
    shared_fleet.wait(job_id, "cancelled", within=6)
    assert not shared_fleet.rank_processes()
    assert shared_fleet.free()
