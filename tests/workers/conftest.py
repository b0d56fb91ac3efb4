"""Fixtures: a fleet with its own database, broker database and data folder."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis

from gpuyard.local.servers import ValkeyServer
from tests.workers.fleet import Fleet

_broker_numbers = itertools.count(
    900
)  # of the session's Valkey; tests of one function use low ones


@pytest.fixture
def new_fleet(tmp_data: Path) -> Iterator[Callable[..., Fleet]]:
    """Makes a fleet on given servers, with settings of a test's own."""
    fleets: list[Fleet] = []

    def make(database: str, broker: str, **settings: str) -> Fleet:
        fleets.append(Fleet(tmp_data, database, broker, **settings))
        return fleets[-1]

    yield make
    for fleet in fleets:
        fleet.close()


@pytest.fixture(scope="module")
def shared_fleet(
    request: pytest.FixtureRequest,
    new_database: Callable[[], str],
    valkey_server: ValkeyServer,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Fleet]:
    """One for a whole module, with the module's number of CPU slots (``DEVICES``) on host ``one``.
    For tests that break nothing and leave the devices free."""
    devices: int = request.module.DEVICES
    broker = valkey_server.database_url(next(_broker_numbers))
    with redis.Redis.from_url(broker) as client:
        client.flushdb()
    fleet = Fleet(tmp_path_factory.mktemp("shared") / "data", new_database(), broker)
    fleet.start_scheduler()
    fleet.start_host("one", f"--devices=cpu:{devices}", devices=devices)
    yield fleet
    fleet.close()


@pytest.fixture
def fleet(new_fleet: Callable[..., Fleet], database: str, valkey_url: str) -> Fleet:
    """With the scheduler running and no host yet."""
    found = new_fleet(database, valkey_url)
    found.start_scheduler()
    return found
