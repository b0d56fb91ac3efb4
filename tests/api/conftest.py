"""A real server on a real port over a real Postgres: one per module, emptied for every test."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import text
from sqlmodel import Session

from scheduler.api import create_app
from scheduler.api.server import ApiServer, listen, make_server
from shared.settings import Settings
from shared.store import Store
from shared.store.keys import create_key
from shared.tables import Table
from tests.api.fake_worker import FakeFleet
from tests.api.model_folders import CAUSAL, CLASSIFIER, ENCODER, write_model
from tests.stack import eventually

DEADLINE = 30.0


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
    with listen("127.0.0.1", 0) as listening:
        port = listening.getsockname()[1]
        server = make_server(app, "127.0.0.1", port)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        try:
            eventually(lambda: server.started, what="the server starts")
            yield Api(settings, store, server, port)
        finally:
            server.should_exit = True
            thread.join(timeout=DEADLINE)
            assert not thread.is_alive(), "the server did not shut down"


@pytest.fixture(scope="module")
def module_place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("api")


@pytest.fixture
def place(module_place: Path) -> Path:
    """The folder of a test: ``roots`` with three small models, empty ``texts`` (opened to specs),
    and an empty ``data`` folder."""
    for name in ("roots", "texts", "data"):
        shutil.rmtree(module_place / name, ignore_errors=True)
        (module_place / name).mkdir()
    write_model(module_place / "roots" / "encoder", ENCODER)
    write_model(module_place / "roots" / "classifier", CLASSIFIER)
    causal = write_model(module_place / "roots" / "causal", CAUSAL)
    (causal / "chat_template.jinja").write_text("{{ messages }}")
    return module_place


def settings_for(
    place: Path, database: str, broker: str = "redis://127.0.0.1:1/0", **more: Any
) -> Settings:
    values = {
        "DATABASE_URL": database,
        "BROKER_URL": broker,
        "data": place / "data",
        "model_roots": (place / "roots",),
        "data_roots": (place / "texts",),
        **more,
    }
    return Settings(**values)


@pytest.fixture
def make_settings(place: Path) -> Callable[..., Settings]:
    """Settings over the test's folder, of a database of its own or of the module's."""
    return partial(settings_for, place)


@pytest.fixture(scope="module")
def module_api(new_database: Callable[[], str], module_place: Path) -> Iterator[Api]:
    """One server for the tests of a module; ``api`` is what a test takes."""
    settings = settings_for(module_place, new_database(), max_upload_bytes=1_000_000)
    store = Store(settings.database_url)
    with running(settings, store) as api:
        yield api
    store.close()


@pytest.fixture
def store(module_api: Api) -> Store:
    """The module's store, emptied."""

    def empty(session: Session) -> None:
        tables = ", ".join(table.name for table in Table.metadata.sorted_tables)
        session.connection().execute(text(f"TRUNCATE {tables}"))

    module_api.store.call(empty)
    return module_api.store


@pytest.fixture
def database(store: Store) -> str:
    """URL of the module's database, emptied."""
    return store.url


@pytest.fixture
def settings(module_api: Api, place: Path) -> Settings:
    """Those of the module's server; the folders are as new."""
    return module_api.settings


@pytest.fixture
def api(module_api: Api, store: Store, settings: Settings) -> Api:
    """The module's server as new: an empty store, empty folders, and one fresh key."""
    key_id, key = store.call(create_key, "tests")
    return replace(module_api, key_id=key_id, key=key)


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
def texts(place: Path) -> Callable[..., Path]:
    """Writes a file into the opened data folder: rows as JSONL, or raw bytes."""

    def write(name: str, rows: list[Any] | bytes) -> Path:
        path = place / "texts" / name
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
