"""The embedded servers: one owner, found again, ended for sure, for root and for others."""

from __future__ import annotations

import json
import os
import pwd
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest
import redis
from sqlalchemy import create_engine, text

from gpuyard.local.privileges import as_account
from gpuyard.local.processes import ProcessId, find_by_arguments
from gpuyard.local.servers import PostgresServer, ValkeyServer
from shared.errors import AlreadyRunning
from tests.stack import eventually

ROOT = Path(__file__).resolve().parents[2]
OWNER = Path(__file__).with_name("servers_process.py")


@pytest.fixture
def folder() -> Iterator[Path]:
    """A data folder whose path is short enough for a socket."""
    path = Path(tempfile.mkdtemp(prefix="gpuyard-srv-"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@contextmanager
def owner(folder: Path, *arguments: str) -> Iterator[tuple[subprocess.Popen[str], dict[str, int]]]:
    """A process that owns both servers of ``folder``, and their process ids."""
    command = [sys.executable, str(OWNER), str(folder), *arguments]
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stdout is not None
            yield process, json.loads(process.stdout.readline())
        finally:
            process.kill()


def postmasters(folder: Path) -> list[ProcessId]:
    return find_by_arguments("postgres", str(folder / "postgres" / "data"))


def test_data_is_found_again_and_nothing_is_left(folder: Path) -> None:
    with PostgresServer(folder, fsync=False) as server:
        url, pid = server.url, server.pid
        assert pid is not None
        engine = create_engine(url)
        with engine.begin() as connection:
            connection.execute(text("CREATE TABLE kept AS SELECT 42 AS answer"))
        engine.dispose()
    assert ProcessId.of(pid) is None
    assert postmasters(folder) == []
    with PostgresServer(folder, fsync=False) as server:
        engine = create_engine(server.url)
        with engine.connect() as connection:
            assert connection.scalar(text("SELECT answer FROM kept")) == 42
        engine.dispose()


def test_a_second_owner_is_refused(folder: Path) -> None:
    with owner(folder) as (process, pids):
        for second in (PostgresServer(folder, fsync=False), ValkeyServer(folder)):
            with pytest.raises(AlreadyRunning, match=f"in use by process {process.pid}"):
                second.start()
        assert all(ProcessId.of(pid) is not None for pid in pids.values())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_servers_end_with_their_owner(folder: Path, number: signal.Signals) -> None:
    with owner(folder) as (process, pids):
        process.send_signal(number)
        process.wait()
        eventually(
            lambda: all(ProcessId.of(pid) is None for pid in pids.values()),
            10,
            f"the servers {pids} to end",
        )


def test_left_over_servers_are_ended_before_new_ones_start(folder: Path) -> None:
    with owner(folder, "thread") as (process, pids):
        process.kill()
        process.wait()
        left = [ProcessId.of(pid) for pid in pids.values()]
        assert None not in left, "the fault did not strike: no server outlived its owner"
        with PostgresServer(folder, fsync=False) as postgres, ValkeyServer(folder) as valkey:
            assert not any(server.alive() for server in left if server is not None)
            assert [server.pid for server in postmasters(folder)] == [postgres.pid]
            with redis.Redis.from_url(valkey.url) as client:
                assert client.ping()


def test_a_pid_file_that_names_a_stranger_does_no_harm(folder: Path) -> None:
    with PostgresServer(folder, fsync=False) as server:
        server.kill()
        pid_file = folder / "postgres" / "data" / "postmaster.pid"
        lines = pid_file.read_text().splitlines()
        pid_file.write_text("\n".join([str(os.getppid()), *lines[1:]]) + "\n")
        server.start()
        with psycopg.connect(server.url.replace("+psycopg", "")) as connection:
            assert connection.execute("SELECT 1").fetchone() == (1,)


def test_a_long_path_gets_a_short_socket(folder: Path) -> None:
    deep = folder / ("d" * 100) / ("e" * 100) / "with space"
    with PostgresServer(deep, fsync=False) as server:
        sockets = Path(server.url.partition("host=")[2])
        assert sockets.parent == Path("/tmp")  # noqa: S108
        assert stat.S_IMODE(sockets.stat().st_mode) == 0o700
        with psycopg.connect(server.url.replace("+psycopg", "")) as connection:
            assert connection.execute("SELECT 1").fetchone() == (1,)
    assert not sockets.exists()


def test_valkey_is_private_and_never_evicts(folder: Path) -> None:
    with ValkeyServer(folder) as server:
        with (
            pytest.raises(redis.AuthenticationError),
            redis.Redis(host="127.0.0.1", port=server.port) as stranger,
        ):
            stranger.ping()
        with redis.Redis.from_url(server.url, decode_responses=True) as client:
            assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
            assert client.config_get("bind") == {"bind": "127.0.0.1"}
            assert client.config_get("appendonly") == {"appendonly": "yes"}
    for path in (folder / "secrets" / "valkey", folder / "valkey" / "valkey.conf"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE((folder / "secrets").stat().st_mode) == 0o700


def test_a_damaged_valkey_file_is_put_aside(folder: Path) -> None:
    with ValkeyServer(folder):
        pass
    part = next((folder / "valkey" / "appendonlydir").glob("*.aof"))
    part.write_bytes(b"*3\r\n$3\r\nSET\r\nno protocol at all\r\n" * 9)
    with ValkeyServer(folder) as server, redis.Redis.from_url(server.url) as client:
        assert client.ping()
    assert list((folder / "valkey").glob("damaged-*"))


@pytest.mark.parametrize("home", [None, "/nonexistent"])
def test_nothing_is_needed_of_the_environment(folder: Path, home: str | None) -> None:
    environment = {"PYTHONPATH": str(ROOT)} | ({"HOME": home} if home else {})
    done = subprocess.run(
        [sys.executable, str(OWNER), str(folder), "stop"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout).keys() == {"postgres", "valkey"}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_root_and_an_ordinary_user_can_both_run_them(folder: Path, tmp_path: Path) -> None:
    nobody = pwd.getpwnam("nobody")
    theirs, ours = folder / "theirs", folder / "ours"
    theirs.mkdir()
    os.chown(theirs, nobody.pw_uid, nobody.pw_gid)
    folder.chmod(0o755)
    closed_before = stat.S_IMODE(tmp_path.stat().st_mode)

    def run(path: Path, wrap: Callable[[list[str]], list[str]]) -> None:
        done = subprocess.run(
            wrap([sys.executable, str(OWNER), str(path), "stop"]),
            env={"PYTHONPATH": str(ROOT), "HOME": "/nonexistent"},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr

    # as_account also gets the interpreter past folders that are closed to others.
    run(theirs, lambda command: as_account(command, nobody))
    assert (theirs / "postgres").stat().st_uid == nobody.pw_uid
    run(ours, lambda command: command)
    assert (ours / "postgres").stat().st_uid != 0
    # And in a folder that only root may enter, which stays as closed as it was.
    run(tmp_path / "root", lambda command: command)
    assert stat.S_IMODE(tmp_path.stat().st_mode) == closed_before
    # Root can go on with what an ordinary user began.
    run(theirs, lambda command: command)
    assert (theirs / "postgres").stat().st_uid == nobody.pw_uid
