"""Training killed with SIGKILL and resumed ends with bitwise the weights of one never killed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from shared.lifecycle import FailureClass
from shared.messages import (
    CheckpointRef,
    CheckpointWritten,
    Done,
    Failed,
    FileDigest,
    Notice,
    Progress,
    Report,
)
from tests.training.harness import Gang, make_assignment
from workers.ranks.checkpoint import part_name

# Dropout stays the model's own 0.1 throughout; 250 examples leave a partial last batch, of 10.
PLAIN: dict[str, Any] = {"epochs": 2, "batch_size": 16, "learning_rate": 3e-3}
HARD: dict[str, Any] = {
    **PLAIN,
    "micro_batch_size": 2,
    "dropout": 0.2,
    "warmup_steps": 3,
    "label_smoothing": 0.1,
    "freeze": ("bert.embeddings.*", "bert.encoder.layer.0.*"),
}
EVERY_5: dict[str, Any] = {"every_steps": 5, "every_seconds": None, "keep": 2}


class Uninterrupted:
    """Makes each uninterrupted training once: (options, ranks) -> digest of its weights."""

    def __init__(self, folder: Path, model: Path, train: Path) -> None:
        self._folder, self._model, self._train = folder, model, train
        self._known: dict[str, str] = {}

    def weights(self, ranks: int, options: dict[str, Any]) -> str:
        key = repr((ranks, options))
        if key not in self._known:
            work = self._folder / str(len(self._known))
            assignment = make_assignment(work, self._model, self._train, ranks=ranks, **options)
            self._known[key] = Gang(assignment).run().weights
        return self._known[key]


@pytest.fixture(scope="module")
def uninterrupted(
    tmp_path_factory: pytest.TempPathFactory, bert: Path, train_file: Path
) -> Uninterrupted:
    return Uninterrupted(tmp_path_factory.mktemp("uninterrupted"), bert, train_file)


def killed(
    work: Path, bert: Path, train: Path, *, ranks: int, rank: int, after: int, **options: Any
) -> Gang:
    """An attempt in which SIGKILL strikes ``rank`` as soon as the checkpoint of step ``after``, or a
    later one, is known to be durable: somewhere in the steps behind it."""
    gang = Gang(make_assignment(work, bert, train, ranks=ranks, checkpoint=EVERY_5, **options))
    written = []

    def strike(_rank: int, report: Report) -> None:
        if isinstance(report, CheckpointWritten):
            written.append(report.step)
        if written and written[-1] >= after:
            gang.kill(rank)

    gang.run(on_report=strike)
    assert gang.exit_code(rank) == -9, "the fault did not strike"
    assert not gang.of(Done), "it was too late: the training had ended"
    assert gang.checkpoints[0].step >= after
    return gang


@pytest.mark.parametrize(
    ("ranks", "rank", "after", "options"),
    [
        pytest.param(1, 0, 5, PLAIN, id="one rank"),
        pytest.param(2, 1, 10, PLAIN, id="two ranks, rank 1 killed"),
        pytest.param(2, 0, 15, HARD, id="two ranks, rank 0 killed, every option that could differ"),
        pytest.param(4, 2, 5, {**PLAIN, "max_steps": 20}, id="four ranks"),
    ],
)
def test_resume_is_bitwise_exact(
    tmp_path: Path,
    bert: Path,
    train_file: Path,
    uninterrupted: Uninterrupted,
    ranks: int,
    rank: int,
    after: int,
    options: dict[str, Any],
) -> None:
    first = killed(tmp_path / "1", bert, train_file, ranks=ranks, rank=rank, after=after, **options)
    for failure in first.of(Failed):
        assert (failure.failure_class, failure.code) == (FailureClass.LOST_WORKER, "peer_lost")
    assert len(first.of(Failed)) == ranks - 1

    second = Gang(
        make_assignment(
            tmp_path / "2",
            bert,
            train_file,
            ranks=ranks,
            resume_from=first.checkpoints,
            **options,
        )
    ).run()
    newest = first.checkpoints[0]
    assert second.done.summary["resumed_from"] == {"checkpoint": newest.id, "step": newest.step}
    assert min(report.step for report in second.of(Progress)) > newest.step
    assert second.weights == uninterrupted.weights(ranks, options)
    # Nothing of the attempt that it came from was touched.
    assert all(Path(checkpoint.path).is_dir() for checkpoint in first.checkpoints[:2])


@pytest.mark.parametrize("damage", ["flipped", "truncated", "missing", "no manifest"])
def test_a_damaged_checkpoint_is_told_and_the_next_is_as_good(
    tmp_path: Path, bert: Path, train_file: Path, uninterrupted: Uninterrupted, damage: str
) -> None:
    first = killed(tmp_path / "1", bert, train_file, ranks=1, rank=0, after=10, **PLAIN)
    newest, older = first.checkpoints[:2]
    tensors = Path(newest.path) / part_name(0, 1)
    if damage == "flipped":
        content = bytearray(tensors.read_bytes())
        content[-5] ^= 1
        tensors.write_bytes(content)
    elif damage == "truncated":
        tensors.write_bytes(tensors.read_bytes()[:-100])
    elif damage == "missing":
        tensors.unlink()
    else:
        newest = newest.model_copy(update={"manifest": {}})
    second = Gang(
        make_assignment(tmp_path / "2", bert, train_file, resume_from=(newest, older), **PLAIN)
    ).run()
    notices = second.of(Notice)
    assert [notice.code for notice in notices] == ["checkpoint_damaged"]
    assert notices[0].data["checkpoint"] == newest.id
    assert second.done.summary["resumed_from"]["step"] == older.step
    assert second.weights == uninterrupted.weights(1, PLAIN)


def test_with_nothing_whole_left_it_starts_anew(
    tmp_path: Path, bert: Path, train_file: Path, uninterrupted: Uninterrupted
) -> None:
    gone = CheckpointRef(
        id="ckpt_gone",
        step=5,
        path=str(tmp_path / "gone"),
        manifest={
            name: FileDigest(size=1, sha256="0" * 64) for name in (part_name(0, 1), "state.json")
        },
    )
    options = {**PLAIN, "max_steps": 20}
    gang = Gang(
        make_assignment(tmp_path, bert, train_file, ranks=4, resume_from=(gone,), **options)
    ).run()
    assert [notice.code for notice in gang.of(Notice)] == ["checkpoint_damaged"]
    assert gang.done.summary["resumed_from"] is None
    assert gang.weights == uninterrupted.weights(4, options)


def test_a_checkpoint_of_another_training_is_not_continued(
    tmp_path: Path, bert: Path, train_file: Path
) -> None:
    short = {**PLAIN, "max_steps": 7}
    first = Gang(
        make_assignment(tmp_path / "1", bert, train_file, checkpoint=EVERY_5, **short)
    ).run()
    other = {**short, "learning_rate": 1e-3}
    second = Gang(
        make_assignment(tmp_path / "2", bert, train_file, resume_from=first.checkpoints, **other)
    ).run()
    assert [notice.code for notice in second.of(Notice)] == ["checkpoint_damaged"]
    assert "other spec" in second.of(Notice)[0].message
    assert second.done.summary["resumed_from"] is None


def test_checkpoints_are_whole_without_pickle_and_the_rank_deletes_none(
    tmp_path: Path, bert: Path, train_file: Path
) -> None:
    gang = Gang(
        make_assignment(
            tmp_path,
            bert,
            train_file,
            max_steps=12,
            checkpoint={"every_steps": 2, "every_seconds": None, "keep": 1},
        )
    ).run()
    assert [report.step for report in gang.of(CheckpointWritten)] == [2, 4, 6, 8, 10]
    # Which of them count only the worker knows: it deletes, once newer ones are committed.
    folders = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert folders == [f"step-{step:08}" for step in (2, 4, 6, 8, 10)]
    newest = tmp_path / "checkpoints" / "step-00000010"
    assert {path.name for path in newest.iterdir()} == {
        part_name(0, 1),
        "state.json",
        "manifest.json",
    }
    state = json.loads((newest / "state.json").read_text())
    assert state["position"]["step"] == 10
    assert state["world_size"] == 1


def test_checkpoints_come_by_time_too(tmp_path: Path, bert: Path, train_file: Path) -> None:
    """By rank 0's clock, and not while one is being written."""
    rule = {"every_steps": None, "every_seconds": 0.001}
    gang = Gang(
        make_assignment(tmp_path, bert, train_file, ranks=2, max_steps=40, checkpoint=rule)
    ).run()
    steps = [report.step for report in gang.of(CheckpointWritten)]
    assert steps[0] <= 2 and len(steps) > 2
    assert steps == sorted(set(steps)) and steps[-1] < 40
