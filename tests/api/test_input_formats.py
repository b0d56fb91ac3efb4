"""Inputs of batch jobs that are no JSONL: which row each line becomes, and what is refused."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import httpx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from scheduler.submission.repeated import MOST_IDS, IdCheck
from shared.messages import Shard
from shared.resolved import ResolvedInput
from shared.rows import read_lines
from shared.settings import Settings
from shared.specs import InferSpec
from shared.store import Store, read
from shared.tables import Job
from tests.api.conftest import submit
from tests.api.refusals import refused
from workers.ranks.engine.inputs import Request, RowProblem, read_request

Spec = Callable[..., dict[str, Any]]
Texts = Callable[..., Path]


def parquet(**columns: Any) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer, row_group_size=2)
    return buffer.getvalue()


def job_of(store: Store, id: str) -> Job:
    job = store.call(read.get_job, id)
    assert job is not None
    return job


def requests(store: Store, id: str) -> list[Request | tuple[int, str, str]]:
    """What the engine makes of each row of a job: a request, or the row's (number, code, message)."""
    job = job_of(store, id)
    spec = InferSpec.model_validate(job.spec)
    found = ResolvedInput.model_validate(job.resolved["inputs"]["input"])
    assert found.rows is not None
    whole = Shard(index=0, first_row=0, rows=found.rows, offset=0, length=found.size)
    made: list[Request | tuple[int, str, str]] = []
    for row, line in read_lines(Path(found.path), whole):
        try:
            made.append(read_request(row, line, spec))
        except RowProblem as problem:
            made.append((row, problem.code, problem.message))
    return made


def over(spec: dict[str, Any], path: Path, **changes: Any) -> dict[str, Any]:
    return {**spec, "rows": None, "input": str(path), **changes}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("in.csv", b'id,other,text\n7,x,"one, ""1"""\n8,y,two\n\n9,z,"three\nlines"\n'),
        ("in.tsv", b'id\ttext\n7\t"one, ""1"""\n8\ttwo\n9\t"three\nlines"\n'),
        ("in.csv", '\ufefftext,id\r\n"one, ""1""",7\r\ntwo,8\r\n"three\nlines",9\r\n'.encode()),
        (
            "in.parquet",
            parquet(
                id=["7", "8", "9"], text=['one, "1"', "two", "three\nlines"], blob=[b"\xff"] * 3
            ),
        ),
    ],
)
def test_every_format_makes_the_same_rows(
    client: httpx.Client, store: Store, infer_spec: Spec, texts: Texts, name: str, content: bytes
) -> None:
    job = submit(client, over(infer_spec(), texts(name, content)))
    assert job["rows_total"] == 3
    assert requests(store, job["id"]) == [
        Request(0, "7", text='one, "1"'),
        Request(1, "8", text="two"),
        Request(2, "9", text="three\nlines"),
    ]


def test_lines_of_text_go_where_the_task_looks(
    client: httpx.Client, store: Store, infer_spec: Spec, texts: Texts
) -> None:
    path = texts("in.txt", b"one\n\n  two \r\nthree")
    classify = submit(client, over(infer_spec(), path))
    assert requests(store, classify["id"])[1] == Request(1, None, text="  two ")
    generate = submit(client, over(infer_spec(), path, task="text-generation", model="causal"))
    assert requests(store, generate["id"])[2] == Request(2, None, text="three")
    named = submit(client, over(infer_spec(), path, text_column="body"))
    assert requests(store, named["id"])[0] == Request(0, None, text="one")


def test_the_format_that_is_named_counts_more_than_the_name(
    client: httpx.Client, store: Store, infer_spec: Spec, texts: Texts
) -> None:
    path = texts("in.dat", b"text\none\n")
    named = submit(client, over(infer_spec(), path, format="csv"))
    assert requests(store, named["id"]) == [Request(0, None, text="one")]
    by_name = submit(client, over(infer_spec(), path))
    assert [found[1] for found in requests(store, by_name["id"])] == ["invalid_json"] * 2  # type: ignore[index]
    jsonl = texts("in.csv", [{"text": "one"}])
    as_it_is = submit(client, over(infer_spec(), jsonl, format="jsonl"))
    assert job_of(store, as_it_is["id"]).resolved["inputs"]["input"]["path"] == str(jsonl)


