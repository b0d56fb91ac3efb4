"""What a training tells of itself: a gradient that runs away, a rank that is slow, and how it diverged."""

from __future__ import annotations

import os
import random
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

from shared.lifecycle import FailureClass
from shared.messages import CheckpointWritten, Failed, Notice, Progress, Report
from tests.training.cases import scored_rows
from tests.training.harness import Gang, make_assignment, write_rows
from workers.ranks.train.health.norms import NormWatch
from workers.ranks.train.health.stragglers import WINDOW, Straggler, Stragglers


@pytest.fixture(scope="module")
def scores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("scores") / "scores.jsonl", scored_rows(400, 1))


def regression(work: Path, bert: Path, scores: Path, **options: Any) -> Gang:
    """Least squares by plain gradient descent: what a learning rate that is too high does best."""
    chosen = {"batch_size": 8, "epochs": 4, "optimizer": "sgd", "schedule": "constant", **options}
    return Gang(
        make_assignment(
            work, bert, scores, ranks=2, problem="regression", checkpoint={"every_steps": 5}, **chosen
        )
    )  # fmt: skip


def test_a_learning_rate_that_is_too_high_is_told_before_the_loss_is_no_number(
    tmp_path: Path, bert: Path, scores: Path
) -> None:
    gang = regression(
        tmp_path, bert, scores, learning_rate=0.2, max_grad_norm=None, warmup_steps=60
    ).run()
    (notice,) = [n for n in gang.of(Notice) if n.code == "gradient_norm_diverging"]
    since = notice.data["since"]
    assert notice.data["norm"] > 10 * notice.data["usual"]
    failure = gang.failed
    assert (failure.failure_class, failure.code) == (FailureClass.USER_ERROR, "diverged")
    end = int(failure.message.split("at step ")[1].split(":")[0])
    assert since <= notice.data["step"] < end
    assert f"at step {end - 1};" in failure.message
    assert f"the gradient norm had been running away since step {since}" in failure.message
    steps = [report.step for report in gang.of(CheckpointWritten)]
    good = max(step for step in steps if step < since)
    assert f"the last good one was that of step {good}" in failure.message
    assert len({report.message for report in gang.of(Failed)}) == 1, "all ranks say the same"


def test_a_training_that_diverges_at_once_has_no_checkpoint_to_name(
    tmp_path: Path, bert: Path, scores: Path
) -> None:
    gang = regression(tmp_path, bert, scores, learning_rate=10, max_grad_norm=None).run()
    assert gang.failed.code == "diverged"
    assert "the last good loss was" in gang.failed.message or "step 1:" in gang.failed.message


def test_a_training_that_learns_is_left_alone(tmp_path: Path, bert: Path, scores: Path) -> None:
    gang = regression(tmp_path, bert, scores, learning_rate=0.01).run()
    assert gang.done
    assert not [notice for notice in gang.of(Notice) if notice.code != "straggler"]


def test_a_rank_that_is_slow_is_named_with_what_it_costs(
    tmp_path: Path, bert: Path, scores: Path
) -> None:
    """Rank 1 is stopped most of the time, for moments shorter than a step, so that each step is hit."""
    gang = regression(tmp_path, bert, scores, learning_rate=0.001, epochs=5000)
    over = threading.Event()

    def slow_down(pid: int) -> None:
        while not over.is_set():
            os.kill(pid, signal.SIGSTOP)
            over.wait(0.004)
            os.kill(pid, signal.SIGCONT)
            over.wait(0.001)

    def act(_rank: int, report: Report) -> None:
        pid = gang.processes[1].pid
        assert pid is not None
        if isinstance(report, Progress) and not slowing:
            slowing.append(threading.Thread(target=slow_down, args=(pid,)))
            slowing[0].start()
        if isinstance(report, Notice):
            over.set()
            slowing[0].join()
            for rank in range(2):
                gang.order_stop(rank)

    slowing: list[threading.Thread] = []
    try:
        gang.run(on_report=act)
    finally:
        over.set()
    (notice,) = gang.of(Notice)
    assert notice.code == "straggler"
    assert (notice.data["rank"], notice.data["device"]) == (1, "cpu0@test")
    assert notice.data["times"] > 1.5
    assert 0 < notice.data["wait"] < 1
    assert f"the others wait {notice.data['wait']:.0%} of each step for it" in notice.message


