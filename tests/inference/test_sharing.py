"""Attempts of several jobs in one engine: they share passes, get their share, and do not disturb each other."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from shared.lifecycle import FailureClass
from shared.messages import Done, Failed, Progress, Ready, Report, ShardComputed
from shared.rows import cut_into_shards

from .conftest import PATIENCE, EngineProcess, make_gpt2, make_llama, text_of

ENDLESS = {"max_new_tokens": 200}


@pytest.fixture(scope="module")
def endless(models_dir: Path) -> Path:
    """A model whose answers nothing ends but max_new_tokens."""
    folder = make_llama(models_dir / "endless-shared")
    for name in ("config.json", "generation_config.json"):
        file = folder / name
        file.write_text(file.read_text().replace("300", "319").replace("    0,\n", ""))
    return folder


class Jobs:
    """Attempts that are open together in one engine, and what each was answered."""

    def __init__(self, engine: EngineProcess) -> None:
        self.engine = engine
        self.reports: dict[str, list[Report]] = {}
        self.order_of_shards: list[str] = []

    def open(
        self, model: Path, rows: Sequence[dict[str, Any]], shard_rows: int = 8, **fields: Any
    ) -> str:
        path = self.engine.write(rows)
        self.engine.assign_only(model, path, **fields)
        attempt = self.engine.attempt_id
        self.reports[attempt] = []
        self.until(attempt, Ready, Failed)
        self.engine.order(list(cut_into_shards(path, shard_rows)))
        return attempt

    def until(self, attempt: str, *kinds: type[Report], count: int = 1) -> None:
        """Read until this attempt had so many reports of such a kind."""
        deadline = time.monotonic() + PATIENCE
        while sum(isinstance(r, kinds) for r in self.reports[attempt]) < count:
            assert time.monotonic() < deadline
            report = self.engine.receive()
            owner = report.attempt_id  # type: ignore[union-attr]
            self.reports[owner].append(report)
            if isinstance(report, ShardComputed):
                self.order_of_shards.append(owner)

    def results(self, attempt: str, shards: int) -> list[dict[str, Any]]:
        """The rows of an attempt, once all its shards are there; it is ended with that."""
        self.until(attempt, ShardComputed, count=shards)
        self.engine.stop(attempt_id=attempt)
        self.until(attempt, Done)
        found = [r for r in self.reports[attempt] if isinstance(r, ShardComputed)]
        return [row for shard in sorted(found, key=lambda s: s.index) for row in shard.results]


def rows_of(count: int, start: int) -> list[dict[str, Any]]:
    return [{"prompt": text_of(2 + i % 9, start + i)} for i in range(count)]


def test_jobs_that_share_passes_get_what_they_get_alone(engine, llama):
    greedy = {"generation": {"max_new_tokens": 16}, "batch_size": 6}
    sampled = {
        "generation": {"max_new_tokens": 11, "temperature": 0.8, "seed": 3}, "batch_size": 9,
    }  # fmt: skip
    first, second, third = rows_of(24, 0), rows_of(17, 50), rows_of(3, 90)
    alone = [
        engine.run(llama, first, **greedy).results,
        engine.run(llama, second, **sampled).results,
        engine.run(llama, third, **greedy).results,
    ]
    jobs = Jobs(engine)
    a = jobs.open(llama, first, **greedy)
    b = jobs.open(llama, second, **sampled)
    c = jobs.open(llama, third, **greedy)
    assert [jobs.results(a, 3), jobs.results(b, 3), jobs.results(c, 1)] == alone


@pytest.mark.parametrize("task", ["text-classification", "embeddings"])
def test_encoders_too(engine, bert, task):
    texts = [{"text": text_of(1 + i % 13, i)} for i in range(90)]
    alone = engine.run(bert, texts, task=task).results
    jobs = Jobs(engine)
    a = jobs.open(bert, texts, task=task)
    b = jobs.open(bert, texts[:5], task=task)
    assert jobs.results(b, 1) == pytest_close(alone[:5])
    assert jobs.results(a, 12) == pytest_close(alone)


def pytest_close(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """As numbers that a pass of other rows rounds otherwise compare."""

    def close(value: Any) -> Any:
        if isinstance(value, float):
            return pytest.approx(value, abs=1e-5)
        if isinstance(value, dict):
            return {name: close(item) for name, item in value.items()}
        if isinstance(value, list):
            return [close(item) for item in value]
        return value

    return [close(row) for row in rows]


def test_a_job_of_one_row_does_not_wait_for_a_long_one(engine, endless):
    jobs = Jobs(engine)
    long = jobs.open(endless, rows_of(60, 0), batch_size=4, generation=ENDLESS, shard_rows=4)
    jobs.until(long, Progress)
    short = jobs.open(endless, rows_of(1, 7), batch_size=4, generation={"max_new_tokens": 3})
    assert len(jobs.results(short, 1)) == 1
    before = sum(isinstance(r, ShardComputed) for r in jobs.reports[long])
    assert before <= 2, "it waited for rows of the other job"
    engine.stop("cancelled", attempt_id=long)
    jobs.until(long, Done)


def test_one_that_is_stopped_leaves_the_other_alone(engine, endless):
    generation = {"max_new_tokens": 30}
    rows = rows_of(16, 0)
    alone = engine.run(endless, rows, generation=generation, batch_size=8).results
    jobs = Jobs(engine)
    kept = jobs.open(endless, rows, generation=generation, batch_size=8)
    stopped = jobs.open(endless, rows_of(40, 3), generation=ENDLESS, batch_size=8)
    jobs.until(stopped, Progress)
    engine.stop("cancelled", attempt_id=stopped)
    jobs.until(stopped, Done)
    assert jobs.results(kept, 2) == alone
    summary = next(r.summary for r in jobs.reports[stopped] if isinstance(r, Done))
    assert summary["stopped"] is True


def test_models_take_turns(engine, endless, models_dir):
    other = make_gpt2(models_dir / "in-turn")
    jobs = Jobs(engine)
    long = jobs.open(endless, rows_of(60, 0), batch_size=4, generation=ENDLESS, shard_rows=4)
    short = jobs.open(other, rows_of(4, 7), generation={"max_new_tokens": 5})
    assert len(jobs.results(short, 1)) == 4
    assert sum(isinstance(r, ShardComputed) for r in jobs.reports[long]) <= 2
    engine.stop("cancelled", attempt_id=long)
    jobs.until(long, Done)


def test_an_input_that_is_gone_fails_its_own_job_alone(engine, llama):
    jobs = Jobs(engine)
    kept = jobs.open(llama, rows_of(8, 0), generation={"max_new_tokens": 20})
    path = engine.write(rows_of(8, 1))
    engine.assign_only(llama, path, generation={"max_new_tokens": 20})
    broken = engine.attempt_id
    jobs.reports[broken] = []
    jobs.until(broken, Ready)
    shards = list(cut_into_shards(path, 8))
    path.unlink()
    engine.order(shards)
    jobs.until(broken, Failed)
    failed = next(r for r in jobs.reports[broken] if isinstance(r, Failed))
    assert failed.failure_class is FailureClass.DATA_ERROR
    assert len(jobs.results(kept, 1)) == 8


def test_a_model_in_use_is_not_unloaded(tmp_path, models_dir):
    engine = EngineProcess(tmp_path)
    models = [make_llama(models_dir / f"held-{i}", seed=i) for i in range(2)]
    size = (models[0] / "model.safetensors").stat().st_size
    room = {"device": {"memory_bytes": 3 * size}}  # for the weights of one
    jobs = Jobs(engine)
    first = jobs.open(models[0], rows_of(8, 0), generation={"max_new_tokens": 30}, **room)
    second = jobs.open(models[1], rows_of(8, 0), generation={"max_new_tokens": 5}, **room)
    assert len(jobs.results(second, 1)) == 8
    assert len(jobs.results(first, 1)) == 8
    ready = engine.run(models[0], rows_of(1, 0), generation={"max_new_tokens": 5}, **room).ready
    assert ready.warm is True
    assert engine.close() == 0