def test_an_uploaded_file_is_read_by_its_name(
    client: httpx.Client, store: Store, infer_spec: Spec
) -> None:
    answer = client.post("/v1/files", params={"name": "in.csv"}, content=b"text\none\ntwo\n")
    job = submit(client, {**infer_spec(), "rows": None, "input": answer.json()["id"]})
    assert [found.text for found in requests(store, job["id"])] == ["one", "two"]  # type: ignore[union-attr]
    assert job["spec"]["input"] == answer.json()["id"], "the spec stays as its user wrote it"


def test_a_row_that_cannot_be_read_is_its_own_error(
    client: httpx.Client, store: Store, infer_spec: Spec, texts: Texts
) -> None:
    content = b'text,id\none,1\nshort\n"half" a quote,2\n\xff,3\n"two\nlines \xff",4\n,5\nsix,6\n'
    job = submit(client, over(infer_spec(), texts("in.csv", content)))
    assert requests(store, job["id"]) == [
        Request(0, "1", text="one"),
        (1, "invalid_csv", "line 3: 1 field(s), and the header names 2"),
        (2, "invalid_csv", "line 4: no CSV: ',' expected after '\"'"),
        (3, "invalid_csv", "line 5: not UTF-8 (byte 0)"),
        (4, "invalid_csv", "line 7: not UTF-8 (byte 6)"),
        (5, "empty_text", "column 'text' is empty"),
        Request(6, "6", text="six"),
    ]


def test_a_long_or_damaged_line_of_text_is_its_own_error(
    client: httpx.Client, store: Store, infer_spec: Spec, texts: Texts
) -> None:
    content = b"one\n" + b"x" * (8 * 1024 * 1024) + b"yz\n\xc3(\nfour\n"
    job = submit(client, over(infer_spec(), texts("in.txt", content)))
    assert requests(store, job["id"]) == [
        Request(0, None, text="one"),
        (1, "line_too_long", "line 2: the line is longer than 8388608 bytes"),
        (2, "invalid_text", "line 3: not UTF-8 (byte 0)"),
        Request(3, None, text="four"),
    ]


def test_parquet_keeps_what_json_has_and_names_what_it_has_not(
    client: httpx.Client, store: Store, infer_spec: Spec, texts: Texts
) -> None:
    broken = pa.Array.from_buffers(
        pa.string(),
        3,
        [None, pa.array([0, 1, 2, 3], pa.int32()).buffers()[1], pa.py_buffer(b"a\xffc")],
    )
    path = texts("in.parquet", parquet(text=broken, id=[1, 2, 3]))
    job = submit(client, over(infer_spec(), path))
    good, bad, last = requests(store, job["id"])
    assert (good, last) == (Request(0, 1, text="a"), Request(2, 3, text="c"))
    assert isinstance(bad, tuple) and bad[:2] == (1, "invalid_parquet")
    assert bad[2].startswith("row 2: a value cannot be read in column 'text'")

    ids = {
        "day": pa.array([date(2026, 1, 2)]),
        "price": pa.array([Decimal("1.50")]),
        "blob": pa.array([b"\x00"]),
        "nan": pa.array([float("nan")]),
    }
    found = {}
    for name, id in ids.items():
        path = texts(f"{name}.parquet", parquet(text=["x"], id=id))
        [found[name]] = requests(store, submit(client, over(infer_spec(), path))["id"])
    assert found["day"] == Request(0, "2026-01-02", text="x")
    assert found["price"] == Request(0, "1.50", text="x")
    assert found["blob"] == (
        0,
        "unsupported_value",
        "row 1: column 'id' cannot be kept as JSON: it holds a value of type bytes",
    )
    assert found["nan"][1] == "unsupported_value"  # type: ignore[index]


