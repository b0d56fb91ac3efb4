"""The learning rate: a function of the step that rises, falls and never wastes an update."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.specs import Hyperparameters
from workers.ranks.train.schedule import Schedule, make_schedule

KINDS = st.sampled_from(["linear", "cosine", "constant"])


@given(KINDS, st.integers(0, 50), st.integers(1, 200), st.floats(1e-6, 1.0))
def test_it_rises_to_the_peak_then_never_rises(
    kind: str, warmup: int, rest: int, peak: float
) -> None:
    schedule = Schedule(kind, peak, warmup, warmup + rest)
    rates = [schedule.rate(step) for step in range(warmup + rest)]
    assert all(0 < rate <= peak for rate in rates)
    rising, falling = rates[: warmup + 1], rates[warmup:]
    assert rising == sorted(rising)
    assert falling == sorted(falling, reverse=True)
    assert rates[warmup] == pytest.approx(peak)
    if kind == "constant":
        assert set(falling) == {peak}
    else:
        assert schedule.rate(warmup + rest) == pytest.approx(0, abs=1e-12)


def test_half_way_down() -> None:
    assert Schedule("linear", 1.0, 10, 30).rate(20) == pytest.approx(0.5)
    assert Schedule("cosine", 1.0, 10, 30).rate(20) == pytest.approx(0.5)
    assert Schedule("cosine", 1.0, 10, 30).rate(15) == pytest.approx(0.853553, abs=1e-6)
    assert Schedule("linear", 1.0, 3, 30).rate(0) == pytest.approx(0.25)


def test_warm_up_as_a_ratio_or_in_steps() -> None:
    assert make_schedule(Hyperparameters(warmup_ratio=0.1), 200).warmup_steps == 20
    assert make_schedule(Hyperparameters(warmup_steps=7), 200).warmup_steps == 7
    assert make_schedule(Hyperparameters(), 200).warmup_steps == 0
    with pytest.raises(ValueError, match="warmup_steps 200 is not below the 200 steps"):
        make_schedule(Hyperparameters(warmup_steps=200), 200)
