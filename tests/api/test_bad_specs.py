"""Bad specs: each is refused when it is submitted, names the field, and says what to do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.api.conftest import error_of, submit
from tests.api.refusals import Spec, refused


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"task": "telepathy"}, "task"),
        ({"kind": "bake"}, "kind"),
        ({"learning_rate": 0.1}, "learning_rate"),
        ({"hyperparameters": {"learning_rat": 0.1}}, "hyperparameters.learning_rat"),
        ({"hyperparameters": {"warmup_ratio": 0.1, "warmup_steps": 5}}, "hyperparameters"),
        ({"hyperparameters": {"batch_size": 8, "micro_batch_size": 16}}, "hyperparameters"),
        ({"hyperparameters": {"epochs": 0}}, "hyperparameters.epochs"),
        ({"hyperparameters": {"batch_size": 32, "micro_batch_size": 5}}, None),
        ({"resources": {"devices": 3}}, None),
        ({"resources": {"accelerator": "cpu", "min_compute_capability": 8}}, "resources"),
        ({"name": "nul\0"}, "name"),
        ({"name": "half \ud800"}, "name"),
    ],
)
def test_specs_that_contradict_themselves(
    client: httpx.Client, train_spec: Spec, changes: dict[str, Any], param: str | None
) -> None:
    refused(client, train_spec(**changes), "invalid_spec", param=param)


@pytest.mark.parametrize(
    ("changes", "says", "hint"),
    [
        (
            {"hyperparameters": {"epochs": 0}},
            "hyperparameters.epochs must be at least 1, not 0",
            "",
        ),
        (
            {"hyperparameters": {"batch_size": "big"}},
            "hyperparameters.batch_size must be a whole number, not 'big'",
            "",
        ),
        ({"data": "train.jsonl"}, "data must be an object, not 'train.jsonl'", ""),
        (
            {"model": None},
            "model must name what to fine-tune (or choose method 'pretrain' and an architecture)",
            "",
        ),
        ({"priority": 101, "extra": 1}, "priority must be at most 100, not 101", "wrong: extra"),
        (
            {"hyperparameters": {"learning_rat": 1}},
            "unknown field 'hyperparameters.learning_rat'",
            "Did you mean 'hyperparameters.learning_rate'?",
        ),
        (
            {"learning_rate": 1},
            "unknown field 'learning_rate'",
            "Did you mean 'hyperparameters.learning_rate'?",
        ),
        ({"zzz": 1}, "unknown field 'zzz'", "See /docs"),
        (
            {"task": "scoring"},
            "task 'scoring' is for batch jobs (kind 'infer') alone: it scores with a model of "
            "text-generation: train that",
            "",
        ),
        (
            {"task": "reranking"},
            "task 'reranking' is for batch jobs (kind 'infer') alone: it takes a cross-encoder, which "
            "is not trained here",
            "",
        ),
        (
            {
                "hyperparameters": {"batch_size": 32, "micro_batch_size": 6},
                "resources": {"devices": 2},
            },
            "hyperparameters.batch_size 32 over resources.devices 2 is 16 for each rank, "
            "which is no multiple of hyperparameters.micro_batch_size 6",
            "",
        ),
    ],
)
def test_what_is_wrong_is_said_in_words(
    client: httpx.Client, train_spec: Spec, changes: dict[str, Any], says: str, hint: str
) -> None:
    answer = client.post("/v1/jobs", json=train_spec(**changes))
    error = error_of(answer, 422, "invalid_spec")
    assert error["message"] == says
    assert hint in (error["hint"] or "")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"hyperparameters": {"packing": True}},
            "hyperparameters.packing applies to task 'text-generation' alone, not to "
            "'text-classification'",
        ),
        (
            {"task": "embeddings", "hyperparameters": {"mask_probability": 0.2}},
            "hyperparameters.mask_probability applies to task 'fill-mask' alone, not to 'embeddings'",
        ),
        (
            {"task": "fill-mask", "hyperparameters": {"contrastive_temperature": 0.1}},
            "hyperparameters.contrastive_temperature applies to task 'embeddings' alone, not to "
            "'fill-mask'",
        ),
        (
            {"task": "embeddings", "hyperparameters": {"batch_size": 8, "micro_batch_size": 1}},
            "embeddings learn to tell a pair from the others of its micro-batch: "
            "hyperparameters.batch_size 8 over resources.devices 1 and micro_batch_size 1 leaves one "
            "pair alone; a rank needs 2 or more at once",
        ),
        (
            {
                "task": "embeddings",
                "hyperparameters": {"batch_size": 4},
                "resources": {"devices": 4},
            },
            "embeddings learn to tell a pair from the others of its micro-batch: "
            "hyperparameters.batch_size 4 over resources.devices 4 leaves one pair alone; a rank "
            "needs 2 or more at once",
        ),
    ],
)
def test_options_of_another_task_and_pairs_without_others(
    client: httpx.Client, train_spec: Spec, changes: dict[str, Any], says: str
) -> None:
    error = refused(client, train_spec(**changes), "invalid_spec")
    assert error["message"] == says


@pytest.mark.parametrize(
    ("task", "model", "rows", "options", "says"),
    [
        (
            "text-generation",
            "causal",
            [{"text": "a"}, {"text": "b", "prompt": "c", "completion": "d"}],
            {"packing": True},
            "line 2: packing puts plain texts one after another, and the row has a column",
        ),
        ("embeddings", "encoder", [{"text": "a", "positive": "b"}], {}, "has one pair"),
        ("fill-mask", "encoder", [{"body": "a"}], {}, "line 1: there is no column 'text'"),
    ],
)
def test_rows_that_a_language_model_cannot_learn_from(
    client: httpx.Client,
    train_spec: Spec,
    texts: Callable[..., Path],
    task: str,
    model: str,
    rows: list[dict[str, Any]],
    options: dict[str, Any],
    says: str,
) -> None:
    data = {"train": str(texts("lm.jsonl", rows))}
    spec = train_spec(task=task, model=model, data=data, hyperparameters=options)
    assert says in refused(client, spec, "data_error", param="data.train")["message"]


def test_a_micro_batch_above_the_share_of_a_rank_is_fine(
    client: httpx.Client, train_spec: Spec
) -> None:
    batches = {"batch_size": 32, "micro_batch_size": 24}
    submit(client, train_spec(hyperparameters=batches, resources={"devices": 2}))


def test_a_number_that_json_has_and_postgres_has_not(
    client: httpx.Client, train_spec: Spec
) -> None:
    body = json.dumps(train_spec())[:-1] + ', "timeout_seconds": 1e999}'
    error_of(client.post("/v1/jobs", content=body), 422, "invalid_spec")


@pytest.mark.parametrize("body", [b"", b"{", b"{'kind': 'train'}", b"\xff", b"[NaN]", b"[" * 99999])
def test_a_body_that_is_no_json(client: httpx.Client, body: bytes) -> None:
    error_of(client.post("/v1/jobs", content=body), 422, "invalid_json")


@pytest.mark.parametrize("body", [[], None, "train", 7])
def test_json_that_is_no_spec(client: httpx.Client, body: Any) -> None:
    error = error_of(client.post("/v1/jobs", content=json.dumps(body)), 422, "invalid_spec")
    assert error["message"].startswith("a spec is an object, not ")


@pytest.mark.parametrize(
    ("generation", "task", "says"),
    [
        ({"schema": {"type": "wat"}}, "text-generation", "generation.schema cannot be used: "),
        ({"schema": {"enum": []}}, "text-generation", "generation.schema cannot be used: "),
        ({"schema": "x"}, "text-generation", "schema must be an object"),
        ({"schema": {}, "stop": ["x"]}, "text-generation", "the schema says where the text ends"),
        ({"schema": {}}, "text2text", "generation.schema applies to task 'text-generation' alone"),
    ],
)
def test_schemas_that_no_text_can_be_held_to(
    client: httpx.Client, infer_spec: Spec, generation: dict[str, Any], task: str, says: str
) -> None:
    spec = infer_spec(model="causal", task=task, generation=generation)
    error = error_of(client.post("/v1/jobs", json=spec), 422, "invalid_spec")
    assert error["message"].startswith(says)
    assert error["param"] in ("generation.schema", "generation", None)


def test_a_schema_is_kept_with_the_job(client: httpx.Client, infer_spec: Spec) -> None:
    generation = {"schema": {"type": "object", "properties": {"b": {}, "a": {}}}}
    spec = infer_spec(model="causal", task="text-generation", generation=generation)
    kept = submit(client, spec)["spec"]["generation"]
    assert json.loads(kept["json_schema"]) == generation["schema"]
    # In its order, which is that of the output.
    assert list(json.loads(kept["json_schema"])["properties"]) == ["b", "a"]
