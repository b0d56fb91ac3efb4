"""Which devices are suspect: those that are heard of, and take nothing while others do."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from sqlalchemy import text

from scheduler.rescue import rescue_expired
from scheduler.suspicion import RINGS, judge
from shared.store import Store
from shared.store.claim import Claimed, Refusal, claim_rank
from shared.store.dispatch import mark_published
from shared.store.read import events_after
from shared.store.rescue import Unclaimed
from shared.store.snapshot import take_snapshot
from tests.scheduler.fleets import NOW
from tests.store import world

DEAF = Unclaimed(
    worker_id="wrk", live=True, served_since_dispatch=True, rings=RINGS, others_claimed=1
)


def test_a_deaf_device_is_suspect_with_its_reason() -> None:
    suspicion = judge(DEAF)
    assert suspicion.suspect
    assert suspicion.reason == "idle, it took no job in 3 hints while others claimed a rank"


@pytest.mark.parametrize(
    ("explained", "why"),
    [
        ({"live": False}, "not heard of"),
        ({"served_since_dispatch": False}, "started meanwhile"),
        ({"rings": RINGS - 1}, "took the hint 2 of 3 times"),
        ({"others_claimed": 0}, "it may be the broker"),
    ],
)
def test_what_else_explains_the_silence_clears_the_device(
    explained: dict[str, Any], why: str
) -> None:
    suspicion = judge(replace(DEAF, **explained))
    assert not suspicion.suspect
    assert why in suspicion.reason


class Silence:
    """A gang of two of which one device claims and the other, ``cpu1@a``, does not, in time."""

    def __init__(self, store: Store, rings: int = RINGS) -> None:
        self.store = store
        self.workers = [world.register(store, f"cpu{i}@a") for i in range(3)]
        self.job = world.submit(store, world.needs(devices=2))
        self.send(rings)

    def send(self, rings: int = RINGS) -> None:
        pairs = [(f"cpu{i}@a", f"device.cpu{i}@a") for i in range(2)]
        attempt = world.send(self.store, self.job, *pairs)
        self.hints = world.hints(self.store, attempt.id)
        for rank in range(2):
            for _ in range(rings):
                self.store.call(mark_published, attempt.id, rank, 1)

    def claim_first(self) -> None:
        world.claim(self.store, self.hints[0], "cpu0@a", self.workers[0])

    def run_out(self) -> None:
        """The time to claim is over."""
        with self.store.transaction() as session:
            session.execute(
                text("UPDATE leases SET expires_at = now() - interval '1 s' WHERE state='reserved'")
            )
        # A short lease: Postgres may have started just now, and leases get a full term after that.
        settings = world.settings(self.store.url, lease_ttl=0.02, lease_renew_every=0.01)
        term = world.become_leader(self.store)
        assert rescue_expired(self.store, term, NOW.replace(year=2020), settings)

    def live(self) -> list[str]:
        return [d.id for d in self.store.call(take_snapshot, 60).devices if d.live]

    def told(self) -> list[str]:
        return [
            event.message
            for event in self.store.call(events_after, self.job, 0)
            if event.type == "device_suspect"
        ]


@pytest.fixture
def silence(store: Store) -> Silence:
    found = Silence(store)
    found.claim_first()
    return found


def test_the_one_that_never_joined_is_passed_over(silence: Silence) -> None:
    silence.run_out()
    assert silence.live() == ["cpu0@a", "cpu2@a"]
    (message,) = silence.told()
    assert message.startswith("cpu1@a gets no work for now, it seems deaf: idle, it took no job")


def test_nobody_is_suspect_while_the_broker_may_be_away(store: Store) -> None:
    nobody_claims = Silence(store)
    nobody_claims.run_out()
    assert nobody_claims.live() == ["cpu0@a", "cpu1@a", "cpu2@a"]
    assert nobody_claims.told() == []


def test_a_restart_of_its_worker_clears_it(silence: Silence, store: Store) -> None:
    silence.run_out()
    world.register(store, "cpu1@a")
    assert "cpu1@a" in silence.live()


def test_a_claim_clears_it(silence: Silence, store: Store) -> None:
    """It hears the queue of its class, and so what was meant for another."""
    silence.run_out()
    other = world.send(store, world.submit(store), ("cpu2@a", "cpu"))
    (hint,) = world.hints(store, other.id)
    claimed = store.call(claim_rank, hint, "cpu1@a", silence.workers[1], 60)
    assert isinstance(claimed, Claimed)
    assert "cpu1@a" in silence.live()


def test_a_hint_that_comes_late_clears_it(silence: Silence, store: Store) -> None:
    """Its own queue is full of what it did not hear; none of it leads to a claim any more."""
    silence.run_out()
    late = store.call(claim_rank, silence.hints[1], "cpu1@a", silence.workers[1], 60)
    assert late is Refusal.STALE
    assert "cpu1@a" in silence.live()


def test_it_is_tried_again_after_a_while_and_then_is_suspect_anew(
    silence: Silence, store: Store
) -> None:
    silence.run_out()
    with store.transaction() as session:
        session.execute(text("UPDATE devices SET suspect_until = now() WHERE id = 'cpu1@a'"))
        session.execute(text("UPDATE leases SET state = 'released', released_at = now()"))
    assert "cpu1@a" in silence.live()
    silence.send()
    silence.claim_first()
    silence.run_out()
    assert silence.live() == ["cpu0@a", "cpu2@a"]
    assert len(silence.told()) == 2
