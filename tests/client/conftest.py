"""The real API over a real Postgres, with jobs moved on as a worker would."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from gpuyard import Client
from gpuyard.cli import main
from scheduler.api import create_app
from scheduler.api.server import make_server
from shared.settings import Settings
from shared.store import Store
from shared.store.keys import create_key
from tests.api.conftest import Api, running
from tests.api.fake_worker import FakeFleet
from tests.api.model_folders import CAUSAL, CLASSIFIER, ENCODER, write_model
from tests.client.proxy import MakeProxy, Proxy, proxy_to
from tests.stack import eventually

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def no_service(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No test talks to a stack that happens to run on this machine."""
    for name in ("GPUYARD_URL", "GPUYARD_API_KEY", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GPUYARD_DATA", str(tmp_path / "no-stack"))


@pytest.fixture
def api(database: str, store: Store, tmp_path: Path, tmp_data: Path) -> Iterator[Api]:
    """A server over three small models and an opened folder ``texts``, with a key."""
    for name, config in (("encoder", ENCODER), ("classifier", CLASSIFIER), ("causal", CAUSAL)):
        write_model(tmp_path / "roots" / name, config)
    (tmp_path / "texts").mkdir()
    settings = Settings(
        DATABASE_URL=database,
        BROKER_URL="redis://127.0.0.1:1/0",
        data=tmp_data,
        model_roots=(tmp_path / "roots",),
        data_roots=(tmp_path / "texts",),
        max_upload_bytes=1_000_000,
    )
    with running(settings, store) as api:
        api.key_id, api.key = store.call(create_key, "tests")
        yield api


@pytest.fixture
def fleet(store: Store) -> FakeFleet:
    """Plays scheduler and workers."""
    fleet = FakeFleet(store)
    fleet.add_device()
    return fleet


@pytest.fixture
def train_spec(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """A training spec that is accepted, with changes."""

    def make(**changes: Any) -> dict[str, Any]:
        path = tmp_path / "texts" / "train.jsonl"
        rows = [{"text": f"text {i}", "label": "ab"[i % 2]} for i in range(40)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return {
            "kind": "train",
            "task": "text-classification",
            "model": "encoder",
            "data": {"train": str(path)},
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


@pytest.fixture
def sdk(api: Api) -> Iterator[Client]:
    with Client(api.url, api.key) as client:
        yield client


@pytest.fixture
def proxied(api: Api) -> Iterator[MakeProxy]:
    """Makes proxies to the API that cut the connections they are told to."""
    with ExitStack() as stack:

        def make(*cuts: int | None) -> Proxy:
            return stack.enter_context(proxy_to(api.port, cuts))

        yield make


@dataclass(frozen=True)
class Said:
    code: int
    out: str
    err: str


@pytest.fixture
def cli(
    api: Api, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Said]:
    """Runs the command line in this process against the API."""
    monkeypatch.setenv("GPUYARD_URL", api.url)
    monkeypatch.setenv("GPUYARD_API_KEY", api.key)

    def run(*arguments: str) -> Said:
        capsys.readouterr()
        code = main(arguments)
        said = capsys.readouterr()
        return Said(code, said.out, said.err)

    return run


def start_cli(api: Api, *arguments: str, **settings: Any) -> subprocess.Popen[str]:
    """The command line as a process of its own, as a shell starts it."""
    env = {
        **os.environ,
        "GPUYARD_URL": api.url,
        "GPUYARD_API_KEY": api.key,
        **settings.pop("env", {}),
    }
    return subprocess.Popen(
        [sys.executable, "-m", "gpuyard", *arguments],
        cwd=ROOT,
        env=env,
        stdout=settings.pop("stdout", subprocess.PIPE),
        stderr=settings.pop("stderr", subprocess.PIPE),
        text=True,
        **settings,
    )


@contextmanager
def running_on(api: Api, port: int = 0) -> Iterator[int]:
    """The same API once more, on a port of its own or on one that it had before: a restart."""
    listening = socket.create_server(("127.0.0.1", port))
    port = listening.getsockname()[1]
    server = make_server(create_app(api.settings, api.store), "127.0.0.1", port)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    try:
        eventually(lambda: server.started, within=30, what="the server starts")
        yield port
    finally:
        server.should_exit = True
        thread.join(timeout=15)
        assert not thread.is_alive(), "the server did not shut down"
        listening.close()
