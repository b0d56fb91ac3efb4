from __future__ import annotations

import itertools
from datetime import timedelta

from hypothesis import given
from hypothesis import strategies as st

from scheduler.admission import admit, order
from shared.store.snapshot import WaitingJob
from tests.scheduler.fleets import NOW, job, queues


@given(jobs=queues(), shuffle=st.randoms(use_true_random=False))
def test_order_is_priority_then_age_and_does_not_depend_on_the_input(
    jobs: list[WaitingJob], shuffle: st.DataObject
) -> None:
    ordered = order(jobs)
    shuffled = list(jobs)
    shuffle.shuffle(shuffled)  # type: ignore[attr-defined]
    assert order(shuffled) == ordered
    for first, second in itertools.pairwise(ordered):
        assert first.priority >= second.priority
        if first.priority == second.priority:
            assert first.created_at <= second.created_at


def test_a_retry_waits_for_its_time() -> None:
    later = job("a", not_before=NOW + timedelta(seconds=11.2))
    now = job("b", not_before=NOW)
    admission = admit([later, now], NOW)
    assert admission.ready == (now,)
    assert admission.held_back == {"a": "tried again in 12 s"}


def test_a_job_whose_ranks_are_ending_waits() -> None:
    admission = admit([job("a", ranks_ending=True)], NOW)
    assert admission.ready == ()
    assert admission.held_back == {"a": "ranks of its last attempt are still ending"}


@given(
    jobs=st.lists(
        st.builds(
            lambda i, delay, ending: job(
                f"job_{i}",
                not_before=None if delay is None else NOW + timedelta(seconds=delay),
                ranks_ending=ending,
            ),
            st.integers(0, 10**6),
            st.none() | st.floats(-5, 5),
            st.booleans(),
        ),
        unique_by=lambda j: j.id,
    )
)
def test_every_job_is_ready_or_has_a_reason(jobs: list[WaitingJob]) -> None:
    admission = admit(jobs, NOW)
    ready = {j.id for j in admission.ready}
    assert ready.isdisjoint(admission.held_back)
    assert ready | set(admission.held_back) == {j.id for j in jobs}
    assert all(admission.held_back.values())
