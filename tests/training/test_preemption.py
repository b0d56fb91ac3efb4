"""A device that is wanted back: the gang makes a checkpoint at its next step and goes on elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from shared.lifecycle import FailureClass
from shared.messages import CheckpointWritten, Done, Failed, Progress, Report
from tests.training.harness import Gang, make_assignment

OPTIONS: dict[str, Any] = {"epochs": 40, "batch_size": 16, "learning_rate": 3e-3}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory, bert: Path, train_file: Path) -> str:
    work = tmp_path_factory.mktemp("unbroken")
    return Gang(make_assignment(work, bert, train_file, ranks=2, **OPTIONS)).run().weights


def preempted(work: Path, bert: Path, train: Path, *, rank: int, seconds: float = 0.01) -> Gang:
    """An attempt whose ``rank`` is asked for its device once training goes on; the worker ends the
    other as soon as rank 0 has reported, as it does when the attempt is over."""
    gang = Gang(make_assignment(work, bert, train, ranks=2, **OPTIONS))
    asked = []

    def act(_rank: int, report: Report) -> None:
        if isinstance(report, Progress) and report.step >= 5 and not asked:
            asked.append(report.step)
            gang.ask_back(rank, seconds)
        if isinstance(report, Failed):
            gang.order_stop(1, "stale")

    return gang.run(on_report=act)


@pytest.mark.parametrize("rank", [0, 1])
def test_the_gang_leaves_with_a_checkpoint_and_ends_bitwise_the_same(
    tmp_path: Path, bert: Path, train_file: Path, unbroken: str, rank: int
) -> None:
    first = preempted(tmp_path / "1", bert, train_file, rank=rank)
    assert not first.of(Done)
    (failure,) = first.of(Failed)  # only rank 0 speaks: behind its checkpoint
    assert (failure.failure_class, failure.code) == (FailureClass.PREEMPTED, "preempted")
    (checkpoint,) = first.of(CheckpointWritten)
    kinds = [type(r) for who, r in first.reports if who == 0]
    assert kinds.index(CheckpointWritten) < kinds.index(Failed)
    assert f"left at step {checkpoint.step} of" in failure.message
    assert first.exit_code(1) == 3
    second = Gang(
        make_assignment(
            tmp_path / "2", bert, train_file, ranks=2, resume_from=first.checkpoints, **OPTIONS
        )
    ).run()
    assert second.done.summary["resumed_from"]["step"] == checkpoint.step
    assert second.weights == unbroken


def test_a_training_that_is_over_in_time_is_not_disturbed(
    tmp_path: Path, bert: Path, train_file: Path, unbroken: str
) -> None:
    gang = preempted(tmp_path, bert, train_file, rank=1, seconds=3600)
    assert not gang.of(Failed) and not gang.of(CheckpointWritten)
    assert gang.done.summary["steps"] == 40 * 16
    assert gang.weights == unbroken
