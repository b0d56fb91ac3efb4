"""Uploads: kept whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from shared.settings import Settings
from shared.store import Store
from tests.api.conftest import Api, error_of, running, submit
from tests.stack import eventually

CONTENT = b'{"text": "x", "label": "a"}\n{"text": "y", "label": "b"}\n'


def stored(settings: Settings) -> list[Path]:
    """Everything in the folder of uploads, half-written things too."""
    folder = settings.data / "files"
    return sorted(folder.iterdir()) if folder.exists() else []


def test_a_plain_body_is_kept(client: httpx.Client, settings: Settings) -> None:
    answer = client.post("/v1/files", params={"name": "a.jsonl"}, content=CONTENT)
    assert answer.status_code == 201
    file = answer.json()
    digest = hashlib.sha256(CONTENT).hexdigest()
    assert (file["name"], file["size"], file["sha256"]) == ("a.jsonl", len(CONTENT), digest)
    assert [p.read_bytes() for p in stored(settings)] == [CONTENT]
    assert client.get(f"/v1/files/{file['id']}").json() == file
    content = client.get(f"/v1/files/{file['id']}/content")
    assert (content.content, content.headers["etag"]) == (CONTENT, f'"{digest}"')
    assert client.get("/v1/files").json() == {"items": [file], "next": None}


def test_a_form_is_kept(client: httpx.Client, settings: Settings) -> None:
    big = bytes(range(256)) * 3000
    answer = client.post(
        "/v1/files", files={"file": ("C:\\texts\\b.jsonl", big)}, data={"purpose": "test"}
    )
    assert answer.status_code == 201, answer.text
    assert (answer.json()["name"], answer.json()["size"]) == ("b.jsonl", len(big))
    assert [p.read_bytes() for p in stored(settings)] == [big]


def test_chunks_of_unknown_length(client: httpx.Client) -> None:
    answer = client.post("/v1/files?name=c", content=iter([b"a" * 70_000] * 10))
    assert answer.json()["size"] == 700_000


def test_an_uploaded_file_is_what_a_spec_names(
    client: httpx.Client, train_spec: Callable[..., dict[str, Any]]
) -> None:
    file = client.post("/v1/files?name=t.jsonl", content=CONTENT).json()
    job = submit(client, train_spec(data={"train": file["id"]}))
    assert job["spec"]["data"]["train"] == file["id"]
    bad = client.post("/v1/files?name=bad.jsonl", content=b"{\n").json()
    error = error_of(
        client.post("/v1/jobs", json=train_spec(data={"train": bad["id"]})), 422, "data_error"
    )
    assert "'bad.jsonl' line 1" in error["message"]


@pytest.mark.parametrize("announced", [True, False])
def test_over_the_cap(client: httpx.Client, settings: Settings, announced: bool) -> None:
    body: Any = b"x" * 2_000_000 if announced else iter([b"x" * 100_000] * 20)
    error_of(client.post("/v1/files?name=x", content=body), 413, "payload_too_large")
    form = client.post("/v1/files", files={"file": ("x", b"x" * 1_000_001)})
    error_of(form, 413, "payload_too_large")
    assert stored(settings) == []
    exact = client.post("/v1/files?name=x", content=b"x" * settings.max_upload_bytes)
    assert exact.status_code == 201


def test_another_digest(client: httpx.Client, settings: Settings) -> None:
    def post(digest: str) -> httpx.Response:
        headers = {"X-Content-SHA256": digest}
        return client.post("/v1/files?name=x", content=CONTENT, headers=headers)

    error_of(post("0" * 64), 400, "upload_incomplete")
    error_of(post("short"), 422, "invalid_request")
    assert stored(settings) == []
    assert post(hashlib.sha256(CONTENT).hexdigest().upper()).status_code == 201


@pytest.mark.parametrize("length", ["Content-Length: 5000", "Transfer-Encoding: chunked"])
def test_cut_off_midway(api: Api, client: httpx.Client, length: str) -> None:
    body = b"x" * 500 if length.startswith("Content") else b"1f4\r\n" + b"x" * 500 + b"\r\n"
    head = (
        f"POST /v1/files?name=x HTTP/1.1\r\nHost: x\r\n{length}\r\n"
        f"Authorization: Bearer {api.key}\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", api.port), timeout=10) as raw:
        raw.sendall(head.encode() + body)
        eventually(lambda: stored(api.settings), what="it is being written")
    eventually(lambda: not stored(api.settings), what="nothing of it is kept")
    assert client.get("/v1/files").json()["items"] == []


def test_a_form_that_ends_in_its_middle(client: httpx.Client, settings: Settings) -> None:
    head = b'--B\r\nContent-Disposition: form-data; name="file"; filename="x"\r\n\r\n'
    kind = {"Content-Type": "multipart/form-data; boundary=B"}

    def post(body: bytes) -> httpx.Response:
        return client.post("/v1/files", content=body, headers=kind)

    error_of(post(head + b"half"), 400, "upload_incomplete")
    error_of(post(b"no form at all"), 422, "invalid_request")
    other = b'--B\r\nContent-Disposition: form-data; name="a"\r\n\r\nx\r\n--B--\r\n'
    error_of(post(other), 422, "invalid_request")
    none = client.post("/v1/files", content=b"", headers={"Content-Type": "multipart/form-data"})
    error_of(none, 422, "invalid_request")
    assert stored(settings) == []
    assert post(head + b"whole\r\n--B--\r\n").json()["size"] == 5


def test_what_a_killed_process_left_is_swept_by_the_next(settings: Settings, store: Store) -> None:
    folder = settings.data / "files"
    folder.mkdir()
    for name in (".file_old.part", ".file_new.part", "file_kept"):
        (folder / name).write_bytes(b"x")
    os.utime(folder / ".file_old.part", (1, 1))
    os.utime(folder / "file_kept", (1, 1))
    with running(settings, store):
        assert {p.name for p in stored(settings)} == {".file_new.part", "file_kept"}


@pytest.mark.parametrize("name", ["../x", "a/b", "a\\b", "", "x" * 256, "a\nb", "a\0b"])
def test_names_that_are_none(client: httpx.Client, settings: Settings, name: str) -> None:
    answer = client.post("/v1/files", params={"name": name}, content=CONTENT)
    assert error_of(answer, 422, "invalid_request")["param"] == "name"
    assert stored(settings) == []


def test_files_that_are_not_there(client: httpx.Client) -> None:
    for path in ("file_01JD2V5N0W8R4QK7T9Y3ZB6XEM", "odd", "%00"):
        error_of(client.get(f"/v1/files/{path}"), 404, "not_found")
        error_of(client.get(f"/v1/files/{path}/content"), 404, "not_found")


def test_pages_of_files(client: httpx.Client) -> None:
    made = [client.post("/v1/files?name=x", content=b"x").json()["id"] for _ in range(3)]
    first = client.get("/v1/files", params={"limit": 2}).json()
    assert [f["id"] for f in first["items"]] == made[:0:-1]
    rest = client.get("/v1/files", params={"limit": 2, "cursor": first["next"]}).json()
    assert [f["id"] for f in rest["items"]] == made[:1]


def test_no_key_no_upload(api: Api) -> None:
    with api.client("gy_wrong") as client:
        answer = client.post("/v1/files?name=x", content=b"x" * 100_000)
        error_of(answer, 401, "authentication_failed")
    assert stored(api.settings) == []
    assert json.loads(answer.text)["error"]["hint"]
