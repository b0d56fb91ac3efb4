"""Batch jobs that share one device and its engine."""

from __future__ import annotations

import os
import re
import signal
from collections import Counter
from collections.abc import Callable
from typing import Any

from shared.store import read
from tests.stack import eventually
from tests.workers.fleet import Fleet

DEVICES = 1
ALL = 10**6


def prompts(count: int, name: str = "row") -> list[dict[str, str]]:
    return [{"prompt": f"{name} {n}"} for n in range(count)]


def require_all_rows(fleet: Fleet, job_id: str, count: int, name: str = "ROW") -> None:
    """Each row is there once, in order, with its own answer."""
    found = [(row["row"], row["output"]["text"]) for row in fleet.results(job_id)]
    assert found == [(n, f"{name} {n}") for n in range(count)]


def runs(fleet: Fleet) -> list[str]:
    """The jobs that hold a seat of the one device."""
    [row] = fleet.store.call(read.list_devices)
    held = {
        lease.attempt_id
        for job_id, _ in row.runs
        for attempt in fleet.attempts(job_id)
        for lease in fleet.store.call(read.list_leases, [attempt.id])
        if lease.state == "held"
    }
    return [job_id for job_id, _ in row.runs if any(a.id in held for a in fleet.attempts(job_id))]


def sharing(fleet: Fleet, *jobs: str) -> None:
    """Wait until these jobs compute on the device together."""
    eventually(lambda: set(runs(fleet)) == set(jobs), 30, lambda: "".join(map(fleet.story, jobs)))


def engines(fleet: Fleet) -> set[int]:
    return {pid for pid, name in fleet.processes().items() if name == "gpuyard-rank"}


def test_jobs_share_a_device_and_its_engine(shared_fleet: Fleet) -> None:
    fleet = shared_fleet
    jobs = [fleet.infer(prompts(60, f"job{i}"), "gated", shard_rows=5) for i in range(3)]
    sharing(fleet, *jobs)
    assert len(engines(fleet)) == 1
    for job_id in jobs:
        fleet.open_gate(job_id, 20)
    for job_id in jobs:
        eventually(lambda: len(fleet.results(job_id)) >= 15, 30)  # noqa: B023
    assert set(runs(fleet)) == set(jobs), "none of them had to wait for another"
    for job_id in jobs:
        fleet.open_gate(job_id, ALL)
    for number, job_id in enumerate(jobs):
        fleet.wait(job_id, "succeeded")
        require_all_rows(fleet, job_id, 60, f"JOB{number}")
        assert len(fleet.begun(job_id)) == 60
        assert len(fleet.attempts(job_id)) == 1
    assert fleet.free()
    assert "joins" in fleet.wait_for_event(jobs[-1], "dispatched").message


def test_a_small_job_does_not_wait_for_a_large_one(shared_fleet: Fleet) -> None:
    fleet = shared_fleet
    large = fleet.infer(prompts(200), "gated", shard_rows=5)
    sharing(fleet, large)
    small = fleet.infer(prompts(1))
    fleet.wait(small, "succeeded")
    assert fleet.job(large).state == "running"
    assert len(fleet.results(large)) == 0
    fleet.open_gate(large, ALL)
    fleet.wait(large, "succeeded")
    require_all_rows(fleet, large, 200)


def test_each_job_has_its_own_lines_of_the_engines_log(shared_fleet: Fleet) -> None:
    fleet = shared_fleet
    jobs = [fleet.infer(prompts(10, f"job{i}"), "gated", shard_rows=5) for i in range(2)]
    sharing(fleet, *jobs)
    for job_id in jobs:
        fleet.open_gate(job_id, ALL)
        fleet.wait(job_id, "succeeded")
    for job_id, other in (jobs, jobs[::-1]):
        text = fleet.log_text(job_id)
        assert f"computes {job_id}" in text
        assert f"computes {other}" not in text
        assert not re.search(r"\[att_", text)


def test_cancel_ends_one_of_them(shared_fleet: Fleet) -> None:
    fleet = shared_fleet
    jobs = [fleet.infer(prompts(60), "gated", shard_rows=5) for _ in range(2)]
    sharing(fleet, *jobs)
    [engine] = engines(fleet)
    fleet.cancel(jobs[0])
    fleet.wait(jobs[0], "cancelled")
    sharing(fleet, jobs[1])
    fleet.open_gate(jobs[1], ALL)
    fleet.wait(jobs[1], "succeeded")
    require_all_rows(fleet, jobs[1], 60)
    assert engines(fleet) == {engine}, "the other one kept it"


