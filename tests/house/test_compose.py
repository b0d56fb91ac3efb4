"""docker-compose.yml: valid, closed by default, and every command of it works.

There is no Docker engine here, so the containers are not run; what they would run is.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from shared.store import Store
from shared.store.read import list_devices
from tests.stack import eventually

ROOT = Path(__file__).resolve().parents[2]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, Any] = COMPOSE["services"]
SECRETS = {"POSTGRES_PASSWORD", "REDIS_PASSWORD", "FLOWER_PASSWORD"}
VARIABLE = re.compile(r"\$\{(\w+)(:[-?])?([^}]*)\}")


def substitute(text: str, values: dict[str, str]) -> str:
    """``${NAME:-default}`` and ``${NAME:?message}`` as docker compose reads them."""

    def value(match: re.Match[str]) -> str:
        name, operator, rest = match.groups()
        if name in values:
            return values[name]
        assert operator == ":-", f"{name} must be given: {rest}"
        return str(rest)

    return VARIABLE.sub(value, text).replace("$$", "$")


def test_it_is_valid_by_the_compose_schema() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec",
         str(ROOT / "docker-compose.yml")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def test_it_has_every_part() -> None:
    assert set(SERVICES) == {
        "postgres", "redis", "migrate", "api", "scheduler", "worker", "worker-gpu", "flower",
    }  # fmt: skip
    assert SERVICES["worker-gpu"]["profiles"] == ["gpu"]
    reserved = SERVICES["worker-gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert reserved[0]["capabilities"] == ["gpu"]
    assert {n for n, s in SERVICES.items() if "healthcheck" in s} == {
        "postgres", "redis", "api", "flower",
    }  # fmt: skip


def test_nothing_is_published_beyond_loopback_unless_asked_for() -> None:
    for name, service in SERVICES.items():
        for port in service.get("ports", []):
            assert substitute(port, {}).startswith("127.0.0.1:"), f"{name}: {port}"


def test_secrets_come_from_outside_and_are_demanded() -> None:
    text = (ROOT / "docker-compose.yml").read_text()
    for name in SECRETS:
        uses = re.findall(rf"\$\{{{name}(:.)?", text)
        assert uses, name
        assert set(uses) == {":?"}, f"{name} has a default"
    example = (ROOT / ".env.example").read_text()
    assert all(f"{name}=\n" in example for name in SECRETS)


def test_the_images_copy_what_exists_and_the_schedulers_has_no_torch() -> None:
    for service in SERVICES.values():
        if build := service.get("build"):
            dockerfile = ROOT / build["dockerfile"]
            for line in dockerfile.read_text().splitlines():
                if line.startswith("COPY "):
                    for source in line.split()[1:-1]:
                        assert (ROOT / source).exists(), f"{dockerfile.name}: {source}"
    scheduler = (ROOT / "docker/scheduler.Dockerfile").read_text()
    assert "[scheduler,monitor]" in scheduler
    assert "[worker" not in scheduler


@pytest.fixture
def run_service(
    database: str, valkey_url: str, tmp_path: Path
) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Starts the exact command of a service, with its environment; only addresses, ports and paths
    are those of the test."""
    running: list[subprocess.Popen[bytes]] = []

    def run(name: str, **replaced: str) -> subprocess.Popen[bytes]:
        service = SERVICES[name]
        secrets = dict.fromkeys(SECRETS, "not-a-secret")
        argv = [
            replaced.get(part, part)
            for part in (substitute(p, secrets) for p in service["command"])
        ]
        assert argv[0] == "gpuyard"
        environment = {k: substitute(v, secrets) for k, v in service["environment"].items()}
        environment |= {
            "DATABASE_URL": database,
            "BROKER_URL": valkey_url,
            "GPUYARD_DATA": str(tmp_path / "data"),
            "HOME": str(tmp_path),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }
        if "GPUYARD_FLOWER_DB" in environment:
            environment["GPUYARD_FLOWER_DB"] = str(tmp_path / "flower" / "state")
        with (tmp_path / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(argv, env=environment, cwd=ROOT, stdout=log, stderr=log)
        running.append(process)
        return process

    yield run
    for process in reversed(running):
        process.terminate()
    for process in reversed(running):
        process.wait(60)


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def run_healthcheck(name: str, port: str) -> bool:
    """The service's own health check, at the port of the test."""
    test = [
        part.replace(SERVICES[name]["command"][-1], port)
        for part in SERVICES[name]["healthcheck"]["test"]
    ]
    assert test[:2] == ["CMD", "python"]
    return (
        subprocess.run([sys.executable, *test[2:]], capture_output=True, check=False).returncode
        == 0
    )


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_each_command_serves(
    run_service: Callable[..., subprocess.Popen[bytes]], database: str, tmp_path: Path
) -> None:
    def log(name: str) -> str:
        return (tmp_path / f"{name}.log").read_text()

    assert run_service("migrate").wait(60) == 0, log("migrate")
    api, flower = free_port(), free_port()
    run_service("api", **{"0.0.0.0": "127.0.0.1", "8080": api})
    run_service("scheduler")
    run_service("worker")
    run_service("flower", **{"0.0.0.0": "127.0.0.1", "5555": flower})
    eventually(lambda: run_healthcheck("api", api), within=60, what=lambda: log("api"))
    eventually(lambda: run_healthcheck("flower", flower), within=60, what=lambda: log("flower"))
    with urllib.request.urlopen(f"http://127.0.0.1:{api}/healthz", timeout=5) as answer:
        assert answer.status == 200
    store = Store(database)
    try:
        eventually(
            lambda: len(store.call(list_devices)) == 2, within=90, what=lambda: log("worker")
        )
    finally:
        store.close()


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_the_gpu_worker_says_what_is_missing_where_there_is_no_gpu(
    run_service: Callable[..., subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    """``--devices auto`` takes what there is: without a driver, the CPU slots of the host."""
    worker = run_service("worker-gpu")
    log = tmp_path / "worker-gpu.log"
    eventually(
        lambda: worker.poll() is not None or "cpu0@" in log.read_text(),
        within=60,
        what=lambda: log.read_text(),
    )
    assert worker.poll() is None, log.read_text()
