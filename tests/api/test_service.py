"""Keys, health, envelopes, and the commands of the process."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from gpuyard.local.servers import PostgresServer, ValkeyServer
from scheduler.api.errors import request_id
from shared.settings import Settings
from shared.store import Store
from shared.store.keys import create_key, revoke_key
from tests.api.conftest import Api, error_of, running
from tests.stack import eventually


def test_keys(api: Api, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scheduler.api.keys.CACHE_SECONDS", 0.5)
    with httpx.Client(base_url=api.url) as client:
        bare = client.get("/v1/jobs")
        error_of(bare, 401, "authentication_failed")
        assert bare.headers["www-authenticate"] == "Bearer"
        basic = client.get("/v1/jobs", headers={"Authorization": "Basic abc"})
        assert "Bearer" in error_of(basic, 401, "authentication_failed")["message"]
        wrong = client.get("/v1/jobs", headers={"Authorization": "Bearer gy_wrong"})
        error_of(wrong, 401, "authentication_failed")
        # Asked before the body is looked at.
        error_of(client.post("/v1/jobs", content=b"{"), 401, "authentication_failed")
        assert client.get("/docs").status_code == 200
    id, key = store.call(create_key, "short-lived")
    with api.client(key) as client:
        assert client.get("/v1/jobs").status_code == 200
        assert store.call(revoke_key, id)
        eventually(lambda: client.get("/v1/jobs").status_code == 401, what="a revoked key ends")


def test_no_answer_waits_for_an_acknowledgement(api: Api) -> None:
    """With Nagle's algorithm on, every answer after the first takes 40 ms more."""
    with api.client() as client:
        assert client.get("/v1/jobs").status_code == 200
        (connection,) = api.server.server_state.connections
        sock = connection.transport.get_extra_info("socket")  # type: ignore[union-attr]
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1


def test_authentication_can_be_off(settings: Settings, store: Store) -> None:
    with (
        running(settings.model_copy(update={"auth": False}), store) as api,
        httpx.Client(base_url=api.url) as client,
    ):
        assert client.get("/v1/jobs").status_code == 200


def test_what_is_not_there_has_the_envelope(client: httpx.Client) -> None:
    error_of(client.get("/v1/nothing"), 404, "not_found")
    error_of(client.get("/elsewhere"), 404, "not_found")
    error_of(client.delete("/v1/jobs"), 405, "method_not_allowed")


def test_the_unforeseen_has_the_envelope_and_is_logged_with_its_id(
    client: httpx.Client, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("secret detail")

    monkeypatch.setattr("shared.store.read.list_jobs", broken)
    caplog.set_level(logging.INFO, logger="gpuyard.api")
    answer = client.get("/v1/jobs", headers={"X-Request-Id": "mine-17"})
    assert error_of(answer, 500, "internal_error")["request_id"] == "mine-17"
    assert "secret detail" not in answer.text
    assert any("secret detail" in str(r.exc_info) for r in caplog.records)
    odd = client.get("/healthz", headers={"X-Request-Id": "x" * 300})
    assert odd.headers["x-request-id"].startswith("req_")
    assert request_id.get() is None


def test_health(
    database: str, make_settings: Callable[..., Settings], store: Store, valkey_url: str
) -> None:
    with (
        running(make_settings(database, valkey_url), store) as api,
        httpx.Client(base_url=api.url, timeout=60) as client,
    ):
        assert client.get("/healthz").json()["status"] == "ok"
        ready = client.get("/readyz")
        assert (ready.status_code, ready.json()["status"]) == (200, "ready")


def test_without_a_broker_it_is_degraded_and_takes_jobs(
    client: httpx.Client, infer_spec: Callable[..., dict[str, Any]]
) -> None:
    ready = client.get("/readyz")
    assert (ready.status_code, ready.json()["status"]) == (200, "degraded")
    assert ready.json()["checks"] == {"postgres": "ok", "broker": "cannot be reached"}
    assert client.post("/v1/jobs", json=infer_spec()).status_code == 201


# --- the process -------------------------------------------------------------------------------


def environment(database: str, data: Path) -> dict[str, str]:
    return {
        **os.environ,
        "DATABASE_URL": database,
        "BROKER_URL": "redis://127.0.0.1:1/0",
        "GPUYARD_DATA": str(data),
    }


def command(database: str, data: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "scheduler", *words],
        env=environment(database, data), capture_output=True, text=True, timeout=60,
    )  # fmt: skip


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@contextmanager
def process(database: str, data: Path, port: int) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """``python -m scheduler api``, and where its stderr goes."""
    said = data / "stderr"
    with said.open("wb") as stderr:
        child = subprocess.Popen(
            [sys.executable, "-m", "scheduler", "api", "--port", str(port)],
            env=environment(database, data), stderr=stderr,
        )  # fmt: skip
        try:
            yield child, said
        finally:
            child.kill()
            child.wait()


