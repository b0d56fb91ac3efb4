"""Running a job again, or its rows that failed."""

from __future__ import annotations

import io
import json
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pyarrow.parquet as pq
import pytest

from shared.lifecycle import FailureClass
from shared.store import Store, retried
from shared.store.cancel import cancel_job
from shared.store.finish import leave_attempt
from tests.api.conftest import Api, error_of, submit
from tests.api.fake_worker import FakeFleet

Spec = Callable[..., dict[str, Any]]
Texts = Callable[..., Path]


def done(client: httpx.Client, fleet: FakeFleet, job: str, shards: int) -> None:
    (holder,) = fleet.start(job)
    for index in range(shards):
        fleet.compute(holder, index)
    fleet.finish(holder)


def again(client: httpx.Client, job: str, status: int = 201, **body: Any) -> dict[str, Any]:
    answer = client.post(f"/v1/jobs/{job}/retry", json=body)
    assert answer.status_code == status, answer.text
    found: dict[str, Any] = answer.json()
    return found


def numbers(client: httpx.Client, job: str, **params: Any) -> list[int]:
    text = client.get(f"/v1/jobs/{job}/results", params=params).text
    return [json.loads(line)["row"] for line in text.splitlines()]


def test_only_the_rows_that_failed_with_their_numbers(
    client: httpx.Client, fleet: FakeFleet, infer_spec: Spec, texts: Texts
) -> None:
    # A blank line is no row, and the line without JSON is one.
    rows = [json.dumps({"id": n, "text": f"text {n}"}) for n in range(60)]
    rows[13] = "no json"
    content = "\n".join([*rows[:5], "", *rows[5:]]) + "\n"
    spec = infer_spec(input=str(texts("in.jsonl", content.encode())), name="first")
    first = submit(client, {**spec, "rows": None})
    done(client, fleet, first["id"], 15)
    failed = [row for row in range(60) if row % 7 == 6]
    assert client.get(f"/v1/jobs/{first['id']}").json()["row_errors"] == len(failed)

    second = again(client, first["id"], failed=True, changes={"too_long": "truncate"})
    assert (second["retry_of"], second["rows_total"]) == (first["id"], len(failed))
    assert second["spec"]["too_long"] == "truncate"
    same = ("name", "task", "model", "shard_rows", "batch_size")
    assert {k: second["spec"][k] for k in same} == {k: first["spec"][k] for k in same}
    assert Path(second["spec"]["input"]).read_text().splitlines() == [rows[n] for n in failed]
    assert client.get(f"/v1/jobs/{first['id']}").json()["retry_of"] is None

    done(client, fleet, second["id"], 2)
    assert failed == [6, 13, 20, 27, 34, 41, 48, 55]
    assert numbers(client, second["id"]) == failed
    assert numbers(client, second["id"], after_row=13) == failed[2:]
    assert numbers(client, second["id"], after_row=26) == failed[3:]
    assert numbers(client, second["id"], after_row=55) == []
    assert numbers(client, second["id"], order="completion", skip=3) == failed[3:]
    file = client.get(f"/v1/jobs/{second['id']}/results", params={"format": "parquet"}).content
    assert pq.read_table(io.BytesIO(file))["row"].to_pylist() == failed

    # Of the second job the row 6 failed, which is row 48 of the first input.
    third = again(client, second["id"], failed=True)
    assert (third["retry_of"], third["rows_total"]) == (second["id"], 1)
    done(client, fleet, third["id"], 1)
    assert numbers(client, third["id"]) == [48]
    # All of the second one again has the numbers of the second one.
    fourth = again(client, second["id"])
    done(client, fleet, fourth["id"], 2)
    assert numbers(client, fourth["id"]) == failed


def test_a_spec_again_with_changes(
    client: httpx.Client, fleet: FakeFleet, infer_spec: Spec, train_spec: Spec
) -> None:
    first = submit(client, infer_spec(8, max_errors=3, priority=5))
    done(client, fleet, first["id"], 2)
    second = again(client, first["id"], changes={"max_errors": None, "retry": {"max_attempts": 7}})
    assert (second["rows_total"], second["retry_of"]) == (8, first["id"])
    assert second["spec"]["max_errors"] is None
    assert second["spec"]["retry"] == {**first["spec"]["retry"], "max_attempts": 7}
    assert second["spec"]["priority"] == 5
    done(client, fleet, second["id"], 2)
    assert numbers(client, second["id"]) == list(range(8))

    training = submit(client, train_spec())
    (holder,) = fleet.start(training["id"])
    fleet.fail(holder, FailureClass.USER_ERROR, "wrong")
    other = again(client, training["id"], changes={"hyperparameters": {"seed": 9}})
    assert other["retry_of"] == training["id"]
    expected = {**training["spec"]["hyperparameters"], "seed": 9}
    assert other["spec"] == {**training["spec"], "hyperparameters": expected}
    told = client.get(f"/v1/jobs/{other['id']}/events?format=json").json()[0]
    assert told["message"].endswith(f"; again for {training['id']}")


