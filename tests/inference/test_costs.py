"""Device-seconds of rows: shares of the steps, by tokens."""

from __future__ import annotations

import random

import pytest

from shared.messages import Done, ShardComputed
from shared.rows import cut_into_shards
from workers.ranks.engine.costs import Costs

from .conftest import make_llama, text_of


def test_rows_of_one_step_share_it_by_tokens_in_any_order() -> None:
    for order in ([3, 1, 6], [6, 3, 1]):
        costs = Costs()
        costs.spend(10, 2.0)
        assert [costs.charge(tokens) for tokens in order] == pytest.approx(
            [0.2 * tokens for tokens in order]
        )
    assert Costs().charge(5) == 0.0


def test_what_is_not_finished_keeps_its_part() -> None:
    costs = Costs()
    costs.spend(8, 4.0)
    assert costs.charge(2) == 1.0
    costs.spend(2, 3.0)  # six tokens of before, at 3 s, and two of 3 s
    assert costs.charge(8) == 6.0
    assert costs.charge(1) == 0.0


@pytest.mark.parametrize("seed", range(5))
def test_all_rows_together_have_all_seconds(seed: int) -> None:
    chance = random.Random(seed)
    costs, rows, spent, charged = Costs(), [chance.randint(1, 40) for _ in range(60)], 0.0, 0.0
    active: dict[int, int] = {}
    waiting = list(range(60))
    while waiting or active:
        while waiting and len(active) < 8:
            active[waiting.pop()] = 0
        seconds = chance.random()
        costs.spend(len(active), seconds)
        spent += seconds
        for row in list(active):
            active[row] += 1
            if active[row] == rows[row]:
                charged += costs.charge(active.pop(row))
    assert charged == pytest.approx(spent)


@pytest.mark.parametrize("task", ["text-generation", "text-classification"])
def test_seconds_of_real_rows(engine, models_dir, bert, task):
    # Not the llama of the other tests: some want it cold.
    llama = models_dir / "llama-of-costs"
    if not llama.exists():
        make_llama(llama)
    column, model = ("prompt", llama) if task == "text-generation" else ("text", bert)
    rows = [{column: text_of(2 + 7 * (i % 4), i)} for i in range(40)]
    rows[5] = {column: ""}
    rows.append({column: text_of(99)})  # too long for either, by max_length
    outcome = engine.run(model, rows, task=task, shard_rows=16, max_length=90)
    attempt = engine.attempt_id
    told = [engine.seconds[attempt, row] for row in range(len(rows))]
    bad = [row for row, code in enumerate(outcome.codes) if code]
    assert bad == [5, 40]
    assert [row for row, seconds in enumerate(told) if seconds is None] == bad
    known = [seconds for seconds in told if seconds is not None]
    assert min(known) > 0
    whole = outcome.done.summary["compute_seconds"]
    # The rest is reading and tokenising.
    assert 0.2 * whole < sum(known) <= whole + 0.001


def test_jobs_that_share_passes_have_their_own_seconds(engine, bert):
    rows = [{"text": text_of(4 + i % 9, i)} for i in range(24)]
    path = engine.write(rows)
    fields = {"task": "text-classification"}
    shards = list(cut_into_shards(path, 24))
    engine.assign(bert, path, **fields)
    first = engine.attempt_id
    engine.assign(bert, path, **fields)
    second = engine.attempt_id
    engine.order(shards, first)
    engine.order(shards, second)
    done: dict[str, Done] = {}
    while len(done) < 2:
        match engine.receive():
            case ShardComputed(attempt_id=attempt):
                engine.stop(attempt_id=attempt)
            case Done() as report:
                done[report.attempt_id] = report
    for attempt in (first, second):
        seconds = sum(engine.seconds[attempt, row] or 0.0 for row in range(24))
        assert 0 < seconds <= done[attempt].summary["compute_seconds"] + 0.001
