"""Results in the order of completion, and as a Parquet file."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shared import result_file
from shared.result_file import columns_of, parquet_pieces
from shared.rows import result, row_error
from tests.api.conftest import error_of, submit
from tests.api.fake_worker import FakeFleet, answer

Spec = Callable[..., dict[str, Any]]


def numbers(text: str) -> list[int]:
    return [json.loads(line)["row"] for line in text.splitlines() if line]


def test_rows_in_the_order_of_completion(
    client: httpx.Client, fleet: FakeFleet, infer_spec: Spec
) -> None:
    job = submit(client, infer_spec(10))["id"]
    (holder,) = fleet.start(job)
    fleet.compute(holder, 2)
    fleet.compute(holder, 0)

    def rows(**params: Any) -> list[int]:
        params = {"order": "completion", **params}
        return numbers(client.get(f"/v1/jobs/{job}/results", params=params).text)

    whole = [8, 9, 0, 1, 2, 3, 4, 5, 6, 7]
    assert rows() == whole[:6]
    assert [rows(skip=n) for n in range(8)] == [whole[n:6] for n in range(8)]
    fleet.compute(holder, 1)
    fleet.finish(holder)
    assert [rows(skip=n) for n in range(11)] == [whole[n:] for n in range(11)]


def test_following_in_the_order_of_completion_waits_for_no_gap(
    client: httpx.Client, fleet: FakeFleet, infer_spec: Spec
) -> None:
    job = submit(client, infer_spec(10))["id"]
    (holder,) = fleet.start(job)
    params = {"follow": True, "order": "completion"}
    with client.stream("GET", f"/v1/jobs/{job}/results", params=params) as stream:
        rows = stream.iter_lines()
        for index, expected in ((2, [8, 9]), (0, [0, 1, 2, 3]), (1, [4, 5, 6, 7])):
            fleet.compute(holder, index)
            assert [json.loads(next(rows))["row"] for _ in expected] == expected
        fleet.finish(holder)
        assert list(rows) == []


def test_a_parquet_file_has_what_the_rows_have(
    client: httpx.Client, fleet: FakeFleet, infer_spec: Spec
) -> None:
    job = submit(client, infer_spec(10))["id"]
    (holder,) = fleet.start(job)
    fleet.compute(holder, 2)
    fleet.compute(holder, 0)
    got = client.get(f"/v1/jobs/{job}/results", params={"format": "parquet"})
    assert got.headers["content-type"] == "application/vnd.apache.parquet"
    table = pq.read_table(io.BytesIO(got.content))
    assert table["row"].to_pylist() == [0, 1, 2, 3, 8, 9]
    fleet.compute(holder, 1)
    fleet.finish(holder)
    got = client.get(f"/v1/jobs/{job}/results", params={"format": "parquet"})
    rows = pq.read_table(io.BytesIO(got.content)).to_pylist()
    assert rows[5] == {
        "row": 5,
        "id": None,
        "label": "a",
        "score": 0.5,
        "labels": '[{"label":"a","score":0.5}]',
        "other_output": None,
        "error_code": None,
        "error_message": None,
        "input_tokens": 3,
        "output_tokens": 0,
        "device_seconds": None,
    }
    assert (rows[6]["label"], rows[6]["error_code"]) == (None, "missing_column")
    assert rows[6]["error_message"] == "no column 'text'"
    assert len(rows) == 10


def test_nothing_is_a_parquet_file_as_well(client: httpx.Client, infer_spec: Spec) -> None:
    job = submit(client, infer_spec(3))["id"]
    got = client.get(f"/v1/jobs/{job}/results", params={"format": "parquet"})
    table = pq.read_table(io.BytesIO(got.content))
    assert (table.num_rows, table.column_names) == (0, list(columns_of("text-classification")))


@pytest.mark.parametrize(
    ("params", "param"),
    [
        ({"format": "parquet", "follow": True}, "format"),
        ({"format": "parquet", "order": "completion"}, "format"),
        ({"format": "parquet", "after_row": 3}, "format"),
        ({"skip": 3}, "skip"),
        ({"order": "completion", "after_row": 3}, "after_row"),
    ],
)
def test_what_does_not_go_together_is_refused(
    client: httpx.Client, infer_spec: Spec, params: dict[str, Any], param: str
) -> None:
    job = submit(client, infer_spec(3))["id"]
    got = client.get(f"/v1/jobs/{job}/results", params=params)
    assert error_of(got, 422, "invalid_request")["param"] == param


def lines(rows: list[dict[str, Any]]) -> Iterator[bytes]:
    return ((json.dumps(row) + "\n").encode() for row in rows)


def file_of(task: str, rows: list[dict[str, Any]]) -> pq.ParquetFile:
    return pq.ParquetFile(io.BytesIO(b"".join(parquet_pieces(task, lines(rows)))))


def test_columns_are_of_the_task_and_lose_nothing() -> None:
    text = {"text": "né", "finish_reason": "stop", "choices": [{"text": "né"}], "new": [1, None]}
    rows = [
        result(0, id="a", output=text, input_tokens=3, output_tokens=2),
        result(1, id=7, output={"text": "b", "finish_reason": "length"}),
        result(2, id={"k": [1]}, output={"text": "c", "row": 3}),
        row_error(3, "empty_text", "column 'prompt' is empty", id="d"),
    ]
    found = file_of("text-generation", rows).read().to_pylist()
    assert [row["id"] for row in found] == ["a", "7", '{"k":[1]}', "d"]
    assert (found[0]["text"], found[0]["choices"]) == ("né", '[{"text":"né"}]')
    assert [row["other_output"] for row in found] == ['{"new":[1,null]}', None, '{"row":3}', None]
    assert (found[0]["input_tokens"], found[0]["output_tokens"]) == (3, 2)

    vector = result(0, output={"embedding": [0.5, -0.25], "dimensions": 2})
    embedded = file_of("embeddings", [vector])
    assert embedded.schema_arrow.field("embedding").type == pa.list_(pa.float32())
    assert embedded.read().to_pylist()[0]["embedding"] == [0.5, -0.25]

    packed = result(0, output={"embedding": "AAAAPw==", "dimensions": 1})
    [found] = file_of("embeddings", [packed]).read().to_pylist()
    assert (found["embedding"], found["dimensions"]) == (None, 1)
    assert found["other_output"] == '{"embedding":"AAAAPw=="}'

    other = file_of("a task of tomorrow", [result(0, output={"rank": 1})])
    assert other.read().to_pylist()[0]["other_output"] == '{"rank":1}'


def test_row_groups_are_bounded_by_rows_and_by_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(result_file, "GROUP_ROWS", 100)
    monkeypatch.setattr(result_file, "GROUP_BYTES", 20_000)
    short = [result(n, output={"label": "x"}) for n in range(250)]
    long = [result(n, output={"label": "x" * 9_900}) for n in range(250, 255)]
    whole = file_of("text-classification", [*short, *long])
    groups = [whole.metadata.row_group(n).num_rows for n in range(whole.metadata.num_row_groups)]
    assert groups == [100, 100, 52, 2, 1]
    assert [row["row"] for row in whole.read().to_pylist()] == list(range(255))


def test_parquet_agrees_with_jsonl(
    client: httpx.Client, fleet: FakeFleet, infer_spec: Spec
) -> None:
    job = submit(client, infer_spec(20))["id"]
    (holder,) = fleet.start(job)
    for index in range(5):
        fleet.compute(holder, index)
    fleet.finish(holder)
    address = f"/v1/jobs/{job}/results"
    jsonl = [json.loads(line) for line in client.get(address).text.splitlines()]
    assert jsonl == [answer(row) for row in range(20)]
    found = pq.read_table(io.BytesIO(client.get(address, params={"format": "parquet"}).content))
    assert found["error_code"].to_pylist() == [(row["error"] or {}).get("code") for row in jsonl]
    assert found["label"].to_pylist() == [(row["output"] or {}).get("label") for row in jsonl]
