"""A batch job over several devices: it grows and shrinks while it runs, and outlives its ranks."""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlmodel import col, select

from shared.resolved import ResolvedInput
from shared.store import read
from shared.tables import Lease, Shard
from tests.stack import eventually
from tests.training.harness import make_bert, make_rows, write_rows
from tests.workers.fleet import Fleet

ALL = 10**6


def prompts(count: int) -> list[dict[str, str]]:
    return [{"prompt": f"row {n}"} for n in range(count)]


def require_all_rows(fleet: Fleet, job_id: str, count: int) -> None:
    """Each row is there once, in order, with its own answer."""
    found = [(row["row"], row["output"]["text"]) for row in fleet.results(job_id)]
    assert found == [(n, f"ROW {n}") for n in range(count)]


def grown(fleet: Fleet, job_id: str, devices: int) -> list[Lease]:
    """Wait until so many devices compute the job; their leases."""

    def held() -> list[Lease]:
        attempts = [attempt.id for attempt in fleet.attempts(job_id)]
        leases = fleet.store.call(read.list_leases, attempts)
        return [lease for lease in leases if lease.state == "held"]

    return eventually(
        lambda: held() if len(held()) == devices else None, 60, lambda: fleet.story(job_id)
    )


def leased_rows(fleet: Fleet, job_id: str, ranks: int) -> int:
    """Wait until so many ranks have leased shards; the end of the last of these."""

    def look() -> int:
        with fleet.store.transaction() as session:
            of_job = select(Shard).where(
                Shard.job_id == job_id, col(Shard.leased_rank).is_not(None)
            )
            leased = [s for s in session.exec(of_job).all() if s.committed_at is None]
        if len({s.leased_rank for s in leased}) < ranks:
            return 0
        return max(s.first_row + s.rows for s in leased)

    return eventually(look, 60, lambda: fleet.story(job_id))


def has_heard(fleet: Fleet, job_id: str, rank: int) -> None:
    """Wait until the rank knows what was asked of it by now: it learns that when it renews its lease. Of two
    renewals from now on the first is answered for certain, and read, when the second comes."""

    def renewed() -> Any:
        leases = fleet.store.call(read.list_leases, [fleet.attempts(job_id)[-1].id])
        return next(lease.expires_at for lease in leases if lease.rank == rank)

    for _ in range(2):
        before = renewed()
        eventually(lambda then=before: renewed() != then, 60, lambda: fleet.story(job_id))


def told(fleet: Fleet, job_id: str) -> Counter[str]:
    return Counter(event.type for event in fleet.events(job_id))


def test_devices_share_a_job_and_one_that_comes_later_takes_its_share(fleet: Fleet) -> None:
    fleet.start_host("one", "--devices=cpu:2", devices=2)
    job_id = fleet.infer(prompts(600), "gated", shard_rows=5, batch_size=8)
    grown(fleet, job_id, 2)
    fleet.start_host("two")
    grown(fleet, job_id, 3)
    leased_rows(fleet, job_id, 3)
    fleet.open_gate(job_id, ALL)
    fleet.wait(job_id, "succeeded", within=60)
    require_all_rows(fleet, job_id, 600)
    begun = fleet.begun(job_id)
    assert len(begun) == 600, "no row is computed twice"
    assert {device for _, device in begun} == {"cpu0@one", "cpu1@one", "cpu0@two"}
    assert len(fleet.attempts(job_id)) == 1
    job = fleet.job(job_id)
    assert job.progress is not None
    assert job.summary is not None
    assert (job.progress["step"], job.summary["rows"]) == (600, 600)
    assert fleet.free()


def test_no_more_devices_than_the_spec_allows(fleet: Fleet) -> None:
    fleet.start_host("one", "--devices=cpu:3", devices=3)
    job_id = fleet.infer(prompts(300), "gated", shard_rows=5, resources={"devices": 2})
    grown(fleet, job_id, 2)
    alone = fleet.infer(prompts(300), "gated", shard_rows=5, resources={"devices": 1})
    grown(fleet, alone, 1)
    for each in (job_id, alone):
        fleet.open_gate(each, ALL)
        fleet.wait(each, "succeeded", within=60)
        require_all_rows(fleet, each, 300)
    assert (told(fleet, job_id)["grown"], told(fleet, alone)["grown"]) == (1, 0)


def test_a_waiting_training_gets_a_device_back(fleet: Fleet) -> None:
    fleet.start_host("one", "--devices=cpu:2", devices=2)
    job_id = fleet.infer(prompts(400), "gated", shard_rows=5, batch_size=8)
    grown(fleet, job_id, 2)
    in_flight = leased_rows(fleet, job_id, 2)
    training = fleet.train("quick")
    asked = fleet.wait_for_event(job_id, "asked_back", within=60)
    has_heard(fleet, job_id, asked.data["rank"])  # else it may lease rows behind the gate
    fleet.open_gate(job_id, in_flight)
    fleet.wait(training, "succeeded", within=60)
    left = fleet.wait_for_event(job_id, "rank_left")
    assert left.data["rank"] == asked.data["rank"] == 1, "the newest"
    assert fleet.job(job_id).state == "running"
    assert told(fleet, job_id)["asked_back"] == 1
    grown(fleet, job_id, 2)  # again
    fleet.open_gate(job_id, ALL)
    fleet.wait(job_id, "succeeded", within=60)
    require_all_rows(fleet, job_id, 400)
    assert len(fleet.begun(job_id)) == 400, "what was in flight was finished"


