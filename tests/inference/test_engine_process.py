"""The engine over many attempts: warm models, orders, stops, the end of the channel."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from shared.lifecycle import FailureClass
from shared.messages import (
    ComputeShards,
    Done,
    Failed,
    JoinRendezvous,
    Progress,
    Ready,
    Shard,
    ShardComputed,
)
from shared.rows import cut_into_shards

from .conftest import PATIENCE, EngineProcess, Outcome, make_gpt2, make_llama, text_of

ROW = {"prompt": "the cat sat"}
SHORT = {"max_new_tokens": 4}
ENDLESS = {"max_new_tokens": 200}


def endless(models_dir: Path) -> Path:
    """A model whose answers nothing ends but max_new_tokens."""
    folder = models_dir / "endless"
    if not folder.exists():
        make_llama(folder)
        for name in ("config.json", "generation_config.json"):
            file = folder / name
            file.write_text(file.read_text().replace("300", "319").replace("    0,\n", ""))
    return folder


def test_the_second_job_finds_the_model_warm(engine, models_dir):
    llama, gpt2 = make_llama(models_dir / "warm"), make_gpt2(models_dir / "warm-too")
    engine.run(gpt2, [ROW], generation=SHORT)
    first = engine.run(llama, [ROW], generation=SHORT)
    assert first.ready.warm is False and first.ready.seconds > 0
    assert first.done.summary["load_seconds"] > 0
    second = engine.run(llama, [ROW], generation=SHORT)
    assert second.ready.seconds == 0 and second.ready.warm is True
    assert second.done.summary["load_seconds"] == 0 and second.done.summary["warm"] is True
    assert second.texts == first.texts
    # Another precision is another model. All of them stay warm as long as there is room.
    assert engine.run(llama, [ROW], generation=SHORT, precision="bf16").ready.warm is False
    for model in (gpt2, llama):
        assert engine.run(model, [ROW], generation=SHORT).ready.warm is True
    assert first.ready.models[:2] == (str(llama), str(gpt2))


def test_the_model_that_was_not_used_for_longest_makes_room(tmp_path, models_dir):
    engine = EngineProcess(tmp_path)
    models = [make_llama(models_dir / f"of-three-{i}", seed=i) for i in range(3)]
    size = (models[0] / "model.safetensors").stat().st_size
    room = {"device": {"memory_bytes": 5 * size}}  # of which half is for weights

    def held(model: Path) -> tuple[bool, list[str]]:
        ready = engine.run(model, [ROW], generation=SHORT, **room).ready
        return ready.warm, [Path(path).name[-1] for path in ready.models]

    assert held(models[0]) == (False, ["0"])
    assert held(models[1]) == (False, ["1", "0"])
    assert held(models[0]) == (True, ["0", "1"])
    assert held(models[2]) == (False, ["2", "0"])
    assert held(models[1]) == (False, ["1", "2"])
    assert "model of-three-1 is unloaded" in engine.log.read_text()
    assert engine.close() == 0


def test_a_folder_that_changed_is_loaded_again(engine, models_dir):
    folder = make_llama(models_dir / "changing", seed=1)
    before = engine.run(folder, [ROW], generation=SHORT)
    assert engine.run(folder, [ROW], generation=SHORT).ready.warm is True
    make_llama(folder, seed=2)
    after = engine.run(folder, [ROW], generation=SHORT)
    assert after.ready.warm is False
    assert after.texts != before.texts


def test_shards_that_come_in_several_orders(engine, llama):
    rows = [{"prompt": text_of(2 + i % 5, i)} for i in range(30)]
    whole = engine.run(llama, rows, shard_rows=5, generation=SHORT)
    path = engine.write(rows)
    assert isinstance(engine.assign(llama, path, generation=SHORT), Ready)
    shards = list(cut_into_shards(path, 5))
    engine.order(shards[3:])
    engine.order(shards[:1])
    engine.order(shards[1:3])
    outcome = engine.collect(Outcome(), 6)
    assert outcome.results == whole.results
    assert outcome.done.attempt_id == engine.attempt_id
    assert all(shard.attempt_id == engine.attempt_id for shard in outcome.shards.values())
    # An idle attempt waits for more; a single row is answered with nothing else around it.
    assert isinstance(engine.assign(llama, path, generation=SHORT), Ready)
    engine.order(shards[:1])
    first = engine.receive()
    while isinstance(first, Progress):
        first = engine.receive()
    assert isinstance(first, ShardComputed) and first.results == whole.shards[0].results
    engine.order(shards[5:])
    assert engine.collect(Outcome(), 1).results == list(whole.shards[5].results)


def test_progress_counts_rows_and_is_sparing(engine, models_dir):
    model = endless(models_dir)
    rows = [ROW] * 24
    started = time.monotonic()
    outcome = engine.run(
        model, rows, shard_rows=2, batch_size=2, generation={"max_new_tokens": 100}
    )
    seconds = time.monotonic() - started
    steps = [report.step for report in outcome.progress]
    assert steps and steps == sorted(steps)
    assert all(report.total_steps == 24 for report in outcome.progress)
    assert outcome.progress[-1].tokens_per_second > 0
    assert outcome.progress[-1].examples_per_second > 0
    assert len(steps) <= 1 + 4 * seconds


def test_the_last_rows_are_reported_before_anybody_asks(engine, llama):
    path = engine.write([ROW] * 5)
    assert isinstance(engine.assign(llama, path, generation=SHORT), Ready)
    engine.order(list(cut_into_shards(path, 5)))
    deadline = time.monotonic() + PATIENCE
    steps = []
    while 5 not in steps:
        assert time.monotonic() < deadline
        report = engine.receive()
        if isinstance(report, Progress):
            steps.append(report.step)
    engine.stop()
    assert isinstance(engine.receive(), Done)


def test_a_stop_in_the_middle_is_answered_at_once_and_the_model_stays(engine, models_dir):
    model = endless(models_dir)
    path = engine.write([ROW] * 400)
    assert isinstance(engine.assign(model, path, batch_size=4, generation=ENDLESS), Ready)
    engine.order(list(cut_into_shards(path, 100)))
    report = engine.receive()  # it is computing
    assert isinstance(report, Progress)
    engine.stop("cancelled")
    while not isinstance(report, Done):
        assert not isinstance(report, ShardComputed)
        report = engine.receive()
    assert report.summary["stopped"] is True and report.summary["rows"] < 400
    # An order that crossed the stop on its way changes nothing.
    engine.order(list(cut_into_shards(path, 100)))
    engine.stop("late")
    again = engine.run(model, [ROW], generation=SHORT)
    assert again.ready.warm is True and len(again.results) == 1
    assert "stopped: cancelled" in engine.log.read_text()


def test_orders_of_another_attempt_are_ignored(engine, llama):
    path = engine.write([ROW] * 4)
    assert isinstance(engine.assign(llama, path, generation=SHORT), Ready)
    shards = list(cut_into_shards(path, 2))
    engine.order(shards, attempt_id="att_of_yesterday")
    engine.order(shards[1:])
    outcome = engine.collect(Outcome(), 1)
    assert list(outcome.shards) == [1]


@pytest.mark.parametrize("change", ["shorter", "gone"])
def test_an_input_that_changed_fails_the_attempt(engine, llama, change):
    path = engine.write([ROW] * 6)
    shards = list(cut_into_shards(path, 3))
    assert isinstance(engine.assign(llama, path, generation=SHORT), Ready)
    if change == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes().replace(b"}\n", b"}", 3))
    engine.order(shards)
    outcome = engine.collect(Outcome(), 2)
    assert outcome.failed.failure_class is FailureClass.DATA_ERROR
    assert outcome.failed.attempt_id == engine.attempt_id
    assert path.name in outcome.failed.message
    assert engine.run(llama, [ROW], generation=SHORT).ready.warm is True


def test_a_model_that_is_gone_fails_the_attempt(engine, models_dir):
    outcome = engine.run(models_dir / "nowhere", [ROW])
    assert outcome.failed.failure_class is FailureClass.USER_ERROR
    assert outcome.failed.code == "model_not_found"


def test_the_log_is_for_people(engine, llama):
    start = engine.log.stat().st_size
    engine.run(llama, [ROW, {"prompt": ""}] * 3, shard_rows=2, generation=SHORT)
    log = engine.log.read_bytes()[start:].decode()
    assert "model llama (float32, cpu0) " in log
    assert "shard 2 done (3 of 3 ordered): 2 rows, 1 with errors in " in log
    assert "finished; 6 rows, 3 with errors" in log


@pytest.mark.parametrize("busy", [False, True])
def test_the_end_of_the_channel_ends_the_process(tmp_path, models_dir, busy):
    engine = EngineProcess(tmp_path)
    if busy:
        path = engine.write([ROW] * 100)
        assert isinstance(engine.assign(endless(models_dir), path, generation=ENDLESS), Ready)
        engine.order(list(cut_into_shards(path, 100)))
        assert isinstance(engine.receive(), Progress)
    assert engine.close() == 0, engine.log.read_text()


def test_a_broken_protocol_ends_the_process_with_a_reason(tmp_path):
    engine = EngineProcess(tmp_path)
    engine.channel.send(JoinRendezvous(address="127.0.0.1:1"))
    report = engine.receive()
    assert isinstance(report, Failed)
    assert report.failure_class is FailureClass.INFRASTRUCTURE and "'join'" in report.message
    assert engine.process.wait(timeout=PATIENCE) == 1
    engine.channel.close()


def test_an_order_message_may_name_a_shard_beyond_the_file(engine, llama):
    path = engine.write([ROW] * 2)
    assert isinstance(engine.assign(llama, path, generation=SHORT), Ready)
    beyond = Shard(index=9, first_row=90, rows=10, offset=path.stat().st_size, length=500)
    engine.channel.send(ComputeShards(attempt_id=engine.attempt_id, shards=(beyond,)))
    outcome = engine.collect(Outcome(), 1)
    assert outcome.failed.code == "input_changed"
