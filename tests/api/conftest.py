"""A real server on a real port over a real Postgres, one per test."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from scheduler.api import create_app
from scheduler.api.server import ApiServer, make_server
from shared.settings import Settings
from shared.store import Store
from shared.store.keys import create_key
from tests.api.fake_worker import FakeFleet
from tests.api.model_folders import CAUSAL, CLASSIFIER, ENCODER, write_model

DEADLINE = 15.0


def wait_until(condition: Callable[[], Any], what: str, deadline: float = DEADLINE) -> Any:
    """Poll until ``condition`` is true; its value."""
    until = time.monotonic() + deadline
    while time.monotonic() < until:
        if found := condition():
            return found
        time.sleep(0.02)
    raise AssertionError(f"not within {deadline} s: {what}")


@dataclass
class Api:
    """A running API."""

    settings: Settings
    store: Store
    server: ApiServer
    port: int
    key_id: str = ""
    key: str = ""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self, key: str | None = None) -> httpx.Client:
        key = self.key if key is None else key
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return httpx.Client(base_url=self.url, headers=headers, timeout=DEADLINE)


@contextmanager
def running(settings: Settings, store: Store) -> Iterator[Api]:
    """Serve in a thread on a free port."""
    app = create_app(settings, store)
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(128)
        port = listening.getsockname()[1]
        server = make_server(app, "127.0.0.1", port)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        try:
            wait_until(lambda: server.started, "the server starts")
            yield Api(settings, store, server, port)
        finally:
            server.should_exit = True
            thread.join(timeout=DEADLINE)
            assert not thread.is_alive(), "the server did not shut down"


@pytest.fixture
def make_settings(tmp_path: Path, tmp_data: Path) -> Callable[..., Settings]:
    """Settings over three small models (encoder, classifier, causal) and a folder of data files."""
    roots = tmp_path / "roots"
    write_model(roots / "encoder", ENCODER)
    write_model(roots / "classifier", CLASSIFIER)
    write_model(roots / "causal", CAUSAL)
    (tmp_path / "texts").mkdir()

    def make(database: str, broker: str = "redis://127.0.0.1:1/0", **more: Any) -> Settings:
        values = {
            "DATABASE_URL": database,
            "BROKER_URL": broker,
            "data": tmp_data,
            "model_roots": (roots,),
            "data_roots": (tmp_path / "texts",),
            **more,
        }
        return Settings(**values)

    return make


@pytest.fixture
def settings(database: str, make_settings: Callable[..., Settings]) -> Settings:
    return make_settings(database, max_upload_bytes=1_000_000)


@pytest.fixture
def store(database: str) -> Iterator[Store]:
    store = Store(database)
    yield store
    store.close()


@pytest.fixture
def api(settings: Settings, store: Store) -> Iterator[Api]:
    with running(settings, store) as api:
        api.key_id, api.key = store.call(create_key, "tests")
        yield api


@pytest.fixture
def client(api: Api) -> Iterator[httpx.Client]:
    with api.client() as client:
        yield client


@pytest.fixture
def fleet(store: Store) -> FakeFleet:
    fleet = FakeFleet(store)
    fleet.add_device()
    return fleet


@pytest.fixture
def texts(tmp_path: Path) -> Callable[..., Path]:
    """Writes a file into the opened data folder: rows as JSONL, or raw bytes."""

    def write(name: str, rows: list[Any] | bytes) -> Path:
        path = tmp_path / "texts" / name
        if isinstance(rows, bytes):
            path.write_bytes(rows)
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


@pytest.fixture
def train_spec(texts: Callable[..., Path]) -> Callable[..., dict[str, Any]]:
    """A training spec that is accepted, with changes."""

    def make(**changes: Any) -> dict[str, Any]:
        rows = [{"text": f"text {i}", "label": "ab"[i % 2]} for i in range(40)]
        return {
            "kind": "train",
            "task": "text-classification",
            "model": "encoder",
            "data": {"train": str(texts("train.jsonl", rows))},
            **changes,
        }

    return make


@pytest.fixture
def infer_spec() -> Callable[..., dict[str, Any]]:
    """A batch job over ``rows`` inline rows, with changes."""

    def make(rows: int = 20, **changes: Any) -> dict[str, Any]:
        return {
            "kind": "infer",
            "task": "text-classification",
            "model": "classifier",
            "rows": [{"text": f"text {i}"} for i in range(rows)],
            "shard_rows": 4,
            **changes,
        }

    return make


def submit(client: httpx.Client, spec: dict[str, Any], **headers: str) -> dict[str, Any]:
    """Submit and expect success: the job."""
    answer = client.post("/v1/jobs", json=spec, headers=headers)
    assert answer.status_code in (200, 201), answer.text
    job: dict[str, Any] = answer.json()
    return job


def error_of(answer: httpx.Response, status: int, code: str) -> dict[str, Any]:
    """The one envelope, with nothing missing and no traceback."""
    assert answer.status_code == status, answer.text
    error: dict[str, Any] = answer.json()["error"]
    assert set(error) == {"code", "message", "param", "hint", "request_id"}
    assert error["code"] == code, error
    assert error["request_id"] == answer.headers["x-request-id"]
    assert "Traceback" not in answer.text
    return error
