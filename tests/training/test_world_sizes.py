"""A training that is killed on one number of ranks and goes on with another is the same training.

On one and two ranks that holds in every bit; on four, which a backend adds up in its own order, it holds
in every bit for those who stay four.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from shared.messages import CheckpointWritten, Done, Notice, Report
from tests.training.cases import CASES
from tests.training.harness import Gang, curve, make_assignment, write_rows

BATCHES: dict[str, Any] = {"batch_size": 16, "micro_batch_size": 2, "max_steps": 24, "epochs": 9}
STEEP: dict[str, Any] = {"learning_rate": 5e-3, "warmup_steps": 3, "eval_every_steps": 5}
BY_NAME = {case.name: case for case in CASES}
SUBJECTS = {
    # Accumulation with dropout, masks, labels; blocks of tokens; frozen weights; the best model.
    "single-label": {"dropout": 0.2, "label_smoothing": 0.1},
    "packed-text": {"dropout": 0.1},
    "fill-mask": {"dropout": 0.1},
    "lora": {"dropout": 0.1},
    "embeddings": {"dropout": 0.1, "micro_batch_size": 4},
    "preference": {"dropout": 0.1},
    "stopping": {"dropout": 0.1, "eval_every_steps": 2, "max_steps": 30},
}


class Subject:
    """A case on disk, to be trained on any number of ranks."""

    def __init__(self, name: str, folder: Path) -> None:
        self.case = BY_NAME.get(name, BY_NAME["single-label"])
        self.folder = folder
        self.model = self.case.model(folder / "model")
        # 90 examples leave a partial batch, of 10: some shards are smaller, others not there.
        self.train = write_rows(folder / "train.jsonl", self.case.rows(90, 1))
        self.validation = write_rows(folder / "validation.jsonl", self.case.rows(30, 2))
        self.options = {**BATCHES, **STEEP, **self.case.hyperparameters, **SUBJECTS[name]}
        self.options.update(batch_size=16, epochs=9)
        self.stopping = {"patience": 3} if name == "stopping" else None
        self._known: dict[tuple[int, int], Gang] = {}

    def gang(self, work: str, ranks: int, most: int, **fields: Any) -> Gang:
        devices = {"min": 1, "max": most}
        return Gang(
            make_assignment(
                self.folder / work,
                self.model,
                self.train,
                ranks=ranks,
                task=self.case.task,
                problem=self.case.problem,
                validation=self.validation,
                early_stopping=self.stopping,
                spec_fields={**self.case.spec_fields, "resources": {"devices": devices}},
                **self.options,
                **fields,
            )
        )

    def whole(self, ranks: int, most: int) -> Gang:
        """Trained without interruption, once."""
        if (ranks, most) not in self._known:
            self._known[ranks, most] = self.gang(f"whole-{ranks}-of-{most}", ranks, most).run()
        return self._known[ranks, most]

    def killed(self, work: str, ranks: int, most: int, rank: int) -> Gang:
        """SIGKILL strikes ``rank`` once a checkpoint is durable."""
        every = {"every_steps": 3, "every_seconds": None, "keep": 2}
        gang = self.gang(work, ranks, most, checkpoint=every)

        def strike(_rank: int, report: Report) -> None:
            if isinstance(report, CheckpointWritten):
                gang.kill(rank)

        gang.run(on_report=strike)
        assert gang.exit_code(rank) == -9 and not gang.of(Done), "the fault did not strike"
        return gang

    def resumed(self, work: str, ranks: int, most: int, first: Gang) -> Gang:
        return self.gang(
            work, ranks, most, resume_from=first.checkpoints, best_from=first.best
        ).run()


@pytest.fixture(scope="module", params=list(SUBJECTS))
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return Subject(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return Subject("single-label", tmp_path_factory.mktemp("plain"))


def came_to(gang: Gang) -> tuple[Any, ...]:
    summary = gang.done.summary
    return gang.weights, summary["metrics"], summary["steps"], summary["best"]


def test_one_rank_and_two_come_to_the_same(subject: Subject) -> None:
    one, two = subject.whole(1, most=2), subject.whole(2, most=2)
    assert came_to(one) == came_to(two)
    assert curve(one) == curve(two)
    assert len(curve(one)) > one.done.summary["steps"], "a loss for each step, and evaluations"
    if subject.stopping:
        assert one.done.summary["stopped_early"]


def test_killed_on_two_ranks_it_goes_on_with_one(subject: Subject) -> None:
    first = subject.killed("two", 2, most=2, rank=1)
    second = subject.resumed("then-one", 1, 2, first)
    at = second.done.summary["resumed_from"]["step"]
    assert at == first.checkpoints[0].step
    assert came_to(second) == came_to(subject.whole(2, most=2))
    assert curve(first, second) == curve(subject.whole(2, most=2))
    notices = [notice.message for notice in second.of(Notice)]
    assert notices == [
        f"the checkpoint of step {at} was made by 2 rank(s) and is continued by 1: the global batch "
        "stays what it is, and the result is the same"
    ]


def test_killed_on_one_rank_it_goes_on_with_two(plain: Subject) -> None:
    first = plain.killed("one", 1, most=2, rank=0)
    second = plain.resumed("then-two", 2, 2, first)
    assert came_to(second) == came_to(plain.whole(1, most=2))


def test_killed_on_four_ranks_it_goes_on_with_four(subject: Subject) -> None:
    first = subject.killed("four", 4, most=4, rank=2)
    second = subject.resumed("then-four", 4, 4, first)
    assert second.done.summary["resumed_from"]["step"] == first.checkpoints[0].step
    assert came_to(second) == came_to(subject.whole(4, most=4))
    assert curve(first, second) == curve(subject.whole(4, most=4))
    assert not second.of(Notice)


def test_killed_on_four_ranks_and_gone_on_with_two_it_differs_in_the_last_bits(
    tmp_path: Path,
) -> None:
    subject = Subject("single-label", tmp_path)
    # SGD passes on small differences as they are: Adam makes large ones of those about 0.
    subject.options.update(optimizer="sgd", learning_rate=0.05)
    first = subject.killed("four", 4, most=4, rank=3)
    second = subject.resumed("then-two", 2, 4, first)
    assert [notice.message.rpartition(": ")[2] for notice in second.of(Notice)] == [
        "the global batch stays what it is, and the result is the same but for rounding, in the last "
        "bits"
    ]
    weights = load_file(second.model / "model.safetensors")
    whole = load_file(subject.whole(4, most=4).model / "model.safetensors")
    assert max(abs(weights[name] - whole[name]).max() for name in whole) < 1e-5
