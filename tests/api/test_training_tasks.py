"""Submitting trainings of taggers and encoder-decoders: what is accepted, and what is refused by line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.api.conftest import error_of, submit
from tests.api.model_folders import ENCODER, write_model

T5 = {
    "architectures": ["T5ForConditionalGeneration"],
    "model_type": "t5",
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 32,
    "num_layers": 2,
    "num_heads": 2,
    "n_positions": 128,
    "vocab_size": 50,
}
BART = {
    "architectures": ["BartModel"],
    "model_type": "bart",
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "max_position_embeddings": 128,
    "vocab_size": 50,
}
TAGGED = [
    {"tokens": ["the", "old", "town"], "tags": ["O", "B-PLACE", "I-PLACE"]},
    {"tokens": ["rain"], "tags": ["O"]},
]
PAIRS = [{"text": f"a long text {i}", "target": "short"} for i in range(10)]
Texts = Callable[..., Path]


@pytest.fixture(autouse=True)
def _models(place: Path) -> None:
    write_model(place / "roots" / "t5", T5)
    write_model(place / "roots" / "bart", BART)
    tagger = {**ENCODER, "architectures": ["BertForTokenClassification"]}
    write_model(place / "roots" / "tagger", tagger)


def training(texts: Texts, task: str, model: str, rows: list[Any], **data: Any) -> dict[str, Any]:
    file = str(texts("train.jsonl", rows))
    return {"kind": "train", "task": task, "model": model, "data": {"train": file, **data}}


@pytest.mark.parametrize(
    ("task", "model", "rows"),
    [
        ("token-classification", "encoder", TAGGED),
        ("token-classification", "tagger", TAGGED),
        ("text2text", "t5", PAIRS),
        ("summarization", "bart", PAIRS),
    ],
)
def test_they_are_accepted(
    client: httpx.Client, texts: Texts, task: str, model: str, rows: list[Any]
) -> None:
    job = submit(client, training(texts, task, model, rows, validation_split=0.5))
    assert (job["state"], job["model"], job["spec"]["task"]) == ("queued", model, task)
    assert job["requirements"]["memory_is_estimate"] is True
    assert job["requirements"]["memory_bytes"] > 500 * 1024**2


def test_columns_of_other_names(client: httpx.Client, texts: Texts) -> None:
    rows = [{"words": row["tokens"], "ner": row["tags"]} for row in TAGGED]
    names = {"tokens": "words", "tags": "ner"}
    submit(client, training(texts, "token-classification", "encoder", rows, columns=names))
    rows = [{"article": row["text"], "highlights": row["target"]} for row in PAIRS]
    names = {"text": "article", "target": "highlights"}
    submit(client, training(texts, "summarization", "t5", rows, columns=names))
    wrong = training(texts, "summarization", "t5", rows, columns={"tags": "highlights"})
    error = error_of(client.post("/v1/jobs", json=wrong), 422, "invalid_spec")
    assert error["message"].startswith("data.columns.tags does not apply to task 'summarization'")


@pytest.mark.parametrize(
    ("task", "model", "says"),
    [
        ("token-classification", "causal", "token-classification needs a BERT-type encoder"),
        ("token-classification", "t5", "token-classification needs a BERT-type encoder"),
        ("text2text", "encoder", "does not write one text for another"),
        ("summarization", "causal", "does not write one text for another"),
    ],
)
def test_models_that_cannot_learn_it(
    client: httpx.Client, texts: Texts, task: str, model: str, says: str
) -> None:
    answer = client.post("/v1/jobs", json=training(texts, task, model, PAIRS))
    error = error_of(answer, 422, "unsupported_model")
    assert error["param"] == "model"
    assert says in error["message"] and error["hint"]


@pytest.mark.parametrize(
    ("task", "row", "says"),
    [
        (
            "token-classification",
            {"tokens": ["a", "b"], "tags": ["O"]},
            "column 'tokens' has 2 words and column 'tags' 1 tags",
        ),
        ("token-classification", {"tokens": ["a"]}, "there is no column 'tags'"),
        (
            "token-classification",
            {"tokens": ["a"], "tags": [3]},
            "column 'tags' must be a list of strings",
        ),
        (
            "token-classification",
            {"tokens": ["\ud800"], "tags": ["O"]},
            "column 'tokens' holds half of a surrogate pair",
        ),
        ("text2text", {"text": "a"}, "there is no column 'target'"),
        ("text2text", {"text": "a", "target": " "}, "column 'target' is empty"),
        ("summarization", {"text": ["a"], "target": "b"}, "column 'text' must be a string"),
    ],
)
def test_a_bad_row_is_named_by_its_line(
    client: httpx.Client, texts: Texts, task: str, row: dict[str, Any], says: str
) -> None:
    good, model = (TAGGED, "encoder") if task == "token-classification" else (PAIRS[:2], "t5")
    answer = client.post("/v1/jobs", json=training(texts, task, model, [*good, row]))
    error = error_of(answer, 422, "data_error")
    assert error["param"] == "data.train"
    assert error["message"].startswith(f"'train.jsonl' line 3: {says}")


def test_a_tag_that_training_lacks(client: httpx.Client, texts: Texts) -> None:
    other = texts("other.jsonl", [*TAGGED, {"tokens": ["Ada"], "tags": ["B-PER"]}])
    spec = training(texts, "token-classification", "encoder", TAGGED, validation=str(other))
    error = error_of(client.post("/v1/jobs", json=spec), 422, "data_error")
    assert error["param"] == "data.validation"
    assert error["message"] == (
        "'other.jsonl' line 3: label 'B-PER' does not occur in the training data"
    )


def test_a_dataset_of_the_workers_is_taken_at_its_word(client: httpx.Client, texts: Texts) -> None:
    """What is there for the API to see is checked, the rest is the rank's."""
    spec = training(texts, "token-classification", "encoder", TAGGED)
    dataset = {"dataset": "treebank", "options": {"split": "train", "sizes": [1, 2]}}
    data = {"train": dataset, "validation": spec["data"]["train"]}
    job = submit(client, {**spec, "data": data})
    assert job["spec"]["data"]["train"] == dataset
    spec["data"] = {"train": dataset, "validation": str(texts("bad.jsonl", [{"tokens": ["a"]}]))}
    error = error_of(client.post("/v1/jobs", json=spec), 422, "data_error")
    assert error["param"] == "data.validation" and "no column 'tags'" in error["message"]
    spec["data"] = {"train": {"dataset": "treebank", "split": "train"}}
    error = error_of(client.post("/v1/jobs", json=spec), 422, "invalid_spec")
    assert error["param"] == "data.train.split"


def test_one_tag_alone_teaches_nothing(client: httpx.Client, texts: Texts) -> None:
    spec = training(texts, "token-classification", "encoder", TAGGED[1:])
    error = error_of(client.post("/v1/jobs", json=spec), 422, "data_error")
    assert error["message"] == "'train.jsonl' has only one label ('O'): there is nothing to learn"
    assert "column 'tags'" in error["hint"]
