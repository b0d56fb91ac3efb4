"""What ends a training early, each with its class and with words for people."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors import SafetensorError

from shared.lifecycle import FailureClass
from shared.messages import Done, Failed, Progress, Report
from tests.training.harness import (
    SPARE_MEMORY_VARIABLE,
    Gang,
    make_assignment,
    make_rows,
    write_rows,
)
from workers.ranks.train.failures import explain

Rows = list[dict[str, Any]]


def run_failing(gang: Gang, failure_class: FailureClass) -> Failed:
    gang.run()
    assert not gang.of(Done)
    failure = gang.failed
    assert failure.failure_class == failure_class, failure
    assert "Traceback" not in failure.message
    assert "Traceback" not in gang.log.read_text()
    return failure


def _missing_column(rows: Rows) -> None:
    rows[6]["topic"] = rows[6].pop("label")


def _no_text(rows: Rows) -> None:
    rows[6]["text"] = 17


def _odd_label(rows: Rows) -> None:
    rows[6]["label"] = 0.5


def _no_rows(rows: Rows) -> None:
    rows.clear()


def _one_label(rows: Rows) -> None:
    for row in rows:
        row["label"] = "food"


@pytest.mark.parametrize(
    ("spoil", "code", "says"),
    [
        (_missing_column, "missing_column", "line 7: there is no column 'label'"),
        (_no_text, "invalid_text", "line 7: column 'text' must be a string"),
        (_odd_label, "invalid_label", "line 7: column 'label' must be a string or a whole number"),
        (_no_rows, "no_rows", "has no rows"),
        (_one_label, "one_label", "nothing to tell apart"),
    ],
)
def test_training_data_that_cannot_be_used(
    tmp_path: Path, bert: Path, spoil: Callable[[Rows], None], code: str, says: str
) -> None:
    rows = make_rows(12, seed=3)
    spoil(rows)
    train = write_rows(tmp_path / "train.jsonl", rows)
    gang = Gang(make_assignment(tmp_path / "work", bert, train))
    failure = run_failing(gang, FailureClass.DATA_ERROR)
    assert failure.code == code
    assert failure.message.startswith("train.jsonl")
    assert says in failure.message


def test_a_line_that_is_no_json_is_named(tmp_path: Path, bert: Path) -> None:
    lines = [json.dumps(row) for row in make_rows(5, seed=3)]
    (tmp_path / "train.jsonl").write_text("\n".join([*lines[:2], "", "{'text': 1}", *lines[2:]]))
    gang = Gang(make_assignment(tmp_path / "work", bert, tmp_path / "train.jsonl", ranks=2))
    failure = run_failing(gang, FailureClass.DATA_ERROR)
    assert failure.code == "invalid_json"
    assert "train.jsonl, line 4" in failure.message
    assert len(gang.of(Failed)) == 2


def test_a_label_that_training_lacks_is_named(tmp_path: Path, bert: Path, train_file: Path) -> None:
    rows = make_rows(9, seed=4)
    rows[4]["label"] = "weather"
    validation = write_rows(tmp_path / "validation.jsonl", rows)
    gang = Gang(make_assignment(tmp_path / "work", bert, train_file, validation=validation))
    failure = run_failing(gang, FailureClass.DATA_ERROR)
    assert failure.code == "unknown_label"
    assert "validation.jsonl, line 5: label 'weather'" in failure.message


@pytest.mark.parametrize("ranks", [1, 2])
def test_divergence_ends_all_ranks_with_a_hint(
    tmp_path: Path, bert: Path, train_file: Path, ranks: int
) -> None:
    gang = Gang(
        make_assignment(
            tmp_path,
            bert,
            train_file,
            ranks=ranks,
            learning_rate=9.0,
            weight_decay=1.0,
            eps=1e-30,
            max_grad_norm=None,
            epochs=40,
            betas=(0.0, 0.0),
        )
    )
    failure = run_failing(gang, FailureClass.USER_ERROR)
    assert failure.code == "diverged"
    assert "learning_rate" in (failure.hint or "")
    assert {f.code for f in gang.of(Failed)} == {"diverged"}
    assert len(gang.of(Failed)) == ranks


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"freeze": ("bert.embedings.*",)}, "freeze_matches_nothing"),
        ({"freeze": ("*",)}, "all_frozen"),
        ({"warmup_steps": 1000, "epochs": 1}, "contradictory_hyperparameters"),
        ({"max_length": 65}, "max_length_too_large"),
    ],
)
def test_hyperparameters_that_do_not_fit(
    tmp_path: Path, bert: Path, train_file: Path, options: dict[str, Any], code: str
) -> None:
    gang = Gang(make_assignment(tmp_path, bert, train_file, **options))
    assert run_failing(gang, FailureClass.USER_ERROR).code == code


def test_a_model_folder_without_weights(tmp_path: Path, train_file: Path) -> None:
    (tmp_path / "empty").mkdir()
    gang = Gang(make_assignment(tmp_path / "work", tmp_path / "empty", train_file))
    assert run_failing(gang, FailureClass.USER_ERROR).code == "model_not_found"


@pytest.mark.parametrize(
    ("error", "failure_class", "code"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), "out_of_memory", "out_of_memory"),
        (MemoryError(), "out_of_memory", "out_of_memory"),
        (OSError(errno.ENOSPC, "No space left on device"), "infrastructure", "disk_full"),
        (
            SafetensorError("I/O error: No space left on device (os error 28)"),
            "infrastructure",
            "disk_full",
        ),
        (dist.DistBackendError("NCCL communicator was aborted"), "lost_worker", "peer_lost"),
        (RuntimeError("Connection closed by peer [127.0.0.1]:4"), "lost_worker", "peer_lost"),
        (RuntimeError("CUDA error: an illegal access\nmore"), "lost_device", "device_error"),
        (ValueError("what\nTraceback ..."), "infrastructure", "internal_error"),
    ],
)
def test_errors_of_the_libraries_get_a_class(
    error: BaseException, failure_class: str, code: str
) -> None:
    failure = explain(error)
    assert (failure.failure_class, failure.code) == (failure_class, code)
    assert "\n" not in failure.message


def test_running_out_of_memory_is_seen(tmp_path: Path, bert: Path) -> None:
    """A real allocation that fails: the batch needs more address space than the rank may take."""
    rows = [{"text": "fish soup " * 40, "label": str(n % 2)} for n in range(1000)]
    gang = Gang(
        make_assignment(
            tmp_path / "work", bert, write_rows(tmp_path / "t.jsonl", rows), batch_size=1000
        ),
        environment={SPARE_MEMORY_VARIABLE: str(64 << 20)},
    ).run()
    assert (gang.failed.failure_class, gang.failed.code) == ("out_of_memory", "out_of_memory")
    assert "micro_batch_size" in (gang.failed.hint or "")
    assert gang.failed.rows_at_once == 1000
    assert "with 1000 rows at once" in gang.failed.message


def test_where_one_row_is_too_much_no_smaller_batch_is_suggested() -> None:
    failure = explain(MemoryError(), rows_at_once=1)
    assert "with 1 row at once" in failure.message
    assert failure.hint is not None and "micro_batch_size" not in failure.hint
    assert "max_length" in failure.hint


def test_a_full_disk(tmp_path: Path, bert: Path, train_file: Path) -> None:
    gang = Gang(
        make_assignment(
            tmp_path,
            bert,
            train_file,
            max_steps=1,
        )
    )
    (tmp_path / "artifacts").mkdir()
    (tmp_path / "artifacts" / ".writing-metrics.json").symlink_to("/dev/full")
    assert run_failing(gang, FailureClass.INFRASTRUCTURE).code == "disk_full"


def test_a_member_that_never_comes_does_not_hang_the_rest(
    tmp_path: Path, bert: Path, train_file: Path
) -> None:
    gang = Gang(
        make_assignment(tmp_path, bert, train_file, ranks=3, batch_size=12),
        environment={"GPUYARD_RENDEZVOUS_SECONDS": "1.5"},
        ranks=(0, 2),
    )
    failure = run_failing(gang, FailureClass.INFRASTRUCTURE)
    assert failure.code == "rendezvous_timeout"
    assert "rank(s) 1 of 3" in failure.message
    # The other gave up as well, or saw rank 0 go.
    assert {f.code for f in gang.of(Failed)} <= {"rendezvous_timeout", "peer_lost"}
    assert len(gang.of(Failed)) == 2


def test_an_order_to_join_that_never_comes(tmp_path: Path, bert: Path, train_file: Path) -> None:
    gang = Gang(
        make_assignment(tmp_path, bert, train_file, ranks=2),
        environment={"GPUYARD_RENDEZVOUS_SECONDS": "0.5"},
        join=False,
    )
    failure = run_failing(gang, FailureClass.INFRASTRUCTURE)
    assert failure.code == "rendezvous_timeout"


def test_an_order_to_stop_is_heard_between_steps(
    tmp_path: Path, bert: Path, train_file: Path
) -> None:
    gang = Gang(make_assignment(tmp_path, bert, train_file, ranks=2, epochs=1000))

    def stop(_rank: int, report: Report) -> None:
        if isinstance(report, Progress) and report.step < 100:
            for rank in (0, 1):
                gang.order_stop(rank)

    gang.run(on_report=stop)
    assert {gang.exit_code(0), gang.exit_code(1)} == {3}
    assert not gang.of(Done)
    assert not gang.of(Failed)
    assert "stopped: cancelled" in gang.log.read_text()


def test_a_rank_whose_worker_is_gone_ends(tmp_path: Path, bert: Path, train_file: Path) -> None:
    gang = Gang(make_assignment(tmp_path, bert, train_file, epochs=1000))

    def vanish(rank: int, report: Report) -> None:
        if isinstance(report, Progress):
            gang.hang_up(rank)

    gang.run(on_report=vanish)
    assert gang.exit_code(0) == 3
