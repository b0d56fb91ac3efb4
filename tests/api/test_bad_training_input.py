"""The nine kinds of bad input to a training, as far as they can be known when a job is submitted.

In the order of ``tests/training/test_bad_input.py``, where a rank meets the same nine. An empty class (2)
and texts that are too long (3) stop nothing, and only a rank can tell.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.api.conftest import error_of, submit
from tests.api.model_folders import CAUSAL, CLASSIFIER, ENCODER, write_model

Spec = Callable[..., dict[str, Any]]
Texts = Callable[..., Path]
CHAT = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "There."}]


def refused(client: httpx.Client, spec: dict[str, Any], code: str, param: str | None) -> str:
    error = error_of(client.post("/v1/jobs", json=spec), 422, code)
    assert error["param"] == param, error
    assert client.get("/v1/jobs").json()["items"] == [], "something was stored"
    return f"{error['message']} {error['hint'] or ''}"


# --- 1 ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("label", [1.5, True, None, [1]])
def test_labels_that_are_no_integers(
    client: httpx.Client, train_spec: Spec, texts: Texts, label: Any
) -> None:
    rows = [{"text": "a", "label": 1}, {"text": "b", "label": label}]
    spec = train_spec(data={"train": str(texts("t.jsonl", rows))})
    said = refused(client, spec, "data_error", "data.train")
    assert "'t.jsonl' line 2: column 'label' must be a string or a whole number, not " in said


def test_labels_of_unknown_names(client: httpx.Client, train_spec: Spec, texts: Texts) -> None:
    spec = train_spec()
    spec["data"]["validation"] = str(texts("v.jsonl", [{"text": "a", "label": "weather"}]))
    said = refused(client, spec, "data_error", "data.validation")
    assert "'v.jsonl' line 1: label 'weather' does not occur in the training data" in said


# --- 2 and 3 ----------------------------------------------------------------------------------


def test_an_empty_class_and_long_texts_stop_nothing(
    client: httpx.Client, train_spec: Spec, texts: Texts, place: Path
) -> None:
    knows = {**CLASSIFIER, "id2label": {"0": "a", "1": "b", "2": "c"}}
    write_model(place / "roots" / "topics", knows)
    rows = [{"text": "long " * 5000, "label": label} for label in "ab"]
    submit(client, train_spec(model="topics", data={"train": str(texts("t.jsonl", rows))}))


# --- 4 ----------------------------------------------------------------------------------------


def test_tags_and_tokens_of_unequal_length(
    client: httpx.Client, train_spec: Spec, texts: Texts
) -> None:
    rows = [{"tokens": ["a", "b"], "tags": ["O", "B-X"]}, {"tokens": ["a", "b"], "tags": ["O"]}]
    data = {"train": str(texts("t.jsonl", rows))}
    said = refused(
        client, train_spec(task="token-classification", data=data), "data_error", "data.train"
    )
    assert "'t.jsonl' line 2: column 'tokens' has 2 words and column 'tags' 1 tags" in said


# --- 5 ----------------------------------------------------------------------------------------


def test_a_tokenizer_without_a_padding_token(
    client: httpx.Client, train_spec: Spec, place: Path, texts: Texts
) -> None:
    def encoder(name: str, config: dict[str, Any], **special: str) -> str:
        folder = write_model(place / "roots" / name, ENCODER)
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        (folder / "special_tokens_map.json").write_text(json.dumps(special))
        return name

    bare = {"tokenizer_class": "PreTrainedTokenizerFast"}
    said = refused(client, train_spec(model=encoder("bare", bare)), "unsupported_model", "model")
    assert "the tokenizer of model 'bare' has no padding token" in said
    assert "tokenizer.pad_token" in said
    # Told in one file or the other, or the class has one of its own.
    submit(client, train_spec(model=encoder("one", {**bare, "pad_token": "[PAD]"})))
    submit(client, train_spec(model=encoder("other", bare, pad_token="[PAD]")))
    submit(client, train_spec(model=encoder("own", {"tokenizer_class": "BertTokenizer"})))
    folder = write_model(place / "roots" / "gpt", {**CAUSAL})
    (folder / "tokenizer_config.json").write_text(json.dumps(bare))
    data = {"train": str(texts("lm.jsonl", [{"text": "a"}]))}
    submit(client, train_spec(task="text-generation", model="gpt", data=data))


@pytest.mark.parametrize(
    ("row", "changes"),
    [
        ({"messages": CHAT}, {}),
        ({"messages": CHAT[:1], "chosen": "a", "rejected": "b"}, {"preference": {}}),
    ],
)
def test_a_tokenizer_without_a_chat_template(
    client: httpx.Client,
    train_spec: Spec,
    texts: Texts,
    place: Path,
    row: dict[str, Any],
    changes: dict[str, Any],
) -> None:
    folder = write_model(place / "roots" / "plain", CAUSAL)
    plain = {"prompt": "a", "completion": "b", "chosen": "c", "rejected": "d"}
    rows = [plain, row]
    data = {"train": str(texts("chats.jsonl", rows))}
    spec = train_spec(task="text-generation", model="plain", data=data, **changes)
    said = refused(client, spec, "unsupported_model", "model")
    assert "'chats.jsonl' line 2 is a chat, and model 'plain' has no chat template" in said
    scratch = {
        **spec, "model": None, "method": "pretrain", "architecture": {"type": "llama"},
        "preference": None,
    }  # fmt: skip
    if not changes:
        said = refused(client, scratch, "unsupported_model", "architecture")
        assert "a model from scratch has no chat template" in said
    submit(client, train_spec(
        task="text-generation", model="plain",
        data={"train": str(texts("plain.jsonl", [plain]))}, **changes,
    ))  # fmt: skip
    config = folder / "tokenizer_config.json"
    config.write_text(json.dumps({"chat_template": "{{ messages }}"}))
    submit(client, spec)
    config.write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    submit(client, spec)


# --- 6 ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "model"),
    [
        ("text-classification", "causal"),
        ("token-classification", "causal"),
        ("text-generation", "encoder"),
        ("text2text", "encoder"),
        ("fill-mask", "causal"),
        ("embeddings", "causal"),
    ],
)
def test_a_model_whose_architecture_does_not_fit_the_task(
    client: httpx.Client, train_spec: Spec, task: str, model: str
) -> None:
    said = refused(client, train_spec(task=task, model=model), "unsupported_model", "model")
    assert f"model '{model}' is " in said


# --- 7 ----------------------------------------------------------------------------------------


def test_a_teacher_with_other_labels(client: httpx.Client, train_spec: Spec, place: Path) -> None:
    def teacher(name: str, labels: dict[str, str]) -> dict[str, Any]:
        write_model(place / "roots" / name, {**CLASSIFIER, "id2label": labels})
        return train_spec(method="distillation", teacher=name)

    spec = teacher("others", {"0": "b", "1": "c"})
    said = refused(client, spec, "unsupported_model", "teacher")
    assert "teacher 'others' was not trained for these labels: the data have 'a', 'b'" in said
    assert "it knows 'b', 'c'" in said
    said = refused(client, teacher("unnamed", {}), "unsupported_model", "teacher")
    assert "it knows none" in said
    submit(client, teacher("same", {"0": "b", "1": "a"}))


# --- 8 ----------------------------------------------------------------------------------------


def test_a_lora_target_that_matches_nothing(
    client: httpx.Client, train_spec: Spec, place: Path
) -> None:
    tensors = {f"encoder.layer.{i}.attention.self.query.weight": (4, 4) for i in range(2)}
    write_model(place / "roots" / "attends", ENCODER, tensors)

    def spec(*targets: str) -> dict[str, Any]:
        return train_spec(model="attends", method="lora", lora={"targets": targets})

    said = refused(client, spec("q_proj", "uery"), "invalid_spec", "lora.targets")
    assert "lora.targets q_proj, uery match no layer of model 'attends'" in said
    assert "'query'" in said
    submit(client, spec("q_proj", "query"))
    submit(client, spec("self.query"))
    # A head is new, and a tied one has no weight of its own: only a rank knows.
    submit(client, spec("classifier"))


# --- 9 ----------------------------------------------------------------------------------------


def test_a_global_batch_that_the_world_size_does_not_divide(
    client: httpx.Client, train_spec: Spec
) -> None:
    spec = train_spec(hyperparameters={"batch_size": 32}, resources={"devices": 3})
    said = refused(client, spec, "invalid_spec", None)
    assert (
        "batch_size 32 is the global batch and does not divide evenly over resources.devices 3"
        in (said)
    )