def test_a_drained_host_leaves_the_job_to_the_others(
    new_fleet: Callable[..., Fleet], database: str, valkey_url: str
) -> None:
    fleet = new_fleet(database, valkey_url, drain_grace="60")
    fleet.start_scheduler()
    fleet.start_host("one")
    job_id = fleet.infer(prompts(400), "gated", shard_rows=5, batch_size=8)
    grown(fleet, job_id, 1)
    fleet.start_host("two")
    grown(fleet, job_id, 2)
    in_flight = leased_rows(fleet, job_id, 2)
    fleet.hosts["two"].send_signal(signal.SIGTERM)
    eventually(lambda: fleet.devices("two", "draining"), 30, lambda: fleet.story(job_id))
    has_heard(fleet, job_id, 1)
    fleet.open_gate(job_id, in_flight)
    assert fleet.hosts["two"].wait(60) == 0
    fleet.open_gate(job_id, ALL)
    fleet.wait(job_id, "succeeded", within=60)
    require_all_rows(fleet, job_id, 400)
    assert (len(fleet.attempts(job_id)), len(fleet.begun(job_id))) == (1, 400)


def test_cancel_ends_all_ranks_and_keeps_what_is_finished(fleet: Fleet) -> None:
    fleet.start_host("one", "--devices=cpu:2", devices=2)
    job_id = fleet.infer(prompts(400), "gated", shard_rows=5, batch_size=8)
    grown(fleet, job_id, 2)
    leased_rows(fleet, job_id, 2)
    fleet.open_gate(job_id, 50)
    eventually(lambda: len(fleet.results(job_id)) == 50, 60, lambda: fleet.story(job_id))
    fleet.cancel(job_id)
    fleet.wait(job_id, "cancelled", within=60)
    require_all_rows(fleet, job_id, 50)
    eventually(fleet.free)


def test_the_deadline_ends_all_ranks_and_keeps_what_is_finished(fleet: Fleet) -> None:
    fleet.start_host("one", "--devices=cpu:2", devices=2)
    job_id = fleet.infer(prompts(400), "gated", shard_rows=5, batch_size=8, timeout_seconds=8)
    fleet.open_gate(job_id, 25)
    job = fleet.wait(job_id, "failed", within=60)
    assert job.failure is not None
    assert job.failure["code"] == "deadline"
    assert {row["row"] for row in fleet.results(job_id)} <= set(range(25))
    eventually(fleet.free)


@pytest.mark.chaos
def test_a_rank_that_was_taken_for_lost_can_write_nothing(fleet: Fleet) -> None:
    fleet.start_host("one", "--devices=cpu:2", devices=2)
    job_id = fleet.infer(prompts(200), "gated", shard_rows=5, batch_size=8)
    grown(fleet, job_id, 2)
    leased_rows(fleet, job_id, 2)
    worker = fleet.worker_pid("cpu1@one")
    os.kill(worker, signal.SIGSTOP)
    fleet.wait_for_event(job_id, "rank_lost", within=60)
    fleet.open_gate(job_id, ALL)
    fleet.wait(job_id, "succeeded", within=60)
    require_all_rows(fleet, job_id, 200)
    assert len(fleet.attempts(job_id)) == 1
    before = [(s.index, s.attempt_id, s.results) for s in shards(fleet, job_id)]
    refused = fleet.log("one").read_text().count("stale write refused")
    os.kill(worker, signal.SIGCONT)
    eventually(lambda: fleet.log("one").read_text().count("stale write refused") > refused)
    assert [(s.index, s.attempt_id, s.results) for s in shards(fleet, job_id)] == before
    eventually(fleet.free)


def shards(fleet: Fleet, job_id: str) -> list[Shard]:
    return list(fleet.store.call(read.committed_shards, job_id, -1, 100_000))


@pytest.mark.slow
def test_the_real_engine_shares_rows_and_is_replaced(
    new_fleet: Callable[..., Fleet], database: str, valkey_url: str
) -> None:
    # Long enough that loading on a busy machine is no lost lease.
    fleet = new_fleet(database, valkey_url, lease_ttl="20", claim_timeout="60")
    fleet.start_scheduler()
    bert = make_bert(fleet.data / "bert")
    path = fleet.data / "rows.jsonl"
    write_rows(path, make_rows(6000, seed=3))
    fleet.start_host("one", "--devices=cpu:2", real=True, devices=2)
    job_id = embed(fleet, path, bert)
    fleet.wait_for_event(job_id, "ready", within=120)
    [engine] = [pid for pid, name in fleet.processes().items() if name == "gpuyard-rank"]
    os.kill(engine, signal.SIGSTOP)  # so that the other one is needed, however fast this is
    grown(fleet, job_id, 2)
    eventually(lambda: told(fleet, job_id)["ready"] == 2, 120, lambda: fleet.story(job_id))
    os.kill(engine, signal.SIGKILL)
    fleet.wait(job_id, "succeeded", within=200)
    assert told(fleet, job_id)["engine_died"] == 1
    found = fleet.results(job_id)
    assert [row["row"] for row in found] == list(range(6000))
    assert not any(row["error"] for row in found)
    assert len(fleet.attempts(job_id)) == 1
    once_more = embed(fleet, path, bert, resources={"devices": 1})
    fleet.wait(once_more, "succeeded", within=200)
    for row, same in zip(found, fleet.results(once_more), strict=True):
        same_vector = pytest.approx(same["output"]["embedding"], abs=1e-4)
        assert row["output"]["embedding"] == same_vector, "whoever computed it"


def embed(fleet: Fleet, rows: Path, model: Path, **spec: Any) -> str:
    return fleet.submit(
        {
            "kind": "infer", "task": "embeddings", "input": "x", "shard_rows": 16, **spec,
        },
        {"input": ResolvedInput(path=str(rows), size=rows.stat().st_size)},
        rows,
        model=str(model),
    )  # fmt: skip
