"""The fixtures themselves: fresh databases, an empty broker, a poll that can fail."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import redis
from sqlalchemy import create_engine, inspect, text

from gpuyard.local.servers import ValkeyServer
from tests.stack import eventually


@pytest.mark.parametrize("round", [1, 2])
def test_database_is_migrated_and_fresh(database: str, round: int) -> None:
    engine = create_engine(database)
    with engine.begin() as connection:
        assert "jobs" in inspect(connection).get_table_names()
        assert connection.scalar(text("SELECT count(*) FROM jobs")) == 0
        connection.execute(text("CREATE TABLE left_by_a_test ()"))  # the second round would fail
    engine.dispose()


@pytest.mark.parametrize("round", [1, 2])
def test_valkey_is_empty(valkey_url: str, round: int) -> None:
    with redis.Redis.from_url(valkey_url) as client:
        assert client.dbsize() == 0
        client.set("left", "by a test")


def test_own_valkey_survives_a_kill_at_the_same_url(new_valkey: Callable[[], ValkeyServer]) -> None:
    server = new_valkey()
    url = server.url
    with redis.Redis.from_url(url) as client:
        client.config_set("appendfsync", "always")
        client.set("synced", "yes")
    server.kill()
    server.start()
    assert server.url == url
    with redis.Redis.from_url(url, decode_responses=True) as client:
        assert client.get("synced") == "yes"


def test_eventually_says_what_it_waited_for() -> None:
    with pytest.raises(AssertionError, match=r"waited 0\.05 s in vain for pigs to fly"):
        eventually(lambda: False, 0.05, "pigs to fly")
