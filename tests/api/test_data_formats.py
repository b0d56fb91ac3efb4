"""Training data of every format through the API: by the name it has, or as the spec says."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shared.resolved import Resolved, ResolvedInput
from shared.settings import Settings
from shared.store import Store, read
from tests.api.conftest import error_of, running, submit
from tests.api.refusals import refused

Spec = Callable[..., dict[str, Any]]
CSV = b"text,label\n" + b"one,a\ntwo,b\n" * 10


def parquet(**columns: list[Any]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer)
    return buffer.getvalue()


PARQUET = parquet(text=["one", "two"] * 10, label=["a", "b"] * 10)
JSONL = b'{"text": "one", "label": "a"}\n{"text": "two", "label": "b"}\n' * 10


def upload(client: httpx.Client, name: str, content: bytes) -> str:
    answer = client.post("/v1/files", params={"name": name}, content=content)
    assert answer.status_code == 201, answer.text
    return str(answer.json()["id"])


def inputs(store: Store, job: dict[str, Any]) -> dict[str, ResolvedInput]:
    row = store.call(read.get_job, job["id"])
    assert row is not None
    return Resolved.model_validate(row.resolved).inputs


@pytest.mark.parametrize(
    ("name", "content", "format"),
    [
        ("reviews.csv", CSV, "csv"),
        ("Reviews.TSV", CSV.replace(b",", b"\t"), "tsv"),
        ("part-0.parquet", PARQUET, "parquet"),
        ("rows.jsonl", JSONL, "jsonl"),
        ("no suffix", JSONL, "jsonl"),
        (f"{'long' * 60}.csv", CSV, "csv"),
    ],
)
def test_an_upload_is_read_as_it_was_named(
    client: httpx.Client,
    store: Store,
    train_spec: Spec,
    name: str,
    content: bytes,
    format: str,
) -> None:
    job = submit(client, train_spec(data={"train": upload(client, name, content)}))
    found = inputs(store, job)["train"]
    assert (found.format, found.rows) == (format, 20)


def test_a_form_names_its_file(client: httpx.Client, store: Store, train_spec: Spec) -> None:
    answer = client.post("/v1/files", files={"file": ("reviews.csv", CSV)})
    job = submit(client, train_spec(data={"train": answer.json()["id"]}))
    assert inputs(store, job)["train"].format == "csv"


def test_a_format_that_is_named_counts_more_than_the_suffix(
    client: httpx.Client, store: Store, train_spec: Spec
) -> None:
    data = {"train": upload(client, "reviews.txt", CSV), "format": "csv"}
    assert inputs(store, submit(client, train_spec(data=data)))["train"].format == "csv"


def test_each_file_has_a_format_of_its_own(
    client: httpx.Client, store: Store, train_spec: Spec, texts: Any
) -> None:
    data = {
        "train": str(texts("train.parquet", PARQUET)),
        "validation": upload(client, "held-out.csv", CSV),
    }
    found = inputs(store, submit(client, train_spec(data=data)))
    assert {name: entry.format for name, entry in found.items()} == {
        "train": "parquet",
        "validation": "csv",
    }


def test_a_link_is_read_as_the_spec_names_it(
    client: httpx.Client, store: Store, train_spec: Spec, texts: Any, place: Path
) -> None:
    blob = texts("0f3a", PARQUET)
    (place / "texts" / "train.parquet").symlink_to(blob)
    job = submit(client, train_spec(data={"train": str(place / "texts" / "train.parquet")}))
    found = inputs(store, job)["train"]
    assert (found.format, found.path) == ("parquet", str(blob))


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.csv", b"", "'a.csv' has no rows"),
        ("a.csv", b"text,label\n", "'a.csv' has no rows"),
        ("a.csv", b"text,label\nx,a\ny\n", "'a.csv' line 3: 1 field(s), and the header names 2"),
        ("a.csv", b'text,label\n"x,a\n', "'a.csv' line 2: no CSV: unexpected end of data"),
        ("a.csv", b"text;label\nx;a\n", "line 2: there is no column 'text'"),
        ("a.csv", b"text,label\nx,a\ny,a\n", "only one label ('a')"),
        ("a.tsv", CSV, "there is no column 'text'; the row has 'text,label'"),
        ("a.csv", PARQUET, "'a.csv' line 1: not UTF-8"),
        ("a.jsonl", CSV, "'a.jsonl' line 1: no JSON"),
        ("a.parquet", b"", "'a.parquet': no Parquet file, or it is damaged"),
        ("a.parquet", PARQUET[:-20], "'a.parquet': no Parquet file, or it is damaged"),
        ("a.parquet", CSV, "'a.parquet': no Parquet file, or it is damaged"),
        (
            "a.parquet",
            parquet(text=["x", None], label=["a", "b"]),
            "'a.parquet' row 2: column 'text' must be a string, not null",
        ),
        ("a.parquet", parquet(text=[], label=[]), "has no rows"),
        ("a.txt", JSONL, "'a.txt' is plain text by its name"),
    ],
)
def test_what_is_wrong_is_named(
    client: httpx.Client, train_spec: Spec, name: str, content: bytes, says: str
) -> None:
    spec = train_spec(data={"train": upload(client, name, content)})
    error = refused(client, spec, "data_error", param="data.train")
    assert says in error["message"]


def test_a_label_that_only_a_csv_of_validation_has(
    client: httpx.Client, train_spec: Spec, texts: Any
) -> None:
    odd = str(texts("v.parquet", parquet(text=["x", "y"], label=["a", "c"])))
    spec = train_spec(data={"train": str(texts("t.csv", CSV)), "validation": odd})
    error = refused(client, spec, "data_error", param="data.validation")
    assert "'v.parquet' row 2: label 'c' does not occur" in error["message"]


def test_plain_text_for_other_tasks(client: httpx.Client, train_spec: Spec) -> None:
    file = upload(client, "book.txt", b"one line\n")
    spec = train_spec(data={"train": file, "format": "text"})
    error = error_of(client.post("/v1/jobs", json=spec), 422, "invalid_spec")
    assert "data.format 'text' does not apply to task 'text-classification'" in error["message"]


@pytest.mark.parametrize("name", ["long.csv", "long.parquet"])
def test_only_so_much_is_scanned_of_every_format(
    database: str,
    make_settings: Callable[..., Settings],
    store: Store,
    train_spec: Spec,
    texts: Any,
    name: str,
) -> None:
    words, labels = ["some words"] * 200 + [None], ["a", "b"] * 100 + ["a"]  # type: ignore[list-item]
    content = {
        "long.csv": CSV + b"too,many,fields\n",
        "long.parquet": parquet(text=words, label=labels),
    }[name]
    spec = train_spec(data={"train": str(texts(name, content))})
    with running(make_settings(database, max_scan_bytes=60, auth=False), store) as api:
        job = submit(api.client(), spec)
    assert inputs(store, job)["train"].rows is None
    with running(make_settings(database, max_scan_bytes=10_000_000, auth=False), store) as api:
        refused_again = api.client().post("/v1/jobs", json=spec)
    error_of(refused_again, 422, "data_error")
