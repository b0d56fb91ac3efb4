"""An engine that gets nowhere is ended, and the row that does it is isolated."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shared.messages import Alive, Progress, Ready
from tests.inference.conftest import CHAT_TEMPLATE, make_llama
from tests.workers.fleet import Fleet
from workers.attempt.hang import LOADING, HangWatch

STEP = Progress(step=1, total_steps=9)
SHORT_FOR_THE_SLOW = 8.0
"""Seconds that a step of a tiny model never takes, on the slowest machine."""


def test_a_step_that_ends_is_no_hang() -> None:
    watch = HangWatch(10, now=0)
    watch.hear(Ready(seconds=0.1), now=1)
    for now in range(2, 11, 2):
        watch.hear(Alive(work="computing", seconds=now - 1), now)
        assert watch.judge(now) is None
    assert watch.due_in(10) == 1
    watch.hear(STEP, now=10.5)
    assert watch.judge(20.4) is None
    watch.hear(Alive(work="computing", seconds=1.0), now=20.5)
    assert watch.judge(29.4) is None


def test_what_takes_too_long_is_named_with_its_seconds() -> None:
    watch = HangWatch(10, now=0)
    watch.hear(STEP, now=3)
    for now in range(5, 15, 2):
        watch.hear(Alive(work="computing", seconds=now - 4), now)
    hung = watch.judge(14.1)
    assert hung is not None
    assert (hung.work, hung.seconds) == ("computing", pytest.approx(10.1))
    failure = hung.failure().failure
    assert (failure.code, failure.failure_class) == ("engine_hung", "infrastructure")
    assert "for 10 s it computed one step" in failure.message
    assert "GPUYARD_ENGINE_HANG" in (failure.hint or "")


def test_silence_counts_from_the_last_word() -> None:
    watch = HangWatch(10, now=0)
    watch.hear(Alive(work="reading", seconds=4), now=5)
    assert watch.judge(11) is None
    hung = watch.judge(11.1)
    assert hung is not None and hung.work == "reading"
    silent = HangWatch(10, now=0)
    assert silent.judge(10) is None
    hung = silent.judge(10.1)
    assert hung is not None and "said nothing" in hung.failure().failure.message


def test_loading_has_more_time() -> None:
    watch = HangWatch(10, now=0)
    watch.hear(Alive(work="loading", seconds=2), now=2)
    assert watch.judge(10 * LOADING) is None
    assert watch.due_in(10) == 20
    assert watch.judge(10 * LOADING + 0.1) is not None


def test_nothing_is_wanted_or_nobody_reads() -> None:
    watch = HangWatch(10, now=0)
    watch.excuse(now=500)
    assert watch.judge(510) is None
    # A sign that lay there meanwhile, and those behind it: the last one counts.
    watch.hear(Alive(work="computing", seconds=11), now=510)
    watch.hear(STEP, now=510)
    assert watch.judge(511) is None
    never = HangWatch(0, now=0)
    assert (never.judge(1e9), never.due_in(1e9)) == (None, None)


@pytest.mark.parametrize("word", ["hang", "stop"])
def test_a_row_over_which_engines_hang_fails_alone(
    new_fleet: Callable[..., Fleet], database: str, valkey_url: str, word: str
) -> None:
    """ "stop": the process itself is stopped, and says nothing any more."""
    fleet = new_fleet(database, valkey_url, engine_hang="1.5")
    fleet.start_scheduler()
    fleet.start_host("one")
    rows: list[Any] = [{"prompt": f"row {n}"} for n in range(12)]
    rows[5] = {"id": "bad", "prompt": word}
    job_id = fleet.infer(rows, shard_rows=2)
    job = fleet.wait(job_id, "succeeded", within=120)
    found = fleet.results(job_id)
    assert [row["row"] for row in found] == list(range(12))
    [bad] = [row for row in found if row["error"]]
    assert (bad["row"], bad["id"], bad["error"]["code"]) == (5, "bad", "engine_died")
    assert "the engine hung" in bad["error"]["message"]
    assert job.summary is not None
    assert (job.summary["rows"], job.summary["errors"]) == (12, 1)
    assert len(fleet.attempts(job_id)) == 1
    assert "the engine hung" in fleet.wait_for_event(job_id, "engine_died").message


def test_a_job_beside_the_one_that_hangs_loses_no_row(
    new_fleet: Callable[..., Fleet], database: str, valkey_url: str
) -> None:
    """Both are in the engine when it is ended, and either may be to blame."""
    fleet = new_fleet(database, valkey_url, engine_hang="1.5")
    fleet.start_scheduler()
    fleet.start_host("one")
    beside = fleet.infer([{"prompt": f"row {n}"} for n in range(400)], "brisk", shard_rows=4)
    fleet.wait(beside, "running", within=60)
    bad = fleet.infer([{"prompt": "row 0"}, {"prompt": "hang"}], shard_rows=1)
    for job_id in (bad, beside):
        fleet.wait(job_id, "succeeded", within=150)
    assert [row["error"] and row["error"]["code"] for row in fleet.results(bad)] == [
        None,
        "engine_died",
    ]
    found = fleet.results(beside)
    assert [(row["row"], row["error"]) for row in found] == [(n, None) for n in range(400)]


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_real_engine_hangs_over_a_row(
    new_fleet: Callable[..., Fleet], database: str, valkey_url: str
) -> None:
    """The model's chat template has a loop without end, for one word. The engine goes on to say that it
    lives: its signs are of another thread."""
    fleet = new_fleet(
        database, valkey_url,
        lease_ttl="20", claim_timeout="60", engine_hang=str(SHORT_FOR_THE_SLOW),
    )  # fmt: skip
    fleet.start_scheduler()
    model = fleet.data / "looping"
    make_llama(model)
    loop = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    _template_of(model, "{% if messages[0].content == 'forever' %}" + loop + "{% endif %}")
    fleet.start_host("one", "--devices=cpu:1", real=True)
    rows = [{"messages": [{"role": "user", "content": f"the cat {n}"}]} for n in range(6)]
    rows[3]["messages"][0]["content"] = "forever"
    job_id = fleet.infer(
        rows, model=model, shard_rows=2, batch_size=2, generation={"max_new_tokens": 2}
    )
    fleet.wait(job_id, "succeeded", within=300)
    found = fleet.results(job_id)
    assert [row["row"] for row in found] == list(range(6))
    assert [row["error"] and row["error"]["code"] for row in found] == [
        None, None, None, "engine_died", None, None,
    ]  # fmt: skip
    assert "it read its rows" in found[3]["error"]["message"]


def _template_of(model: Path, before: str) -> None:
    (model / "chat_template.jinja").write_text(before + CHAT_TEMPLATE)