def answers(url: str) -> int:
    try:
        return httpx.get(url, timeout=10).status_code
    except httpx.TransportError:
        return 0


def test_keys_are_made_listed_and_revoked_on_the_command_line(
    database: str, tmp_data: Path
) -> None:
    made = json.loads(
        command(
            database, tmp_data, "keys", "create", "--name", "me", "--project", "x-1", "--json"
        ).stdout
    )
    assert made["key"].startswith("gy_")
    listed = command(database, tmp_data, "keys", "list", "--json")
    assert [(k["id"], k["name"], k["project"]) for k in json.loads(listed.stdout)] == [
        (made["id"], "me", "x-1")
    ]
    assert made["key"] not in listed.stdout
    assert command(database, tmp_data, "keys", "revoke", made["id"]).returncode == 0
    again = command(database, tmp_data, "keys", "revoke", made["id"])
    assert again.returncode == 3
    assert "Traceback" not in again.stderr


def test_a_setting_that_is_wrong_is_a_line_and_an_exit_code(tmp_data: Path) -> None:
    wrong = command("sqlite:///x", tmp_data, "keys", "list")
    assert wrong.returncode == 2
    assert "DATABASE_URL" in wrong.stderr
    assert "Traceback" not in wrong.stderr


def test_it_starts_before_postgres_does_and_ends_cleanly(
    new_postgres: Callable[[], PostgresServer], tmp_data: Path
) -> None:
    postgres = new_postgres()
    url = postgres.url
    postgres.stop()
    port = free_port()
    with process(url, tmp_data, port) as (child, said):
        base = f"http://127.0.0.1:{port}"
        eventually(lambda: answers(f"{base}/healthz") == 200, what="it listens")
        assert answers(f"{base}/readyz") == 503
        refused = httpx.get(f"{base}/v1/jobs", headers={"Authorization": "Bearer x"})
        assert error_of(refused, 503, "unavailable")
        eventually(
            lambda: "waiting: Postgres cannot be reached" in said.read_text(), what="it says so"
        )
        postgres.start()
        eventually(lambda: answers(f"{base}/readyz") == 200, what="it is ready")
        assert answers(f"{base}/v1/jobs") == 401
        assert child.poll() is None, "it never ended"
        child.send_signal(signal.SIGTERM)
        assert child.wait(timeout=30) == 0
    assert "Traceback" not in said.read_text()


def test_a_port_that_is_taken(database: str, tmp_data: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        refused = command(database, tmp_data, "api", "--port", port)
    assert refused.returncode == 2
    assert "cannot listen" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_a_broker_that_dies_and_comes_back(
    database: str,
    make_settings: Callable[..., Settings],
    store: Store,
    new_valkey: Callable[[], ValkeyServer],
) -> None:
    valkey = new_valkey()
    with running(make_settings(database, valkey.url), store) as api:
        ready = f"{api.url}/readyz"
        assert httpx.get(ready).json()["status"] == "ready"
        valkey.kill()
        assert httpx.get(ready).json()["status"] == "degraded"
        valkey.start()
        eventually(lambda: httpx.get(ready).json()["status"] == "ready", what="it is back")