def test_chats_words_and_options_of_a_row(
    client: httpx.Client, store: Store, infer_spec: Spec, texts: Texts
) -> None:
    chat = [{"role": "user", "content": "Hi"}]
    rows = [
        ("prompt", "messages", "generation"),
        ("Say", "", '{"seed": 3}'),
        ("", json.dumps(chat), ""),
        ("Both", json.dumps(chat), ""),
        ("", "no json", ""),
        ("Say", "", "3"),
    ]
    table = "".join(
        ",".join('"' + cell.replace('"', '""') + '"' for cell in row) + "\n" for row in rows
    )
    spec = over(
        infer_spec(), texts("in.csv", table.encode()), task="text-generation", model="causal"
    )
    made = requests(store, submit(client, spec)["id"])
    assert isinstance(made[0], Request) and made[0].generation is not None
    assert (made[0].text, made[0].generation.seed) == ("Say", 3)
    assert made[1] == Request(1, None, messages=chat)
    assert [found[1] for found in made[2:]] == [  # type: ignore[index]
        "invalid_row",
        "invalid_messages",
        "invalid_generation",
    ]

    options = pa.array([{"seed": 3, "top_k": None}, None])
    path = texts(
        "in.parquet", parquet(prompt=["a", None], messages=[None, chat], generation=options)
    )
    made = requests(store, submit(client, {**spec, "input": str(path)})["id"])
    assert isinstance(made[0], Request) and made[0].generation is not None
    assert (made[0].text, made[0].generation.seed) == ("a", 3)
    assert made[1] == Request(1, None, messages=chat)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.csv", b"", "'a.csv' has no rows"),
        ("a.csv", b"text\n\n", "'a.csv' has no rows"),
        ("a.csv", b"body,id\nx,1\n", "'a.csv' has no column 'text'; it has 'body', 'id'"),
        ("a.csv", b'text\nx\n"y\n', "'a.csv' line 3: no CSV: unexpected end of data"),
        ("a.csv", b"text,text\nx,y\n", "'a.csv' line 1: the header names column 'text' twice"),
        ("a.csv", parquet(text=["x"]), "'a.csv' line 2: not UTF-8"),
        ("a.parquet", b"text\nx\n", "'a.parquet': no Parquet file, or it is damaged"),
        ("a.parquet", parquet(body=["x"]), "'a.parquet' has no column 'text'; it has 'body'"),
        ("a.parquet", parquet(text=pa.array([], pa.string())), "'a.parquet' has no rows"),
        ("a.txt", b" \n", "'a.txt' has no rows"),
    ],
)
def test_what_no_row_can_be_read_from_is_refused(
    client: httpx.Client,
    settings: Settings,
    infer_spec: Spec,
    texts: Texts,
    name: str,
    content: bytes,
    says: str,
) -> None:
    spec = over(infer_spec(), texts(name, content))
    assert says in refused(client, spec, "data_error", param="input")["message"]
    assert not list((settings.data / "converted").glob("*.part")), "nothing half-written stays"


def test_a_format_is_of_a_file(client: httpx.Client, infer_spec: Spec) -> None:
    says = refused(client, infer_spec(format="csv"), "invalid_spec")["message"]
    assert "format is how a file is read" in says


def test_repeated_ids_are_told_and_passed_through(
    client: httpx.Client, store: Store, infer_spec: Spec, texts: Texts
) -> None:
    ids: list[Any] = ["a", "b", 1, "a", "1", None, None, {"k": 1}, 1, {"k": 1}]
    rows = [{"id": id, "text": f"text {i}"} for i, id in enumerate(ids)]
    job = submit(client, over(infer_spec(), texts("in.jsonl", rows)))
    [told] = [
        e
        for e in client.get(f"/v1/jobs/{job['id']}/events?format=json").json()
        if e["type"] == "notice"
    ]
    assert told["message"] == '3 rows have an id that an earlier row has; the first is row 3, "a"'
    assert told["data"]["code"] == "repeated_ids"
    assert (told["data"]["rows"], told["data"]["first_row"]) == (3, 3)
    assert [found.id for found in requests(store, job["id"])] == ids  # type: ignore[union-attr]

    once = submit(client, over(infer_spec(), texts("in.jsonl", rows[:3])))
    events = client.get(f"/v1/jobs/{once['id']}/events?format=json").json()
    assert [event["type"] for event in events] == ["submitted"]


def test_repeated_ids_of_many_rows_are_counted_exactly_and_no_further_than_is_said() -> None:
    check = IdCheck()
    for row in range(30_000):
        check.look(row, json.dumps({"id": f"row-{row % 20_000}", "text": "x"}).encode())
    check.look(30_000, b'{"id": "row-1", not json')
    check.look(30_001, b'{"\\u0069d": "row-1"}')
    found = check.found()
    assert found is not None
    assert (found.rows, found.first_row, found.first_id) == (10_001, 20_000, '"row-0"')
    assert (found.compared, found.all) == (30_001, True)
    check._compared = MOST_IDS
    check.look(30_002, b'{"id": "row-2"}')
    found = check.found()
    assert found is not None and (found.rows, found.all) == (10_001, False)
