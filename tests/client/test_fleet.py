"""What the command line says of devices."""

from __future__ import annotations

from collections.abc import Callable

from sqlalchemy import text

from shared.store import Store
from tests.api.fake_worker import FakeFleet
from tests.client.conftest import Said

Cli = Callable[..., Said]


def test_simulated_devices_are_marked(cli: Cli, fleet: FakeFleet) -> None:
    fleet.add_device("gpu0@fake", simulated=True)
    lines = {line.split()[0]: line for line in cli("workers").out.splitlines()}
    assert "sim" in lines["gpu0@fake"]
    assert "sim" not in lines["cpu0@fake"]


def test_a_suspect_device_says_why(cli: Cli, fleet: FakeFleet, store: Store) -> None:
    with store.transaction() as session:
        session.execute(
            text(
                "UPDATE devices SET suspect_until = now() + interval '5 min',"
                " suspect_reason = 'idle, it took no job in 9 hints while others claimed 2 ranks'"
                " WHERE id = 'cpu0@fake'"
            )
        )
    said = cli("workers")
    lines = {line.split()[0]: line for line in said.out.splitlines()}
    assert " suspect " in lines["cpu0@fake"]
    assert "cpu0@fake gets no work, it seems deaf: idle, it took no job in 9 hints" in said.err
    assert "a restart of its worker clears it" in said.err
