"""The nine kinds of bad input to a training, as a rank meets them: each with its code and its words.

Most are found when a job is submitted, where ``tests/api/test_bad_training_input.py`` has the same nine.
A rank sees them again, as data may be too large to be looked through there, or come from a dataset, and
a model from the hub.

1. labels that are no integers, or unknown names
2. an empty class
3. sequences longer than the model's positions
4. tags and tokens of unequal length
5. a tokenizer without a padding token, or without a chat template
6. a checkpoint, or a model, of another architecture
7. a teacher with other labels
8. a LoRA target that matches nothing
9. a global batch that the world size does not divide
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, BertConfig, BertModel

from shared.lifecycle import FailureClass
from shared.messages import Done, Failed, Notice
from tests.training.cases import chat_rows, entity_rows, passage_rows
from tests.training.harness import Gang, make_assignment, make_bert, make_rows, write_rows
from tests.training.models import make_gpt2
from workers.ranks.train.notices import empty_classes

Rows = list[dict[str, Any]]


def run(work: Path, model: Path, rows: Rows, **options: Any) -> Gang:
    work.mkdir(exist_ok=True)
    options = {"epochs": 1, "batch_size": 16, **options}
    return Gang(make_assignment(work, model, write_rows(work / "t.jsonl", rows), **options)).run()


def refused(gang: Gang, failure_class: FailureClass, code: str) -> Failed:
    failure = gang.failed
    assert (failure.failure_class, failure.code) == (failure_class, code), failure
    assert not gang.of(Done) and "Traceback" not in gang.log.read_text()
    return failure


def notices(gang: Gang, code: str) -> list[Notice]:
    return [notice for notice in gang.of(Notice) if notice.code == code]


# --- 1 ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("label", "says"),
    [
        (
            1.5,
            "t.jsonl, line 4: column 'label' must be a string or a whole number, not a number (1.5)",
        ),
        (True, "must be a string or a whole number, not a boolean"),
        (None, "must be a string or a whole number, not null"),
        ([1], "must be a string or a whole number, not a list"),
    ],
)
def test_labels_that_are_no_integers(tmp_path: Path, bert: Path, label: Any, says: str) -> None:
    rows = make_rows(8, seed=1)
    rows[3]["label"] = label
    failure = refused(run(tmp_path, bert, rows), FailureClass.DATA_ERROR, "invalid_label")
    assert says in failure.message


def test_labels_of_unknown_names(tmp_path: Path, bert: Path) -> None:
    odd = [*make_rows(5, seed=2), {"text": "rain", "label": "weather"}]
    validation = write_rows(tmp_path / "v.jsonl", odd)
    gang = run(tmp_path / "work", bert, make_rows(30, seed=1), validation=validation)
    failure = refused(gang, FailureClass.DATA_ERROR, "unknown_label")
    assert failure.message.startswith(
        "v.jsonl, line 6: label 'weather' does not occur in the training"
    )
    assert "'animal', 'food', 'place'" in failure.message


# --- 2 ----------------------------------------------------------------------------------------


def test_a_class_of_the_model_without_a_row_is_told(
    tmp_path: Path, bert: Path, train_file: Path
) -> None:
    first = Gang(make_assignment(tmp_path / "1", bert, train_file, max_steps=1)).run()
    rows = [row for row in make_rows(60, seed=3) if row["label"] != "food"]
    gang = run(tmp_path / "2", first.model, rows, ranks=2)
    (notice,) = notices(gang, "empty_class")
    assert "knows 'food', and no row of the training data has that label" in notice.message
    assert notice.data == {"labels": ["food"]}
    assert json.loads((gang.model / "config.json").read_text())["id2label"] == {
        "0": "animal",
        "1": "place",
    }


def test_which_classes_are_empty() -> None:
    assert empty_classes(("a", "b", "c"), ("a", "c")) == ("b",)
    assert empty_classes(("a", "b"), ("b", "a", "c")) == ()
    assert empty_classes(("x", "y"), ("a", "b")) == (), "a model for something else"
    assert empty_classes(("LABEL_0", "a"), ("a", "b")) == (), "nobody has named it"


# --- 3 ----------------------------------------------------------------------------------------


def test_texts_longer_than_the_models_positions_are_cut_counted_and_told(
    tmp_path: Path, bert: Path
) -> None:
    rows = make_rows(40, seed=4)
    for row in rows[::10]:
        row["text"] += " old" * 100
    validation = write_rows(tmp_path / "v.jsonl", rows[:3])
    gang = run(tmp_path / "work", bert, rows, ranks=2, validation=validation)
    assert "longest 64; 4 cut to that" in gang.log.read_text()
    training, held_out = notices(gang, "texts_cut")
    assert training.message == "4 of 40 training examples are longer than 64 tokens and were cut"
    assert training.data == {"data": "training", "cut": 4, "examples": 40, "limit": 64}
    assert held_out.data == {"data": "validation", "cut": 1, "examples": 3, "limit": 64}
    assert f"note: {training.message}" in gang.log.read_text()


def test_it_is_told_once_a_training(tmp_path: Path, bert: Path) -> None:
    rows = [{**row, "text": row["text"] + " old" * 100} for row in make_rows(40, seed=4)]
    rules = {"every_steps": 1, "every_seconds": None}
    first = run(tmp_path / "1", bert, rows, checkpoint=rules)
    assert notices(first, "texts_cut")
    second = Gang(
        first.assignment.model_copy(
            update={"work_dir": str(tmp_path / "2"), "resume_from": first.checkpoints}
        )
    ).run()
    assert second.done.summary["resumed_from"] and not second.of(Notice)


# --- 4 ----------------------------------------------------------------------------------------


def test_tags_and_tokens_of_unequal_length(tmp_path: Path, bert: Path) -> None:
    rows = entity_rows(10, seed=5)
    rows[6] = {"tokens": ["the", "old", "town"], "tags": ["O", "O"]}
    gang = run(tmp_path, bert, rows, task="token-classification")
    failure = refused(gang, FailureClass.DATA_ERROR, "invalid_tags")
    assert failure.message == (
        "t.jsonl, line 7: column 'tokens' has 3 words and column 'tags' 2 tags"
    )


# --- 5 ----------------------------------------------------------------------------------------


def test_a_tokenizer_without_a_padding_token(tmp_path: Path) -> None:
    """A language model pads with the end of text, which attention does not see; a classifier may count
    its positions by the padding token, so there it has to be said."""
    gpt2 = make_gpt2(tmp_path / "gpt2")
    assert AutoTokenizer.from_pretrained(gpt2).pad_token is None
    gang = run(tmp_path / "1", gpt2, passage_rows(20, seed=6), task="text-generation")
    assert gang.done.summary["steps"] == 2
    assert AutoTokenizer.from_pretrained(gang.model).pad_token is None, "delivered as it was"
    bert = make_bert(tmp_path / "bert")
    config = json.loads((bert / "tokenizer_config.json").read_text())
    del config["pad_token"]
    (bert / "tokenizer_config.json").write_text(json.dumps(config))
    gang = run(tmp_path / "2", bert, make_rows(20, seed=6))
    failure = refused(gang, FailureClass.USER_ERROR, "model_unsuitable")
    assert failure.message == "the tokenizer of 'bert' has no padding token"


def test_a_tokenizer_without_a_chat_template(tmp_path: Path) -> None:
    gpt2 = make_gpt2(tmp_path / "gpt2")
    rows = [*passage_rows(2, seed=7), *chat_rows(2, seed=7)]
    gang = run(tmp_path / "work", gpt2, rows, task="text-generation")
    failure = refused(gang, FailureClass.USER_ERROR, "no_chat_template")
    assert failure.message.startswith("t.jsonl, line 3 is a chat")
    assert "tokenizer.chat_template" in (failure.hint or "")


# --- 6 ----------------------------------------------------------------------------------------


def test_a_checkpoint_of_another_architecture_is_not_continued(
    tmp_path: Path, bert: Path, train_file: Path
) -> None:
    """The same spec by its words, and another model in the folder: told, and begun anew."""
    rules = {"every_steps": 2, "every_seconds": None}
    first = Gang(make_assignment(tmp_path / "1", bert, train_file, checkpoint=rules, max_steps=3))
    first.run()
    other = make_bert(tmp_path / "other" / bert.name)
    config = json.loads((other / "config.json").read_text())
    BertModel(BertConfig(**{**config, "num_hidden_layers": 1})).save_pretrained(other)
    second = Gang(
        make_assignment(
            tmp_path / "2", other, train_file, resume_from=first.checkpoints, max_steps=3
        )
    ).run()
    (notice,) = second.of(Notice)
    assert notice.code == "checkpoint_damaged"
    assert "belongs to a training with other " in notice.message and "parameters" in notice.message
    assert second.done.summary["resumed_from"] is None


@pytest.mark.parametrize(
    ("task", "rows", "says"),
    [
        (
            "text2text",
            [{"text": "a", "target": "b"}],
            "of type 'bert' cannot write one text for another",
        ),
        ("text-generation", [{"text": "the old town"}], "'bert'"),
    ],
)
def test_a_model_whose_architecture_does_not_fit_the_task(
    tmp_path: Path, bert: Path, task: str, rows: Rows, says: str
) -> None:
    gang = run(tmp_path, bert, rows, task=task)
    failure = gang.failed
    assert failure.failure_class is FailureClass.USER_ERROR
    assert failure.code in ("model_unsuitable", "model_damaged")
    assert says in failure.message


# --- 7 ----------------------------------------------------------------------------------------


def test_a_teacher_with_other_labels(tmp_path: Path, bert: Path, train_file: Path) -> None:
    teacher = Gang(make_assignment(tmp_path / "1", bert, train_file, max_steps=1)).run().model
    rows = [{**row, "label": row["label"].upper()} for row in make_rows(30, seed=8)]
    gang = run(
        tmp_path / "2", bert, rows, teacher=teacher,
        spec_fields={"method": "distillation", "teacher": "t"},
    )  # fmt: skip
    failure = refused(gang, FailureClass.USER_ERROR, "teacher_unsuitable")
    assert "was not trained for these labels" in failure.message


# --- 8 ----------------------------------------------------------------------------------------


def test_a_lora_target_that_matches_nothing(tmp_path: Path, bert: Path) -> None:
    fields = {"method": "lora", "lora": {"targets": ["q_proj", "v_proj"]}}
    gang = run(tmp_path, bert, make_rows(20, seed=9), spec_fields=fields)
    failure = refused(gang, FailureClass.USER_ERROR, "lora_matches_nothing")
    assert "q_proj, v_proj match no module" in failure.message
    assert "query" in (failure.hint or "")


# --- 9 ----------------------------------------------------------------------------------------


def test_a_global_batch_that_the_world_size_does_not_divide(tmp_path: Path, bert: Path) -> None:
    """A spec cannot say so, but a gang may have another size than the spec's."""
    work = tmp_path / "work"
    work.mkdir()
    rows = write_rows(tmp_path / "t.jsonl", make_rows(30, seed=10))
    assignment = make_assignment(work, bert, rows, ranks=2, batch_size=16)
    gang = Gang(assignment.model_copy(update={"world_size": 3})).run()
    failure = refused(gang, FailureClass.USER_ERROR, "contradictory_hyperparameters")
    assert failure.message == "batch_size 16 does not divide evenly over 3 ranks"
