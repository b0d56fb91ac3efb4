"""A user's own ``torch.utils.data.Dataset``, from a package that is installed where the ranks run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from shared.errors import InvalidSpec
from shared.lifecycle import FailureClass
from shared.messages import CheckpointWritten, Done, Failed, Notice, Report
from shared.specs import parse_spec
from tests.training.harness import Gang, make_assignment, make_rows, write_rows
from tests.training.packages import install

CODE = '''
import random
import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset
from tests.training.harness import make_rows

class Topics(Dataset):
    """Counts how often it is made, in a file."""
    def __init__(self, count: int, seed: int = 1, made=None):
        self.rows = make_rows(count, seed)
        if made:
            with open(made, "a") as file:
                file.write("x")
    def __len__(self):
        return len(self.rows)
    def __getitem__(self, index):
        return {**self.rows[index], "more": object()}

class Numbered(Topics):
    def __getitem__(self, index):
        row = self.rows[index]
        label = np.int64(sorted({"animal", "food", "place"}).index(row["label"]))
        return {"text": row["text"], "label": torch.tensor(label) if index % 2 else label}

class Spoiled(Topics):
    def __init__(self, how: str):
        super().__init__(12)
        self.how = how
    def __getitem__(self, index):
        row = super().__getitem__(index)
        if index == 6:
            if self.how == "raise":
                raise KeyError("page 7")
            return {"tuple": (1, 2), "label": {**row, "label": 0.5}, "text": {"label": "a"}}[self.how]
        return row

class Endless(IterableDataset):
    def __iter__(self):
        yield {"text": "a", "label": "b"}

def refuses(where: str):
    raise FileNotFoundError(f"there is no {where}")

def leaves():
    raise SystemExit("bye")

def by_chance(count: int):
    return Topics(count, seed=random.SystemRandom().randrange(10**9))

text = "no dataset"
'''
NAMES = {
    "topics": "Topics", "numbered": "Numbered", "spoiled": "Spoiled", "endless": "Endless",
    "refuses": "refuses", "leaves": "leaves", "by-chance": "by_chance", "text": "text",
    "gone": "nowhere",
}  # fmt: skip


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install(tmp_path_factory.mktemp("site"), "wordy_topics", CODE, **NAMES)


def gang(
    work: Path,
    bert: Path,
    packages: Path | None,
    dataset: str,
    options: dict[str, Any] | None = None,
    **more: Any,
) -> Gang:
    source = {"dataset": dataset, "options": options or {}}
    assignment = make_assignment(
        work, bert, Path(), epochs=2, batch_size=16, learning_rate=5e-3,
        spec_fields={"data": {"train": source, **more.pop("data", {})}}, **more,
    )  # fmt: skip
    environment = {} if packages is None else {"PYTHONPATH": str(packages)}
    return Gang(assignment.model_copy(update={"train_path": ""}), environment)


def test_its_rows_are_trained_on_as_those_of_a_file(
    tmp_path: Path, bert: Path, packages: Path
) -> None:
    """Bitwise the same model, made by one process of two, and no copy of the rows stays."""
    made = tmp_path / "made"
    options = {"count": 120, "made": str(made)}
    ours = gang(
        tmp_path / "1", bert, packages, "topics", options, ranks=2, cache=tmp_path / "cache"
    )
    ours.run()
    file = write_rows(tmp_path / "train.jsonl", make_rows(120, seed=1))
    theirs = Gang(
        make_assignment(
            tmp_path / "2", bert, file, ranks=2, epochs=2, batch_size=16, learning_rate=5e-3
        )
    ).run()
    assert ours.done.summary["steps"] == 16
    assert ours.weights == theirs.weights
    assert made.read_text() == "x"
    assert "dataset 'topics': 120 rows of Topics" in ours.log.read_text()
    assert "tokenised into the token cache" in ours.log.read_text()
    assert not (tmp_path / "1" / "rows").exists()


def test_numbers_of_numpy_and_torch_are_numbers_and_validation_is_one_too(
    tmp_path: Path, bert: Path, packages: Path
) -> None:
    validation = {"validation": {"dataset": "numbered", "options": {"count": 30, "seed": 2}}}
    run = gang(tmp_path, bert, packages, "numbered", {"count": 60}, data=validation)
    run.assignment = run.assignment.model_copy(update={"validation_path": ""})
    assert "accuracy" in run.run().done.summary["metrics"]
    assert "60 training and 30 validation examples, 3 labels" in run.log.read_text()


def test_killed_and_resumed_it_ends_bitwise_the_same(
    tmp_path: Path, bert: Path, packages: Path
) -> None:
    more: dict[str, Any] = {"ranks": 2, "data": {"validation_split": 0.2}}
    whole = gang(tmp_path / "0", bert, packages, "topics", {"count": 150}, **more)
    whole.run()
    rules = {"every_steps": 3, "every_seconds": None}
    more = {"ranks": 2, "data": {"validation_split": 0.2}}
    first = gang(tmp_path / "1", bert, packages, "topics", {"count": 150}, checkpoint=rules, **more)

    def strike(_rank: int, report: Report) -> None:
        if isinstance(report, CheckpointWritten):
            first.kill(0)

    first.run(on_report=strike)
    assert not first.of(Done)
    more = {"ranks": 2, "data": {"validation_split": 0.2}}
    second = gang(
        tmp_path / "2",
        bert,
        packages,
        "topics",
        {"count": 150},
        resume_from=first.checkpoints,
        **more,
    ).run()
    assert second.done.summary["resumed_from"]["step"] >= 3
    assert second.weights == whole.weights


def test_other_rows_at_the_next_attempt_are_another_training(
    tmp_path: Path, bert: Path, packages: Path
) -> None:
    rules = {"every_steps": 3, "every_seconds": None}
    first = gang(tmp_path / "1", bert, packages, "by-chance", {"count": 60}, checkpoint=rules).run()
    second = gang(
        tmp_path / "2", bert, packages, "by-chance", {"count": 60}, resume_from=first.checkpoints
    ).run()
    assert second.done.summary["resumed_from"] is None
    assert {notice.code for notice in second.of(Notice)} == {"checkpoint_damaged"}
    assert "belongs to a training with other data" in second.of(Notice)[0].message


@pytest.mark.parametrize(
    ("dataset", "options", "failure_class", "code", "says"),
    [
        ("topcis", {}, "user_error", "unknown_dataset", "installed: 'by-chance', 'endless', "),
        ("topics", {"cuont": 3}, "user_error", "dataset_options", "does not take these options: "),
        ("topics", {}, "user_error", "dataset_options", "missing a required argument: 'count'"),
        (
            "refuses",
            {"where": "corpus"},
            "user_error",
            "dataset_failed",
            "cannot be made: FileNotFoundError: there is no corpus (wordy_topics.py, line ",
        ),
        ("leaves", {}, "user_error", "dataset_failed", "cannot be made: SystemExit: bye"),
        ("gone", {}, "user_error", "dataset_failed", "cannot be imported: AttributeError: "),
        (
            "text",
            {},
            "user_error",
            "dataset_unsuitable",
            "declared as a str, which cannot be called",
        ),
        (
            "endless",
            {},
            "user_error",
            "dataset_unsuitable",
            "made as a Endless, which is no map-style",
        ),
        ("topics", {"count": 0}, "data_error", "no_rows", "dataset 'topics': "),
        (
            "spoiled",
            {"how": "raise"},
            "user_error",
            "dataset_failed",
            "does not give row 6 of 12: KeyError: 'page 7' (wordy_topics.py, line ",
        ),
        (
            "spoiled",
            {"how": "tuple"},
            "data_error",
            "invalid_row",
            "dataset 'spoiled', index 6: a row must be a dict of columns, not ",
        ),
        (
            "spoiled",
            {"how": "label"},
            "data_error",
            "invalid_label",
            "dataset 'spoiled', index 6: column 'label' must be a string or a whole number",
        ),
        (
            "spoiled",
            {"how": "text"},
            "data_error",
            "missing_column",
            "dataset 'spoiled', index 6: there is no column 'text'; the row has 'label'",
        ),
    ],
)
def test_what_is_wrong_with_it_is_said(
    tmp_path: Path,
    bert: Path,
    packages: Path,
    dataset: str,
    options: dict[str, Any],
    failure_class: str,
    code: str,
    says: str,
) -> None:
    run = gang(tmp_path, bert, packages, dataset, options).run()
    failure = run.failed
    assert (failure.failure_class, failure.code) == (FailureClass(failure_class), code), failure
    assert says in failure.message
    assert "Traceback" not in run.log.read_text()
    assert not (tmp_path / "rows").exists()


def test_where_nothing_is_installed_and_where_too_much_is(
    tmp_path: Path, bert: Path, packages: Path
) -> None:
    run = gang(tmp_path / "1", bert, None, "topics", {"count": 9}, ranks=2).run()
    codes = {failure.code for failure in run.of(Failed)}
    assert "unknown_dataset" in codes and codes <= {"unknown_dataset", "peer_lost"}
    assert "installed: none" in next(
        f.message for f in run.of(Failed) if f.code == "unknown_dataset"
    )
    install(tmp_path / "other", "more_topics", CODE, topics="Topics")
    run = gang(tmp_path / "2", bert, packages, "topics", {"count": 9})
    run.environment["PYTHONPATH"] += f":{tmp_path / 'other'}"
    failure = run.run().failed
    assert failure.code == "ambiguous_dataset"
    assert "more_topics:Topics, wordy_topics:Topics" in failure.message


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({"train": {"dataset": "a b"}}, "data.train.dataset: "),
        ({"train": {"name": "a"}}, "data.train.dataset is required"),
        ({"train": {"dataset": "a", "split": "b"}}, "unknown field 'data.train.split'"),
        ({"train": {"dataset": "a", "options": 3}}, "data.train.options must be an object, not 3"),
        ({"train": 5}, "data.train must be a string, not 5"),
        ({"train": {"dataset": "a"}, "format": "csv"}, "data.format is how a file is read"),
    ],
)
def test_specs_that_name_none(data: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidSpec) as refused:
        parse_spec({"kind": "train", "task": "text-classification", "model": "m", "data": data})
    assert says in refused.value.message
