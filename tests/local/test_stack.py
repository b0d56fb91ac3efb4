"""The stack's own life: one instance a folder, parts that come back, nothing that stays behind."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from gpuyard.connection import INSTANCE_FILE
from gpuyard.local.background import RunningStack, stack, start_stack
from gpuyard.local.instance import read_instance
from gpuyard.local.processes import ProcessId, find_by_arguments, find_by_tag
from gpuyard.local.stack import StackOptions
from shared.errors import AlreadyRunning, Unavailable
from tests.stack import eventually

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def options() -> Iterator[StackOptions]:
    folder = Path(tempfile.mkdtemp(prefix="gpuyard-stack-"))
    yield StackOptions(
        data=folder / "data", devices="cpu:1", api_port=0, flower_port=0, fsync=False
    )
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def running(options: StackOptions) -> Iterator[RunningStack]:
    with stack(options) as found:
        yield found
    assert_nothing_left(options.data)


def assert_nothing_left(data: Path) -> None:
    assert find_by_tag(data) == []
    assert find_by_arguments("postgres", str(data / "postgres" / "data")) == []
    assert find_by_arguments("valkey-server", str(data / "valkey" / "valkey.conf")) == []
    assert not (data / INSTANCE_FILE).exists()


def devices(running: RunningStack) -> list[str]:
    headers = {"Authorization": f"Bearer {running.api_key}"}
    answer = httpx.get(f"{running.api_url}/v1/devices", headers=headers, timeout=10)
    answer.raise_for_status()
    return [device["id"] for device in answer.json()["items"] if device["state"] == "up"]


def ready(running: RunningStack) -> bool:
    try:
        answer = httpx.get(f"{running.api_url}/readyz", timeout=5)
    except httpx.HTTPError:
        return False
    return answer.status_code == 200 and answer.json()["status"] == "ready"


def test_everything_answers_and_secrets_are_private(running: RunningStack) -> None:
    assert ready(running)
    assert len(devices(running)) == 1
    assert set(running.pids()) == {"postgres", "valkey", "api", "scheduler", "workers", "flower"}
    private = [running.data / INSTANCE_FILE, *(running.data / "secrets").iterdir()]
    assert {path.name for path in private} == {INSTANCE_FILE, "api-key", "flower", "valkey"}
    assert {stat.S_IMODE(path.stat().st_mode) for path in private} == {0o600}
    assert stat.S_IMODE(running.data.stat().st_mode) == 0o700


def test_flower_has_a_login(running: RunningStack) -> None:
    instance = running.instance
    password = Path(instance.flower_password_file).read_text()
    url = f"{instance.flower_url}/workers"
    assert httpx.get(url, timeout=10).status_code == 401
    assert httpx.get(url, auth=(instance.flower_user, "guess"), timeout=10).status_code == 401
    assert httpx.get(url, auth=(instance.flower_user, password), timeout=10).status_code == 200
    for pid in running.pids().values():
        line = Path(f"/proc/{pid}/cmdline").read_bytes().decode()
        assert password not in line, "the command line is for everybody to read"


def test_a_second_instance_is_refused(running: RunningStack, options: StackOptions) -> None:
    with pytest.raises(AlreadyRunning) as refused:
        start_stack(options)
    hint = refused.value.hint or ""
    assert f"process {running.instance.pid} and answers at {running.api_url}" in hint
    assert ready(running)


def test_the_demo_may_join_it(running: RunningStack, options: StackOptions) -> None:
    with stack(options, join=True) as joined:
        assert joined.api_url == running.api_url
        assert joined.process is None
    assert ready(running)


@pytest.mark.chaos
@pytest.mark.parametrize("part", ["api", "scheduler", "flower", "valkey", "postgres", "workers"])
def test_a_killed_part_comes_back(running: RunningStack, part: str) -> None:
    before = running.pids()[part]
    os.kill(before, signal.SIGKILL)
    after = eventually(
        lambda: (pid := running.pids().get(part)) != before and pid, 30, f"a new {part}"
    )
    assert after and ProcessId.of(after) is not None
    eventually(lambda: ready(running), 30, "the API to be ready")
    eventually(lambda: devices(running), 60, "the device to be served")
    others = {name: pid for name, pid in running.pids().items() if name != part}
    assert all(ProcessId.of(pid) is not None for pid in others.values())


@pytest.mark.chaos
def test_a_killed_stack_leaves_nothing_and_starts_again(
    running: RunningStack, options: StackOptions
) -> None:
    assert running.process is not None
    pids = running.pids()
    key = running.api_key
    running.process.kill()
    running.process.wait()
    eventually(
        lambda: all(ProcessId.of(pid) is None for pid in pids.values()),
        60,
        lambda: f"{ {n: p for n, p in pids.items() if ProcessId.of(p)} } to end",
    )
    assert read_instance(options.data) is None
    # A process that nothing has ended, as after a SIGKILL of everything at once.
    tag = {**os.environ, "GPUYARD_STACK": str(options.data)}
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], env=tag) as left:
        try:
            eventually(lambda: find_by_tag(options.data), 5, "the left-over to be there")
            with stack(options) as again:
                assert left.poll() is not None, "the left-over process was not ended"
                assert again.api_key == key, "the first start's key is still good"
                assert len(devices(again)) == 1
        finally:
            left.kill()
    assert_nothing_left(options.data)


def test_servers_of_the_environment_are_used(
    options: StackOptions, database: str, valkey_url: str, tmp_path: Path
) -> None:
    other = replace(options, data=tmp_path / "data", flower=False)
    plain = database.replace("postgresql+psycopg://", "postgresql://")
    with stack(other, env={"DATABASE_URL": plain, "BROKER_URL": valkey_url}) as found:
        assert set(found.pids()) == {"api", "scheduler", "workers"}
        assert len(devices(found)) == 1
        environment = Path(f"/proc/{found.pids()['scheduler']}/environ").read_text().split("\0")
        assert f"BROKER_URL={valkey_url}" in environment
    assert not (other.data / "postgres").exists()


def test_a_part_that_cannot_start_is_named_with_its_log(
    options: StackOptions, tmp_path: Path
) -> None:
    other = replace(options, data=tmp_path / "data", devices="gpu:64", flower=False)
    with pytest.raises(Unavailable) as failed:
        start_stack(other)
    assert "workers ended with exit code 2 while starting" in (failed.value.hint or "")
    assert "workers.log" in (failed.value.hint or "")
    assert_nothing_left(other.data)


def test_ctrl_c_while_it_starts_ends_everything(options: StackOptions, tmp_path: Path) -> None:
    data = tmp_path / "data"
    command = [sys.executable, "-m", "gpuyard", "up", "--data", str(data), "--workers", "1"]
    with subprocess.Popen([*command, "--port", "0", "--flower-port", "0"]) as process:
        try:
            eventually(lambda: (data / "logs" / "workers.log").exists(), 60, "the workers to start")
            process.send_signal(signal.SIGINT)
            process.wait(60)
        finally:
            process.kill()
    assert_nothing_left(data)
