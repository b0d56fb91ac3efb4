"""The history of a training lies in its checkpoints, thinned, and rewinds with them."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from shared.messages import CheckpointWritten, EndedAttempt, Progress, Report
from tests.training.harness import Gang, make_assignment
from workers.ranks.train import history
from workers.ranks.train.history import POINTS, Sample, points
from workers.ranks.train.order import plan_batches
from workers.ranks.train.pace import Pace

SAMPLE = Sample(
    loss=1.0, norm=2.0, rate=1e-3, examples=8, tokens=100.0, seconds=0.5, memory=7, at=1000.0
)


def course(total: int, loss: Any = lambda step: 1 / step) -> list[history.Row]:
    rows: list[history.Row] = []
    for step in range(1, total + 1):
        history.add(rows, step, total, replace(SAMPLE, loss=loss(step)))
    return rows


def test_it_is_thinned_to_means_that_leave_no_step_out() -> None:
    for total in (1, 2, POINTS, POINTS + 1, 7777):
        rows = course(total)
        assert len(rows) <= POINTS and rows[-1][0] == total
        assert sum(row[1] for row in rows) == total
        found = points(rows)
        assert math.isclose(found[-1].seconds, total * 0.5, rel_tol=1e-5)
        assert {point.examples_per_second for point in found} == {16.0}
    assert len(json.dumps(course(7777))) < 50_000


def test_a_loss_that_is_no_number_leaves_a_gap() -> None:
    found = points(course(3, loss=lambda step: math.nan if step == 2 else 1.0))
    assert [point.loss for point in found] == [1.0, None, 1.0]


def test_going_on_from_json_in_the_middle_of_a_row_changes_nothing() -> None:
    total, rows = 1301, list[history.Row]()
    for step in range(1, total + 1):
        rows = json.loads(json.dumps(rows)) if step % 7 == 0 else rows
        history.add(rows, step, total, replace(SAMPLE, loss=1 / step))
    assert rows == course(total)


def test_the_time_left_counts_the_evaluations_that_are_due() -> None:
    plan = plan_batches(
        examples=100, ranks=1, global_batch=10, micro_batch=None, epochs=3, max_steps=25
    )
    pace, now = Pace(plan, evaluate_every=10), 100.0
    pace.step(now, 9.0)  # the first one is slow
    for _ in range(9):
        now += 2.0
        pace.step(now, 1.0)
    assert pace.left(10) == 15 * 2.0
    pace.evaluation(now + 30, 30.0)
    assert pace.left(10) == 15 * 2.0 + 3 * 30.0
    pace.step(now + 32, 1.0)
    assert pace.left(11) == 14 * 2.0 + 2 * 30.0
    assert pace.left(25) == 30.0, "the last evaluation is still to come"
    assert Pace(plan, None).left(25) == 0


def test_it_rewinds_with_the_checkpoint_that_is_gone_on_from(
    tmp_path: Path, bert: Path, train_file: Path, validation_file: Path
) -> None:
    def run(name: str, **options: Any) -> Gang:
        assignment = make_assignment(
            tmp_path / name,
            bert,
            train_file,
            validation=validation_file,
            max_steps=24,
            batch_size=16,
            checkpoint={"every_steps": 5, "every_seconds": None, "keep": 9},
            **options,
        )
        return Gang(assignment)

    def kill(gang: Gang) -> Gang:
        def strike(rank: int, report: Report) -> None:
            if isinstance(report, CheckpointWritten) and report.step == 10:
                gang.kill(rank)

        return gang.run(on_report=strike)

    whole = run("whole").run()
    killed = kill(run("killed"))
    again = run("again", resume_from=killed.checkpoints[-2:])
    ended = EndedAttempt(
        number=1, ranks=1, failure_class="infrastructure", code="killed", message="SIGKILL"
    )
    again.assignment = again.assignment.model_copy(update={"attempt": 2, "ended": (ended,)})
    again.run()
    place = state(again)
    assert learned(place) == learned(state(whole))
    assert [(a["number"], a["step"]) for a in place["attempts"]] == [(1, 0), (2, 10)]
    told = again.of(Progress)[-1]
    assert told.memory_bytes and told.memory_bytes > 50e6 and told.grad_norm
    assert told.eta_seconds is not None
    assert again.of(Progress)[0].eta_seconds


def state(gang: Gang) -> dict[str, Any]:
    """The position in the newest checkpoint."""
    position: dict[str, Any] = json.loads(
        (Path(gang.checkpoints[0].path) / "state.json").read_text()
    )["position"]
    return position


def learned(position: dict[str, Any]) -> list[list[float]]:
    """All of the history but what clocks and memory say."""
    return [row[:7] for row in position["history"]]