# --- norms ---------------------------------------------------------------------------------------


def noise(count: int, seed: int = 1) -> list[float]:
    """Norms as trainings have them: they vary by some times, and single ones by a hundred."""
    draw = random.Random(seed)
    return [
        draw.lognormvariate(0, 0.5) * (100 if draw.random() < 0.02 else 1) for _ in range(count)
    ]


def found(norms: list[float]) -> list[int]:
    watch = NormWatch()
    return [step for step, norm in enumerate(norms, 1) if watch.add(step, norm)]


def test_norms_that_vary_are_no_divergence() -> None:
    for seed in range(20):
        assert found(noise(2000, seed)) == []


def test_a_training_that_becomes_calm_is_no_divergence() -> None:
    assert found([1000 * 0.97**step for step in range(500)]) == []


def test_norms_that_stay_far_above_the_usual_are_found_once_an_episode() -> None:
    calm = [1.0] * 30
    assert found(calm + [11.0] * 50 + calm + [11.0] * 50) == [35, 115]
    assert found(calm + [11.0] * 4 + calm) == []
    watch = NormWatch()
    for step, norm in enumerate(calm + [11.0] * 5, 1):
        watch.add(step, norm)
    assert (watch.since, watch.usual) == (31, 1.0)


def test_norms_that_grow_are_found_before_much_is_known() -> None:
    assert found([1.5**step for step in range(20)]) == [9]
    assert found([1.0] * 40 + [1.5**step for step in range(20)])[0] <= 52


def test_what_is_found_depends_on_the_last_norms_alone() -> None:
    """So a training that is resumed finds what it would have found, once it has done some steps."""
    norms = noise(300) + [40.0] * 10
    assert found(norms) == [305]
    assert found(norms[200:]) == [105]


def test_a_gradient_that_is_nothing_does_not_grow() -> None:
    assert found([0.0] * 200) == []


# --- stragglers ----------------------------------------------------------------------------------


def steps(own: list[float], count: int, seed: int = 1) -> list[tuple[list[float], float]]:
    """Steps in which ranks take about ``own``; a batch may take three times what another does, and a
    rank is held up now and then."""
    draw = random.Random(seed)
    made = []
    for _ in range(count):
        length = draw.uniform(0.5, 1.5)
        seconds = [s * length * draw.uniform(0.95, 1.05) for s in own]
        if draw.random() < 0.3:
            seconds[draw.randrange(len(own))] *= 4
        made.append((seconds, max(seconds) * 1.1))
    return made


def slow(made: list[tuple[list[float], float]], least_seconds: float = 0) -> list[Straggler]:
    watch = Stragglers(least_seconds=least_seconds)
    return [each for own, seconds in made for each in watch.add(own, seconds)]


def test_ranks_that_are_held_up_now_and_then_are_no_stragglers() -> None:
    for seed in range(10):
        assert slow(steps([1.0, 1.1, 1.0, 0.9], 500, seed)) == []


@pytest.mark.parametrize("own", [[1.0, 2.0], [1.0, 1.0, 2.0], [1.0, 1.1, 0.9, 2.0]])
def test_a_straggler_is_named_once(own: list[float]) -> None:
    (straggler,) = slow(steps(own, 500))
    assert straggler.rank == len(own) - 1
    assert straggler.times == pytest.approx(2.0, rel=0.2)
    assert straggler.wait == pytest.approx(0.45, abs=0.1)


def test_one_that_kept_up_meanwhile_is_named_again() -> None:
    bad, good = [1.0, 1.0, 2.0], [1.0, 1.0, 1.0]
    named = slow(steps(bad, 200) + steps(good, 200) + steps(bad, 200))
    assert [straggler.rank for straggler in named] == [2, 2]


def test_a_moment_is_no_persistence() -> None:
    made = steps([0.01, 0.02], 10 * WINDOW)
    assert slow(made, least_seconds=1000) == []
    assert len(slow(made, least_seconds=2)) == 1
