"""Reading, labelling, splitting and collating, and the scores made of counts."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.formats import DataFile
from shared.specs import Hyperparameters, TrainSpec
from tests.training.harness import make_rows, write_rows
from workers.ranks.loading import load_tokenizer
from workers.ranks.train.examples import Examples, Ragged
from workers.ranks.train.failures import DataProblem
from workers.ranks.train.rows import find_labels, split
from workers.ranks.train.tasks import Task, open_task
from workers.ranks.train.tasks.scores import score


def spec(
    task: str = "text-classification", *, columns: dict[str, str] | None = None, **fields: Any
) -> TrainSpec:
    """Of a training on data that the test names itself."""
    data = {"train": "rows.jsonl", "columns": columns or {}}
    names = Hyperparameters.model_fields.keys() & fields.keys()
    hyperparameters = {name: fields.pop(name) for name in names}
    return TrainSpec.model_validate(
        {"task": task, "model": "m", "data": data, "hyperparameters": hyperparameters, **fields}
    )


def opened(
    bert: Path, file: Path, *, columns: dict[str, str] | None = None, max_length: int | None = None
) -> Task:
    return open_task(spec(columns=columns, max_length=max_length), bert, DataFile(file))


def labelled(labels: list[int]) -> Examples:
    count = len(labels)
    return Examples(
        {"tokens": Ragged.of([n] for n in range(count))},
        {"label": np.array(labels, np.float64)},
        lengths=np.ones(count, np.int32),
        weights=np.ones(count, np.int64),
        cut=np.zeros(count, np.bool_),
    )


def test_columns_blank_lines_and_numbers_as_labels(tmp_path: Path, bert: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(
        '{"gloss": "a fish", "topic": 10}\n\n{"gloss": "the old town", "topic": 2, "more": []}\n'
    )
    columns = {"text": "gloss", "label": "topic"}
    task = opened(bert, file, columns=columns)
    assert task.loaded.labels == ("2", "10")
    data = task.read(DataFile(file))
    assert data.dense["label"].tolist() == [1, 0]
    assert data.lengths.tolist() == [4, 5]
    batch = task.batch(data, [0, 1], seed=0)
    assert batch.targets["labels"].tolist() == [1, 0]
    assert batch.inputs["attention_mask"].tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    assert batch.inputs["input_ids"][0].tolist()[-2:] == [3, 0]
    assert batch.tokens == 9
    cut = opened(bert, file, columns=columns, max_length=4).read(DataFile(file))
    assert cut.lengths.tolist() == [4, 4]
    assert cut.cut.tolist() == [False, True]


def test_labels_that_mix_text_and_numbers_are_sorted_as_text(tmp_path: Path) -> None:
    rows = [{"text": "a", "label": label} for label in (10, "9", 9, "x")]
    file = write_rows(tmp_path / "r.jsonl", rows)
    assert find_labels(DataFile(file), spec(), at_least=2) == ("10", "9", "x")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b"[1, 2]", "no JSON object but a list"),
        (b'{"text": "a"', "no JSON: "),
        (b'{"text": "\xff", "label": 1}', "not UTF-8"),
        (b'{"text": "a", "label": true}', "not a boolean (True)"),
        (b'{"text": null, "label": 1}', "not null"),
        (b'{"label": 1}', "there is no column 'text'; the row has 'label'"),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, line: bytes, says: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'{"text": "a", "label": "b"}\n' + line + b"\n")
    with pytest.raises(DataProblem) as caught:
        find_labels(DataFile(file), spec(), at_least=2)
    assert caught.value.message.startswith("rows.jsonl, line 2: ")
    assert says in caught.value.message


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DataProblem, match=r"gone\.jsonl: cannot be read"):
        find_labels(DataFile(tmp_path / "gone.jsonl"), spec(), at_least=2)


@given(
    st.lists(st.integers(0, 3), min_size=4, max_size=200),
    st.floats(0.05, 0.9),
    st.integers(0, 2**63 - 1),
)
def test_a_split_is_a_stratified_partition(labels: list[int], fraction: float, seed: int) -> None:
    data = labelled(labels)
    try:
        training, validation = map(data.subset, split(data, fraction, seed, by="label"))
    except DataProblem as problem:
        assert problem.code == "split_empty"
        assert all(round(labels.count(n) * fraction) == 0 or labels.count(n) == 1 for n in labels)
        return
    ids = [int(part[i]["tokens"][0]) for part in (training, validation) for i in range(len(part))]
    assert sorted(ids) == list(range(len(labels)))
    assert set(training.dense["label"].tolist()) == set(labels)
    for label in set(labels):
        held_out = validation.dense["label"].tolist().count(label)
        assert held_out == min(round(labels.count(label) * fraction), labels.count(label) - 1)
    again = data.subset(split(data, fraction, seed, by="label")[1])
    assert again.digest() == validation.digest()


def test_many_rows_are_read_in_pieces(tmp_path: Path, bert: Path) -> None:
    rows = make_rows(2500, seed=5)
    file = write_rows(tmp_path / "rows.jsonl", rows)
    tokenizer = load_tokenizer(bert)
    data = opened(bert, file).read(DataFile(file))
    assert len(data) == 2500
    for index in (0, 1023, 1024, 2499):
        assert data[index]["tokens"].tolist() == tokenizer(rows[index]["text"])["input_ids"]


def test_scores_against_a_confusion_matrix_worked_by_hand() -> None:
    # Truth: 6 of class 0, 2 of class 1, none of 2 and 3. Class 2 was guessed once, 3 never.
    result = score(
        hits=np.array([4.0, 1, 0, 0]),
        predicted=np.array([5.0, 2, 1, 0]),
        support=np.array([6.0, 2, 0, 0]),
    )
    assert result.micro_recall == 5 / 8
    f1 = [8 / 11, 2 / 4, 0.0]
    assert math.isclose(result.macro_f1, sum(f1) / 3)
    assert result.classes[0].precision == 4 / 5
    assert result.classes[0].recall == 4 / 6
    assert result.classes[3].f1 == 0.0
