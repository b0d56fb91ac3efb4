"""Inference attempts with a stand-in engine: shards, partial results, a warm engine, its death."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest

from shared.store import read
from tests.stack import eventually
from tests.workers.fleet import Fleet

DEVICES = 1


def prompts(count: int) -> list[dict[str, str]]:
    return [{"prompt": f"row {n}"} for n in range(count)]


def expected(count: int) -> list[tuple[int, str]]:
    return [(n, f"ROW {n}") for n in range(count)]


def texts(rows: list[dict[str, Any]]) -> list[tuple[int, str]]:
    return [(row["row"], row["output"]["text"]) for row in rows]


def engines(fleet: Fleet) -> set[int]:
    return {pid for pid, name in fleet.processes().items() if name == "gpuyard-rank"}


def test_rows_come_back_in_order_and_the_engine_stays_warm(shared_fleet: Fleet) -> None:
    job_id = shared_fleet.infer(prompts(100), shard_rows=7)
    job = shared_fleet.wait(job_id, "succeeded")
    assert texts(shared_fleet.results(job_id)) == expected(100)
    assert job.progress is not None
    assert (job.progress["step"], job.progress["total_steps"]) == (100, 100)
    assert job.summary is not None
    assert (job.summary["rows"], job.summary["errors"]) == (100, 0)
    [engine] = engines(shared_fleet)
    eventually(lambda: warm(shared_fleet) == ["tiny"])
    # The next job runs in the same process, and its log begins after that of the first.
    again = shared_fleet.infer(prompts(3))
    shared_fleet.wait(again, "succeeded")
    assert engines(shared_fleet) == {engine}
    assert shared_fleet.log_text(again).splitlines() == [
        f"engine {engine} begins {again}",
        f"computes {again}",
    ]


def warm(fleet: Fleet) -> list[str]:
    [row] = fleet.store.call(read.list_devices)
    return row.device.warm


def test_more_shards_than_fit_in_flight(shared_fleet: Fleet) -> None:
    job_id = shared_fleet.infer(prompts(500), shard_rows=1, batch_size=8)
    shared_fleet.wait(job_id, "succeeded")
    assert texts(shared_fleet.results(job_id)) == expected(500)


def test_engine_killed_by_itself_is_replaced_in_the_same_attempt(shared_fleet: Fleet) -> None:
    job_id = shared_fleet.infer(prompts(30), "die_once", shard_rows=5)
    shared_fleet.wait(job_id, "succeeded")
    assert len(shared_fleet.attempts(job_id)) == 1
    assert texts(shared_fleet.results(job_id)) == expected(30)
    died = shared_fleet.wait_for_event(job_id, "engine_died")
    assert "SIGKILL" in died.message
    assert 2 in died.data["shards"]


@pytest.mark.parametrize(("word", "how"), [("abort", "SIGABRT"), ("break", "it broke")])
def test_a_poisonous_row_fails_alone(shared_fleet: Fleet, word: str, how: str) -> None:
    rows: list[Any] = prompts(40)
    rows[13] = {"id": "bad", "prompt": word}
    job_id = shared_fleet.infer(rows, shard_rows=8)
    job = shared_fleet.wait(job_id, "succeeded", within=60)
    found = shared_fleet.results(job_id)
    assert [row["row"] for row in found] == list(range(40))
    assert texts([r for r in found if not r["error"]]) == [e for e in expected(40) if e[0] != 13]
    [bad] = [row for row in found if row["error"]]
    assert (bad["row"], bad["id"], bad["error"]["code"]) == (13, "bad", "engine_died")
    assert "twice" in bad["error"]["message"]
    assert how in bad["error"]["message"]
    assert job.summary is not None
    assert job.summary["errors"] == 1
    assert len(shared_fleet.attempts(job_id)) == 1


def test_poisonous_rows_count_as_errors(shared_fleet: Fleet) -> None:
    rows = [{"prompt": "abort"}, *prompts(4), {"prompt": "abort"}]
    job_id = shared_fleet.infer(rows, shard_rows=1, max_errors=1)
    job = shared_fleet.wait(job_id, "failed", within=60)
    assert job.failure is not None
    assert job.failure["code"] == "too_many_row_errors"


def test_an_engine_that_dies_while_it_loads_ends_the_attempt(shared_fleet: Fleet) -> None:
    job_id = shared_fleet.infer(prompts(3), "die_loading")
    job = shared_fleet.wait(job_id, "failed")
    assert job.failure is not None
    assert (job.failure["code"], len(shared_fleet.attempts(job_id))) == ("rank_exited", 3)


def test_engine_killed_while_it_is_idle_is_replaced(shared_fleet: Fleet) -> None:
    shared_fleet.wait(shared_fleet.infer(prompts(1)), "succeeded")
    before = engines(shared_fleet)
    assert before
    for pid in before:
        os.kill(pid, signal.SIGKILL)
    job_id = shared_fleet.infer(prompts(2))
    shared_fleet.wait(job_id, "succeeded")
    assert len(shared_fleet.attempts(job_id)) == 1


def test_training_gets_the_device_to_itself(shared_fleet: Fleet) -> None:
    shared_fleet.wait(shared_fleet.infer(prompts(1)), "succeeded")
    engine = engines(shared_fleet)
    assert len(engine) == 1
    job_id = shared_fleet.train("wait")
    rank = shared_fleet.wait_until_set_up(job_id)
    assert not engine & engines(shared_fleet)
    assert engines(shared_fleet) == {rank}
    eventually(lambda: warm(shared_fleet) == [])
    shared_fleet.cancel(job_id)
    shared_fleet.wait(job_id, "cancelled")
    eventually(lambda: not engines(shared_fleet))


def test_cancel_keeps_the_engine_and_what_was_computed(shared_fleet: Fleet) -> None:
    job_id = shared_fleet.infer(prompts(400), "slow", shard_rows=5)
    eventually(lambda: shared_fleet.results(job_id))
    engine = engines(shared_fleet)
    shared_fleet.cancel(job_id)
    shared_fleet.wait(job_id, "cancelled")
    assert engines(shared_fleet) == engine
    kept = texts(shared_fleet.results(job_id))
    assert kept == expected(400)[: len(kept)]
    assert 0 < len(kept) < 400


def test_engine_that_takes_no_orders_is_ended_with_the_cancel(shared_fleet: Fleet) -> None:
    job_id = shared_fleet.infer(prompts(3), "stuck")
    shared_fleet.wait_for_event(job_id, "ready")
    engine = engines(shared_fleet)
    shared_fleet.cancel(job_id)
    shared_fleet.wait(job_id, "cancelled")
    eventually(lambda: not engine & engines(shared_fleet))


def test_row_errors_do_not_fail_a_job_unless_asked(shared_fleet: Fleet) -> None:
    rows = [*prompts(4), "no json", "none either"]
    job_id = shared_fleet.infer(rows, shard_rows=2)
    job = shared_fleet.wait(job_id, "succeeded")
    assert job.summary is not None
    assert job.summary["errors"] == 2
    errors = [row["error"]["code"] for row in shared_fleet.results(job_id) if row["error"]]
    assert errors == ["invalid_json"] * 2
    strict = shared_fleet.infer(rows, shard_rows=2, max_errors=1)
    failed = shared_fleet.wait(strict, "failed")
    assert failed.failure_class == "data_error"
    assert failed.failure is not None
    assert failed.failure["code"] == "too_many_row_errors"
    assert len(shared_fleet.attempts(strict)) == 1
    assert len(shared_fleet.results(strict)) == 6  # they name each row's error
