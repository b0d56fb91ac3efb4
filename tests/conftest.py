"""Fixtures for all tests: a real Postgres and a real Valkey, started once a session.

- ``database``: URL of a fresh database with the migrations in, for one test (or ``new_database()``
  for any number of them and for other scopes).
- ``valkey_url``: an empty numbered database of the session's Valkey, for one test.
- ``new_valkey``: makes servers of a test's own, to flush, kill and restart.
- ``tmp_data``: a data folder.
"""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest
import redis

from gpuyard.local.servers import PostgresServer, ValkeyServer
from shared.migrate import upgrade
from shared.store import Store

# One thread a process before anything loads torch: rank processes inherit it, and two ranks with
# two threads each on two cores thrash.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
for _variable in [
    name for name in os.environ if name.startswith("GPUYARD_") and name != "GPUYARD_VLLM_PYTHON"
]:
    del os.environ[_variable]
for _variable in ("DATABASE_URL", "BROKER_URL"):
    os.environ.pop(_variable, None)

# Started in the background by a shell, we would have SIGINT ignored, and so would every process that
# a test wants to interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

_numbers = itertools.count(1)


@pytest.fixture(scope="session")
def server_folder() -> Iterator[Path]:
    """Folder of the session's servers; its path is short, as sockets need."""
    folder = Path(tempfile.mkdtemp(prefix="gpuyard-test-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def postgres_server(server_folder: Path) -> Iterator[PostgresServer]:
    """The session's Postgres. It does not sync to disk. Do not stop it: others use it."""
    with PostgresServer(server_folder, fsync=False) as server:
        yield server


@pytest.fixture(scope="session")
def postgres_url(postgres_server: PostgresServer) -> str:
    """SQLAlchemy URL of the session's Postgres, of a database that nobody fills."""
    return postgres_server.url


@pytest.fixture(scope="session")
def new_database(postgres_server: PostgresServer) -> Callable[[], str]:
    """Makes databases with all migrations in, in some 30 ms each: copies of a migrated one."""
    _execute(postgres_server, "CREATE DATABASE migrated")
    upgrade(postgres_server.database_url("migrated"))

    def make() -> str:
        name = f"test_{next(_numbers)}"
        _execute(postgres_server, f"CREATE DATABASE {name} TEMPLATE migrated STRATEGY FILE_COPY")
        return postgres_server.database_url(name)

    return make


@pytest.fixture
def database(new_database: Callable[[], str], postgres_server: PostgresServer) -> Iterator[str]:
    """SQLAlchemy URL of a fresh, migrated database; dropped afterwards, whoever is connected."""
    url = new_database()
    yield url
    name = url.partition("@/")[2].partition("?")[0]
    _execute(postgres_server, f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")


@pytest.fixture
def store(database: str) -> Iterator[Store]:
    """The job store on a fresh database."""
    found = Store(database)
    yield found
    found.close()


@pytest.fixture(scope="session")
def valkey_server(server_folder: Path) -> Iterator[ValkeyServer]:
    """The session's Valkey. Do not flush all or stop it: others use it."""
    with ValkeyServer(server_folder) as server:
        yield server


@pytest.fixture
def valkey_url(valkey_server: ValkeyServer) -> str:
    """URL of an empty numbered database. ``FLUSHDB`` is yours, ``FLUSHALL`` is not."""
    url = valkey_server.database_url(next(_numbers) % 1024)
    with redis.Redis.from_url(url) as client:
        client.flushdb()
    return url


@pytest.fixture
def new_valkey(tmp_path: Path) -> Iterator[Callable[[], ValkeyServer]]:
    """Starts Valkey servers of the test's own: flush, ``stop()``, ``kill()``, ``start()`` them.
    The URL survives restarts."""
    servers: list[ValkeyServer] = []

    def make() -> ValkeyServer:
        server = ValkeyServer(tmp_path / f"valkey-{len(servers)}")
        server.start()
        servers.append(server)
        return server

    yield make
    for server in servers:
        server.stop()


@pytest.fixture
def new_postgres(tmp_path: Path) -> Iterator[Callable[[], PostgresServer]]:
    """Starts migrated Postgres servers of the test's own: ``stop()``, ``kill()``, ``start()`` them.
    The URL survives restarts."""
    servers: list[PostgresServer] = []

    def make() -> PostgresServer:
        server = PostgresServer(tmp_path / f"postgres-{len(servers)}", fsync=False)
        upgrade(server.start())
        servers.append(server)
        return server

    yield make
    for server in servers:
        server.stop()


@pytest.fixture
def tmp_data(tmp_path: Path) -> Path:
    """An empty data folder, as ``GPUYARD_DATA`` names it."""
    folder = tmp_path / "data"
    folder.mkdir()
    return folder


def _execute(server: PostgresServer, statement: str) -> None:
    conninfo = server.database_url("postgres").replace("postgresql+psycopg", "postgresql")
    with psycopg.connect(conninfo, autocommit=True) as connection:
        connection.execute(statement)  # type: ignore[call-overload]
