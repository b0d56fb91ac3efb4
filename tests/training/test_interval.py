"""How often checkpoints are made where the spec leaves it open, and that it is told."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from shared.messages import CheckpointWritten, Notice
from shared.specs import Checkpointing
from tests.training.harness import Gang, make_assignment
from workers.ranks.train.interval import (
    LONGEST,
    SHORTEST,
    Cost,
    Interval,
    choose_interval,
    duration,
)

DAY = 86400.0


def test_it_is_youngs_and_dalys() -> None:
    assert choose_interval(2.0, 1.0, DAY) == pytest.approx(math.sqrt(2 * 2 * DAY))
    # Where it is, losing half an interval at every failure costs as much as the checkpoints do.
    chosen = choose_interval(2.0, 1.0, DAY)
    assert 2.0 / chosen == pytest.approx(chosen / 2 / DAY)


@pytest.mark.parametrize(
    ("cost", "writing", "between_failures", "expected"),
    [
        (0.0, 0.0, DAY, SHORTEST),
        (0.001, 0.1, DAY, SHORTEST),
        (600.0, 10.0, 30 * DAY, LONGEST),
        (0.1, 240.0, DAY / 4, 240.0),
        (0.1, 2 * LONGEST, DAY, 2 * LONGEST),
    ],
)
def test_it_has_bounds(
    cost: float, writing: float, between_failures: float, expected: float
) -> None:
    assert choose_interval(cost, writing, between_failures) == expected


def test_it_is_told_when_it_is_known_and_when_it_changes() -> None:
    interval = Interval(Checkpointing(), 7 * DAY, 2_000_000_000)
    assert interval.automatic
    assert interval.seconds == pytest.approx(math.sqrt(2 * 2.0 * 7 * DAY)), "by the size"
    said = interval.measured(0.12, 1.4)
    assert said == (
        "a checkpoint costs 0.12 s and is durable after 1.40 s, and a failure is to be expected every "
        "7.0 days: one every 6 min"
    )
    assert interval.seconds == pytest.approx(381, abs=1)
    assert interval.measured(0.2, 1.4) is None, "nearly the same"
    assert interval.seconds == pytest.approx(492, abs=1)
    assert "one every 20 min" in (interval.measured(1.2, 1.4) or "")


@pytest.mark.parametrize(
    ("rules", "seconds"),
    [
        ({"every_seconds": 90}, 90),
        ({"every_seconds": None}, None),
        ({"every_steps": 5}, None),
        ({"every_steps": 5, "every_seconds": 90}, 90),
    ],
)
def test_the_spec_has_the_last_word(rules: dict[str, float], seconds: float | None) -> None:
    # As a stored spec has it, in which every field is set.
    given = Checkpointing.model_validate(Checkpointing.model_validate(rules).model_dump())
    interval = Interval(given, DAY, 1_000_000)
    assert interval.seconds == seconds
    assert interval.measured(5.0, 5.0) is None
    assert interval.seconds == seconds


def test_the_cost_is_the_wait_and_what_steps_take_longer() -> None:
    cost = Cost()
    for seconds in (1.0, 1.2, 0.8, 9.0, 1.0):
        cost.step(seconds, writing=False)
    cost.waited(0.5)
    assert cost.seconds is None
    cost.step(1.5, writing=True)
    cost.step(1.2, writing=True)
    assert cost.seconds is None
    cost.step(1.0, writing=False)
    assert cost.seconds == pytest.approx(0.5 + 0.5 + 0.2)
    cost.waited(0.3)  # written before the next step was over, and steps beside it were fast
    cost.step(0.9, writing=True)
    cost.waited(2.0)
    assert cost.seconds == pytest.approx((1.2 + 0.3) / 2)
    cost.step(1.0, writing=False)
    assert cost.seconds == pytest.approx(1.2), "the median, that one is no rule"


def test_durations_are_for_people() -> None:
    assert [duration(s) for s in (42, 400, 7300, 600_000)] == ["42 s", "7 min", "2.0 h", "6.9 days"]


def test_a_training_says_what_it_chose(
    tmp_path: Path, bert: Path, train_file: Path, validation_file: Path
) -> None:
    """The best models make checkpoints, by which the interval is measured."""
    gang = Gang(
        make_assignment(
            tmp_path, bert, train_file, ranks=2, validation=validation_file,
            checkpoint={"keep": 1}, early_stopping={"patience": 50}, max_steps=60,
            eval_every_steps=10, batch_size=16, learning_rate=3e-3,
        )
    ).run()  # fmt: skip
    assert gang.of(CheckpointWritten)
    assert "checkpoints: every 30 s or so" in gang.log.read_text()
    notice, *_ = [n for n in gang.of(Notice) if n.code == "checkpoint_interval"]
    assert notice.message.startswith("a checkpoint costs 0.")
    assert "a failure is to be expected every 3.5 days: one every " in notice.message
    assert notice.data["seconds"] >= SHORTEST
    assert notice.data["cost"] > 0 and notice.data["durable_after"] > 0
