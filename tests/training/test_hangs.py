"""A rank that hangs: those that wait for it say so, and the attempt ends long before the collectives do."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

from shared.messages import Failed, Progress, Report
from tests.training.harness import Gang, make_assignment
from workers.ranks.train.health.verdict import Seen, find_hung, limits

PATIENCE = 3.0
OPTIONS: dict[str, Any] = {"epochs": 400, "batch_size": 12, "learning_rate": 1e-3}


def gang(work: Path, bert: Path, train: Path, ranks: int, **options: Any) -> Gang:
    assignment = make_assignment(work, bert, train, ranks=ranks, **{**OPTIONS, **options})
    return Gang(
        assignment.model_copy(update={"hung_after": PATIENCE}),
        differing={rank: {"device": device(assignment, rank)} for rank in range(ranks)},
    )


def device(assignment: Any, rank: int) -> Any:
    return assignment.device.model_copy(update={"id": f"cpu{rank}@test"})


@pytest.mark.parametrize(
    ("ranks", "stopped", "parallelism"),
    [(2, 1, "ddp"), (2, 0, "ddp"), (3, 1, "ddp"), (3, 0, "ddp"), (2, 1, "fsdp"), (2, 0, "fsdp")],
)
def test_a_stopped_rank_is_named_by_the_others(
    tmp_path: Path, bert: Path, train_file: Path, ranks: int, stopped: int, parallelism: str
) -> None:
    found = gang(tmp_path, bert, train_file, ranks, parallelism=parallelism)
    struck: list[int] = []

    def act(_rank: int, report: Report) -> None:
        pid = found.processes[stopped].pid
        assert pid is not None
        if isinstance(report, Progress) and report.step >= 8 and not struck:
            struck.append(report.step)
            os.kill(pid, signal.SIGSTOP)
        # As the worker does once the attempt is over.
        hung = [r for r in found.of(Failed) if r.code == "rank_hung"]
        if len(hung) + sum(r.code == "peer_lost" for r in found.of(Failed)) == ranks - 1:
            found.kill(stopped)

    found.run(on_report=act)
    assert found.failed.code == "rank_hung"
    assert found.failed.failure_class == "infrastructure"
    assert f"rank {stopped} (cpu{stopped}@test) hangs" in found.failed.message
    assert "its process is stopped, or its host is gone" in found.failed.message
    assert {rank for rank, r in found.reports if isinstance(r, Failed)} <= set(range(ranks)) - {
        stopped
    }


def test_a_rank_that_pauses_is_waited_for(tmp_path: Path, bert: Path, train_file: Path) -> None:
    expected = gang(tmp_path / "1", bert, train_file, 2, epochs=3).run().weights
    found = gang(tmp_path / "2", bert, train_file, 2, epochs=3)
    paused: list[int] = []

    def act(_rank: int, report: Report) -> None:
        if isinstance(report, Progress) and report.step >= 8 and len(paused) < 2:
            pid = found.processes[len(paused)].pid
            assert pid is not None
            paused.append(pid)
            os.kill(pid, signal.SIGSTOP)
            threading.Timer(PATIENCE / 3, os.kill, (pid, signal.SIGCONT)).start()

    found.run(on_report=act)
    assert len(paused) == 2
    assert not found.of(Failed)
    assert found.weights == expected


def test_a_gang_that_is_stopped_as_a_whole_goes_on(
    tmp_path: Path, bert: Path, train_file: Path
) -> None:
    """As with a laptop that is put to sleep: longer than the patience, and nobody is to blame."""
    found = gang(tmp_path, bert, train_file, 2, epochs=3)
    stopped: list[int] = []

    def wake() -> None:
        for pid in stopped:
            os.kill(pid, signal.SIGCONT)

    def act(_rank: int, report: Report) -> None:
        if isinstance(report, Progress) and report.step >= 8 and not stopped:
            stopped.extend(p.pid for p in found.processes.values() if p.pid is not None)
            for pid in stopped:
                os.kill(pid, signal.SIGSTOP)
            threading.Timer(PATIENCE * 1.5, wake).start()

    found.run(on_report=act)
    assert stopped
    assert not found.of(Failed)
    assert found.done


def test_one_that_computes_suspects_only_those_that_are_silent() -> None:
    """With a model in shards it may be waiting for them, and does not know."""
    late = Seen(1, "d", silent=2, seconds=100)
    assert find_hung(100, True, [late], limits(60, 0.2)) is not None
    assert find_hung(100, False, [late], limits(60, 0.2)) is None
    assert find_hung(100, False, [Seen(1, "d", silent=61)], limits(60, 0.2)) is not None


# --- who hangs -----------------------------------------------------------------------------------


def test_patience_grows_with_the_steps_and_is_more_where_more_is_usual() -> None:
    first, quick, slow = (limits(60, median) for median in (None, 0.2, 10.0))
    assert (first.silent, first.step) == (60, 600)
    assert (quick.step, quick.between, quick.alone) == (60, 1500, 300)
    assert slow.step == 200


@pytest.mark.parametrize(
    ("other", "waited", "hangs"),
    [
        (Seen(1, "d", silent=61), 62, True),
        (Seen(1, "d", silent=61, waiting=True), 62, True),
        (Seen(1, "d", silent=61), 59, False),
        (Seen(1, "d", silent=2, seconds=61), 62, True),
        (Seen(1, "d", silent=2, seconds=61, waiting=True), 62, False),
        (Seen(1, "d", silent=2, seconds=61, in_step=False), 62, False),
        (Seen(1, "d", silent=2, seconds=1501, in_step=False), 1502, True),
        (Seen(1, "d", silent=2, seconds=5), 62, False),
    ],
)
def test_who_does_not_arrive(other: Seen, waited: float, hangs: bool) -> None:
    arrived = Seen(2, "e", silent=1, waiting=True, seconds=waited)
    found = find_hung(waited, True, [arrived, other], limits(60, 0.2))
    assert (found is not None) == hangs
    if found is not None:
        assert (found.rank, found.device) == (1, "d")