def test_a_poisonous_row_costs_the_others_nothing_but_time(shared_fleet: Fleet) -> None:
    fleet = shared_fleet
    rows: list[Any] = prompts(40)
    rows[13] = {"prompt": "abort"}
    healthy = fleet.infer(prompts(300, "well"), "brisk", shard_rows=5)
    sharing(fleet, healthy)
    bad = fleet.infer(rows, shard_rows=8)
    job = fleet.wait(bad, "succeeded", within=60)
    assert job.summary is not None
    assert job.summary["errors"] == 1
    [error] = [row for row in fleet.results(bad) if row["error"]]
    assert (error["row"], error["error"]["code"]) == (13, "engine_died")
    fleet.wait(healthy, "succeeded", within=60)
    require_all_rows(fleet, healthy, 300, "WELL")
    assert [len(fleet.attempts(job_id)) for job_id in (healthy, bad)] == [1, 1]
    again = Counter(row for row, _ in fleet.begun(healthy))
    assert max(again.values()) <= 3, "what was beside it when an engine died, and once more alone"
    split = [e for e in fleet.events(healthy) if e.type == "shard_split"]
    assert not split, "no row of the other job was suspected for long"


def test_a_killed_engine_ends_no_attempt(shared_fleet: Fleet) -> None:
    fleet = shared_fleet
    jobs = [fleet.infer(prompts(60, f"job{i}"), "gated", shard_rows=5) for i in range(3)]
    sharing(fleet, *jobs)
    for _ in range(2):
        [engine] = engines(fleet)
        os.kill(engine, signal.SIGKILL)
        eventually(lambda: engines(fleet) - {engine}, 30)  # noqa: B023
    for job_id in jobs:
        fleet.open_gate(job_id, ALL)
    for number, job_id in enumerate(jobs):
        fleet.wait(job_id, "succeeded", within=60)
        require_all_rows(fleet, job_id, 60, f"JOB{number}")
        assert len(fleet.attempts(job_id)) == 1


def test_a_killed_worker_costs_each_an_attempt(shared_fleet: Fleet) -> None:
    fleet = shared_fleet
    jobs = [fleet.infer(prompts(60, f"job{i}"), "gated", shard_rows=5) for i in range(2)]
    sharing(fleet, *jobs)
    os.kill(fleet.worker_pid("cpu0@one"), signal.SIGKILL)
    for job_id in jobs:
        fleet.open_gate(job_id, ALL)
    for number, job_id in enumerate(jobs):
        fleet.wait(job_id, "succeeded", within=60)
        require_all_rows(fleet, job_id, 60, f"JOB{number}")
        assert len(fleet.attempts(job_id)) == 2


def test_a_training_comes_before_those_behind_it_and_is_alone(shared_fleet: Fleet) -> None:
    fleet = shared_fleet
    first = fleet.infer(prompts(60), "gated", shard_rows=5)
    sharing(fleet, first)
    training = fleet.train("wait")
    eventually(lambda: fleet.job(training).waiting_reason, 20)
    behind = fleet.infer(prompts(5))
    eventually(lambda: fleet.job(behind).waiting_reason, 20)
    assert runs(fleet) == [first]
    fleet.open_gate(first, ALL)
    fleet.wait(first, "succeeded")
    fleet.wait_until_set_up(training)
    assert runs(fleet) == [training]
    assert fleet.job(behind).state == "queued"
    assert not engines(fleet) - set(fleet.rank_processes())
    (fleet.data / "go").touch()
    fleet.wait(training, "succeeded")
    fleet.wait(behind, "succeeded")
    (fleet.data / "go").unlink()


def test_a_host_that_stops_asks_all_of_them_to_leave(
    new_fleet: Callable[..., Fleet], database: str, valkey_url: str
) -> None:
    fleet = new_fleet(database, valkey_url)
    fleet.start_scheduler()
    fleet.start_host("one")
    jobs = [fleet.infer(prompts(60, f"job{i}"), "gated", shard_rows=5) for i in range(2)]
    sharing(fleet, *jobs)
    assert fleet.stop_host("one") == 0
    assert not fleet.rank_processes()
    fleet.start_host("two")
    for job_id in jobs:
        fleet.open_gate(job_id, ALL)
    for number, job_id in enumerate(jobs):
        fleet.wait(job_id, "succeeded", within=60)
        require_all_rows(fleet, job_id, 60, f"JOB{number}")
        assert [a.failure_class for a in fleet.attempts(job_id)] == ["preempted", None]
