"""What is rescued: leases that ran out although their holders could have renewed them."""

from __future__ import annotations

from datetime import datetime, timedelta

from hypothesis import given
from hypothesis import strategies as st

from scheduler.rescue import Contact, decide
from shared.store.rescue import Expired, ExpiredLease
from tests.scheduler.fleets import NOW

TTL = 60.0
LONG_AGO = NOW - timedelta(days=1)


def ago(seconds: float) -> datetime:
    return NOW - timedelta(seconds=seconds)


def lease(expired_ago: float = 5, *, held: bool = True, attempt_over: bool = False) -> ExpiredLease:
    return ExpiredLease(
        job_id="job",
        attempt_id="att",
        token=1,
        rank=0,
        device_id="cpu0@a",
        held=held,
        attempt_over=attempt_over,
        expires_at=ago(expired_ago),
    )


def rescued(*, up_since: datetime = LONG_AGO, contact: datetime = LONG_AGO, **kw: bool) -> bool:
    (verdict,) = decide(Expired((lease(**kw),), NOW, up_since), contact, TTL)
    return verdict.rescue


def test_a_lease_that_ran_out_is_rescued() -> None:
    assert rescued()
    assert rescued(held=False)
    assert rescued(attempt_over=True)


def test_a_restart_of_postgres_gives_a_full_term() -> None:
    assert not rescued(up_since=ago(59))
    assert rescued(up_since=ago(60))


def test_so_does_a_cut_between_scheduler_and_postgres() -> None:
    assert not rescued(contact=ago(59))
    assert rescued(contact=ago(60))


def test_the_reason_says_what_is_waited_for() -> None:
    (verdict,) = decide(Expired((lease(),), NOW, ago(20)), LONG_AGO, TTL)
    assert verdict.reason == "Postgres was away: its holder has 40 s more to renew it"
    reasons = [
        decide(Expired((found,), NOW, LONG_AGO), LONG_AGO, TTL)[0].reason
        for found in (lease(), lease(held=False), lease(attempt_over=True))
    ]
    assert len(set(reasons)) == 3


@given(
    up=st.floats(0, 300),
    contact=st.floats(0, 300),
    renewed=st.floats(0, 300),
    wait=st.floats(0.1, 30),
)
def test_who_renews_in_time_is_never_rescued(
    up: float, contact: float, renewed: float, wait: float
) -> None:
    """A healthy holder renewed last ``renewed`` s ago and tries every few seconds, while it can."""
    away_until = min(up, contact)
    if renewed <= away_until and renewed > TTL:
        return  # it could have renewed since and did not: it is not healthy
    expired_ago = renewed - TTL
    if expired_ago <= 0:
        return
    verdicts = decide(Expired((lease(expired_ago),), NOW, ago(up)), ago(contact), TTL)
    assert verdicts[0].rescue == (away_until >= TTL)


def test_contact_lasts_while_answers_come() -> None:
    contact = Contact(longest_gap=45)
    for second in range(0, 400, 40):
        contact = contact.answered(NOW + timedelta(seconds=second))
    assert contact.since == NOW


def test_contact_is_broken_by_an_error_and_by_standing_still() -> None:
    contact = Contact(longest_gap=45).answered(NOW).lost()
    assert contact.since is None
    later = NOW + timedelta(seconds=10)
    contact = contact.answered(later)
    assert contact.since == later
    suspended = later + timedelta(seconds=46)
    assert contact.answered(suspended).since == suspended
