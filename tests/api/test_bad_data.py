"""Data that are not there or cannot be used: refused when they are submitted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from shared.settings import Settings
from shared.store import Store
from tests.api.conftest import running, submit
from tests.api.refusals import Spec, refused


def rows(n: int = 6) -> list[Any]:
    return [{"text": f"text {i}", "label": "ab"[i % 2]} for i in range(n)]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b'{"text": "x", "label": "a"}\n\n{"text": \n', "line 3: no JSON"),
        (b'{"text": "x", "label": "a"}\n[1]\n', "line 2: no JSON object but a list"),
        (b'{"text": "x", "label": "a"}\n{"text": "y"}\n', "line 2: there is no column 'label'"),
        (
            b'{"txt": "x", "label": "a"}\n',
            "line 1: there is no column 'text'; the row has 'txt', 'label'",
        ),
        (b'{"text": 5, "label": "a"}\n', "line 1: column 'text' must be a string, not a number"),
        (b'{"text": "x", "label": 0.5}\n', "column 'label' must be a string or a whole number"),
        (b'{"text": "x", "label": true}\n', "not a boolean"),
        (b'{"text": "x", "label": "a"}\n{"text": "\xff"}\n', "line 2: not UTF-8"),
        (b"", "has no rows"),
        (b"\n \n", "has no rows"),
        (b'{"text": "x", "label": "a"}\n' * 3, "only one label ('a')"),
    ],
)
def test_training_data_that_cannot_train(
    client: httpx.Client, train_spec: Spec, texts: Any, content: bytes, says: str
) -> None:
    spec = train_spec(data={"train": str(texts("bad.jsonl", content))})
    error = refused(client, spec, "data_error", param="data.train")
    assert says in error["message"]
    assert "bad.jsonl" in error["message"]


def test_a_byte_order_mark_and_integer_labels_are_fine(
    client: httpx.Client, train_spec: Spec, texts: Any
) -> None:
    content = b'\xef\xbb\xbf{"text": "x", "label": 0}\r\n{"text": "y", "label": 1}'
    submit(client, train_spec(data={"train": str(texts("bom.jsonl", content))}))


def test_a_label_that_training_lacks(client: httpx.Client, train_spec: Spec, texts: Any) -> None:
    odd = [*rows(), {"text": "z", "label": "c"}]
    data = {"train": str(texts("t.jsonl", rows())), "validation": str(texts("v.jsonl", odd))}
    error = refused(client, train_spec(data=data), "data_error", param="data.validation")
    assert "'v.jsonl' line 7: label 'c'" in error["message"]


def test_a_split_that_leaves_nothing(client: httpx.Client, train_spec: Spec, texts: Any) -> None:
    path = str(texts("t.jsonl", rows(40)))
    data = {"train": path, "validation_split": 0.02}
    refused(client, train_spec(data=data), "data_error", param="data.validation_split")
    submit(client, train_spec(data={"train": path, "validation_split": 0.1}))


def test_only_so_much_is_scanned(
    database: str,
    make_settings: Callable[..., Settings],
    store: Store,
    train_spec: Spec,
    texts: Any,
) -> None:
    content = "".join(json.dumps(row) + "\n" for row in rows()).encode() + b"no json\n"
    spec = train_spec(data={"train": str(texts("long.jsonl", content))})
    settings = make_settings(database, max_scan_bytes=60, auth=False)
    with running(settings, store) as api, api.client() as client:
        submit(client, spec)


@pytest.mark.parametrize("path", ["/etc/passwd", "/proc/self/environ", "/nowhere/at/all"])
def test_files_outside_the_roots(client: httpx.Client, train_spec: Spec, path: str) -> None:
    spec = train_spec(data={"train": path})
    error = refused(client, spec, "path_not_allowed", param="data.train", status=403)
    assert "exist" not in error["message"], "it tells nothing about files outside"


def test_ways_around_the_roots(
    client: httpx.Client, train_spec: Spec, infer_spec: Spec, texts: Any, place: Path
) -> None:
    secret = place / "secret.jsonl"
    secret.write_text('{"text": "x", "label": "a"}\n')
    (place / "texts" / "linked.jsonl").symlink_to(secret)
    for path in (place / "texts" / "linked.jsonl", place / "texts" / ".." / "secret.jsonl"):
        spec = train_spec(data={"train": str(path)})
        refused(client, spec, "path_not_allowed", param="data.train", status=403)
        spec = {**infer_spec(), "rows": None, "input": str(path)}
        refused(client, spec, "path_not_allowed", param="input", status=403)


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("relative.jsonl", "neither an uploaded file's id nor an absolute path"),
        ("file_01JD2V5N0W8R4QK7T9Y3ZB6XEM", "no uploaded file"),
        ("file_odd", "no uploaded file"),
        ("{texts}/missing.jsonl", "does not exist"),
        ("{texts}/folder", "is a folder"),
    ],
)
def test_files_that_are_not_there(
    client: httpx.Client, train_spec: Spec, place: Path, path: str, says: str
) -> None:
    (place / "texts" / "folder").mkdir()
    spec = train_spec(data={"train": path.replace("{texts}", str(place / "texts"))})
    assert says in refused(client, spec, "data_error", param="data.train")["message"]


def test_rows_of_a_batch_job_may_be_bad_but_there_must_be_some(
    client: httpx.Client, infer_spec: Spec, texts: Any
) -> None:
    spec = {**infer_spec(), "rows": None}
    for content in (b"", b"\n\n  \n"):
        bad = {**spec, "input": str(texts("none.jsonl", content))}
        assert "no rows" in refused(client, bad, "data_error", param="input")["message"]
    refused(client, {**spec, "rows": []}, "invalid_spec", param="rows")
    odd = {**spec, "input": str(texts("odd.jsonl", b'no json\n\xff\n{"text": 5}\n'))}
    assert submit(client, odd)["rows_total"] == 3


def test_one_endless_line_is_no_jsonl(client: httpx.Client, infer_spec: Spec, place: Path) -> None:
    path = place / "texts" / "endless.jsonl"
    with path.open("wb") as file:
        file.truncate(100_000_000)
    refused(client, {**infer_spec(), "rows": None, "input": str(path)}, "data_error", param="input")
