"""What one rank of a batch job says of the whole job's progress."""

from __future__ import annotations

from shared.messages import Progress
from workers.attempt.progress import EVERY, SHARE, JobProgress


class Job:
    """A job of 100 rows as the store has it, and a clock."""

    def __init__(self, done: int = 0) -> None:
        self.time = 0.0
        self.done = done
        self.errors = self.looks = 0
        self.away = False
        self.takes = 0.0

    def read(self) -> dict[str, int] | None:
        self.looks += 1
        self.time += self.takes
        return None if self.away else self.totals

    @property
    def totals(self) -> dict[str, int]:
        counts = {"rows": 100, "done": self.done, "errors": self.errors}
        return {**counts, "input_tokens": 10 * self.done, "output_tokens": 0}

    def progress(self) -> JobProgress:
        return JobProgress(self.totals, self.read, lambda: self.time)


def said(step: int) -> Progress:
    return Progress(step=step, total_steps=7, examples_per_second=3.0, tokens_per_second=4.0)


def test_rows_of_earlier_attempts_and_of_other_ranks_count() -> None:
    job = Job(done=20)
    progress = job.progress()
    told = progress.of_job(said(5))
    assert (told.step, told.total_steps) == (25, 100)
    job.time, job.done = 2 * EVERY, 60
    assert progress.of_job(said(6)).step == 60
    assert progress.of_job(said(90)).step == 100, "never more than there are"


def test_a_fresh_engine_begins_at_0() -> None:
    progress = Job().progress()
    assert progress.of_job(said(12)).step == 12
    progress.count(10, 0)
    progress.begin()
    assert progress.of_job(said(3)).step == 13


def test_rates_are_those_of_all_ranks() -> None:
    job = Job()
    progress = job.progress()
    progress.count(10, 0)
    job.time, job.done = 2.0, 10
    alone = progress.of_job(said(10))
    assert (alone.examples_per_second, alone.tokens_per_second) == (3.0, 4.0)
    job.time, job.done = 4.0, 40
    together = progress.of_job(said(10))
    assert (together.examples_per_second, together.tokens_per_second) == (10.0, 100.0)


def test_errors_of_all_ranks_count_once() -> None:
    job = Job()
    job.errors = 1
    progress = job.progress()
    progress.count(10, 2)
    assert progress.errors == 3
    job.errors = 3  # ours are committed
    assert progress.look()
    assert progress.errors == 3
    job.errors = 8
    assert progress.look()
    assert progress.errors == 8


def test_looking_takes_a_small_share_of_the_time() -> None:
    job = Job()
    job.takes = 0.1
    progress = job.progress()
    for _ in range(1000):
        job.time += 0.05
        progress.of_job(said(1))
    assert job.looks * job.takes <= 2 * SHARE * job.time


def test_nothing_is_lost_while_postgres_is_away() -> None:
    job = Job(done=20)
    progress = job.progress()
    job.away, job.time = True, 2 * EVERY
    assert not progress.look()
    assert progress.of_job(said(4)).step == 24