def test_what_cannot_be_run_again_is_refused(
    client: httpx.Client, store: Store, fleet: FakeFleet, infer_spec: Spec, train_spec: Spec
) -> None:
    job = submit(client, infer_spec(12))["id"]

    def refused(status: int, code: str, job: str = job, **body: Any) -> dict[str, Any]:
        return error_of(client.post(f"/v1/jobs/{job}/retry", json=body), status, code)

    for body in ({}, {"failed": True}):
        assert "is queued" in refused(409, "conflict", **body)["message"]
    (holder,) = fleet.start(job)
    fleet.compute(holder, 0)
    assert "is running" in refused(409, "conflict", failed=True)["message"]
    store.call(cancel_job, job, "by the test")
    assert store.call(leave_attempt, holder)
    error = refused(409, "conflict", failed=True)
    assert error["message"] == f"no row of {job} failed"
    assert "8 rows were never computed" in error["hint"]

    failed = submit(client, infer_spec(8))["id"]
    done(client, fleet, failed, 2)
    for name, value in (("input", "file_x"), ("rows", [{"text": "x"}]), ("format", "csv")):
        error = refused(422, "invalid_request", failed, failed=True, changes={name: value})
        assert error["param"] == name
    wrong = refused(422, "invalid_spec", failed, failed=True, changes={"batch_size": "big"})
    assert wrong["param"] == "batch_size"
    assert refused(422, "invalid_request", failed, faild=True)["param"] == "faild"
    training = submit(client, train_spec())["id"]
    (holder,) = fleet.start(training)
    fleet.fail(holder, FailureClass.USER_ERROR, "wrong")
    assert "is a training" in refused(422, "invalid_request", training, failed=True)["message"]
    assert refused(404, "not_found", "job_01JD2V5N0W8R4QK7T9Y3ZB6XEM")["param"] == "job_id"


def test_an_input_that_was_changed_is_noticed(
    client: httpx.Client, fleet: FakeFleet, infer_spec: Spec, texts: Texts
) -> None:
    path = texts("in.jsonl", [{"text": f"text {n}"} for n in range(8)])
    job = submit(client, {**infer_spec(), "rows": None, "input": str(path)})["id"]
    done(client, fleet, job, 2)
    path.write_text('{"text": "one"}\n')
    answer = client.post(f"/v1/jobs/{job}/retry", json={"failed": True})
    assert "the input file was changed" in error_of(answer, 422, "input_changed")["message"]
    path.unlink()
    answer = client.post(f"/v1/jobs/{job}/retry", json={"failed": True})
    assert "cannot be read any more" in error_of(answer, 422, "data_error")["message"]


def test_failed_rows_of_a_table_keep_what_was_read(
    client: httpx.Client, fleet: FakeFleet, infer_spec: Spec, texts: Texts
) -> None:
    path = texts("in.csv", b"text,id\n" + b"".join(b"text %d,%d\n" % (n, n) for n in range(8)))
    job = submit(client, {**infer_spec(), "rows": None, "input": str(path)})["id"]
    done(client, fleet, job, 2)
    path.unlink()
    found = again(client, job, failed=True)
    assert json.loads(Path(found["spec"]["input"]).read_text()) == {"text": "text 6", "id": "6"}
    answer = client.post(
        f"/v1/jobs/{job}/retry", json={"failed": True, "changes": {"text_column": "id"}}
    )
    assert error_of(answer, 422, "invalid_request")["param"] == "text_column"


def test_a_key_makes_one_retry(client: httpx.Client, fleet: FakeFleet, infer_spec: Spec) -> None:
    job = submit(client, infer_spec(8))["id"]
    done(client, fleet, job, 2)
    key = {"Idempotency-Key": "once"}
    address, body = f"/v1/jobs/{job}/retry", {"failed": True}
    first, second = (client.post(address, json=body, headers=key) for _ in range(2))
    assert (first.status_code, second.status_code) == (201, 200)
    assert first.json()["id"] == second.json()["id"]
    other = client.post(address, json={"failed": False}, headers=key)
    error_of(other, 409, "idempotency_mismatch")


@pytest.mark.parametrize("count", [1, 4095, 4096, 4097, 10_000])
def test_numbers_of_many_rows(api: Api, client: httpx.Client, infer_spec: Spec, count: int) -> None:
    job = submit(client, infer_spec(1))["id"]
    kept = array("q", (10 * row + 3 for row in range(count)))
    api.store.call(retried.insert_numbers, job, kept)
    assert api.store.call(retried.is_numbered, job)
    assert api.store.call(retried.all_numbers, job) == kept
    for first in {0, count // 2, max(0, 4090), count - 1}:
        rows = min(17, count - first)
        if rows > 0:
            assert (
                api.store.call(retried.numbers_of, job, first, rows) == kept[first : first + rows]
            )
    for row in {0, count // 2, count - 1}:
        found = [api.store.call(retried.rows_up_to, job, 10 * row + n) for n in (2, 3, 4)]
        assert found == [row, row + 1, row + 1]
    assert api.store.call(retried.rows_up_to, job, -1) == 0
