"""Models that are not there, are not whole, or cannot do the task: refused when they are submitted."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from shared.settings import Settings
from shared.store import Store
from tests.api.conftest import error_of, running, submit
from tests.api.fake_worker import FakeFleet
from tests.api.model_folders import CLASSIFIER, ENCODER, write_model, write_safetensors
from tests.api.refusals import Spec, refused


def test_an_unknown_model_names_what_is_there(client: httpx.Client, train_spec: Spec) -> None:
    error = refused(client, train_spec(model="encodr"), "model_not_found", param="model")
    assert "Did you mean 'encoder'?" in error["hint"]
    hub = refused(client, train_spec(model="google/bert"), "model_not_found", param="model")
    assert "GPUYARD_HUB" in hub["hint"]


@pytest.mark.parametrize("model", ["../roots/encoder", "/etc", "a/../../encoder", "/proc/self"])
def test_a_model_outside_the_roots(client: httpx.Client, train_spec: Spec, model: str) -> None:
    refused(client, train_spec(model=model), "path_not_allowed", param="model", status=403)


def test_a_link_out_of_the_model_root_is_not_followed(
    client: httpx.Client, train_spec: Spec, place: Path
) -> None:
    write_model(place / "elsewhere", ENCODER)
    (place / "roots" / "linked").symlink_to(place / "elsewhere")
    refused(client, train_spec(model="linked"), "path_not_allowed", param="model", status=403)


def test_an_absolute_path_below_a_root_is_fine(
    client: httpx.Client, train_spec: Spec, place: Path
) -> None:
    submit(client, train_spec(model=str(place / "roots" / "encoder")))


def test_models_that_cannot_do_the_task(
    client: httpx.Client, train_spec: Spec, infer_spec: Spec
) -> None:
    headless = refused(client, infer_spec(model="encoder"), "unsupported_model", param="model")
    assert "Fine-tune" in headless["hint"]
    refused(client, train_spec(model="causal"), "unsupported_model", param="model")
    refused(
        client,
        infer_spec(model="encoder", task="text-generation"),
        "unsupported_model",
        param="model",
    )
    for name, task in (("encoder", "scoring"), ("causal", "reranking")):
        refused(client, infer_spec(model=name, task=task), "unsupported_model", param="model")
    submit(client, infer_spec(model="causal", task="text-generation"))
    submit(client, infer_spec(model="causal", task="scoring", token_logprobs=True))


def test_a_cross_encoder_has_one_label_or_two(
    client: httpx.Client, infer_spec: Spec, place: Path
) -> None:
    for labels in (1, 2, 3):
        names = {str(i): f"LABEL_{i}" for i in range(labels)}
        write_model(place / "roots" / f"cross{labels}", {**CLASSIFIER, "id2label": names})
    error = refused(
        client, infer_spec(model="cross3", task="reranking"), "unsupported_model", param="model"
    )
    assert "more than two labels" in error["message"] and "cross-encoder" in error["hint"]
    for labels in (1, 2):
        submit(client, infer_spec(model=f"cross{labels}", task="reranking", top_n=3))


@pytest.mark.parametrize(
    "option",
    [{"token_logprobs": True}, {"end_of_text": True}, {"top_n": 3}, {"aggregation": "max"}],
)
def test_options_of_one_task_are_refused_for_others(
    client: httpx.Client, infer_spec: Spec, option: dict[str, Any]
) -> None:
    error = refused(client, infer_spec(**option), "invalid_spec")
    (name,) = option
    assert error["message"].startswith(f"{name} applies to task ")


def test_model_folders_that_are_not_whole(
    client: httpx.Client, train_spec: Spec, place: Path
) -> None:
    roots = place / "roots"

    def broken(name: str) -> Path:
        return write_model(roots / name, ENCODER)

    def says(name: str) -> str:
        message = refused(client, train_spec(model=name), "unsupported_model", param="model")
        return str(message["message"])

    (broken("noconfig") / "config.json").unlink()
    assert "no config.json" in says("noconfig")
    (broken("oddconfig") / "config.json").write_text("{")
    assert "cannot be read" in says("oddconfig")
    (broken("notokenizer") / "tokenizer.json").unlink()
    assert "no tokenizer" in says("notokenizer")
    pickled = broken("pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    assert "pickle" in says("pickled")
    cut = broken("cut") / "model.safetensors"
    os.truncate(cut, cut.stat().st_size - 4)
    assert "damaged" in says("cut")
    (broken("empty") / "model.safetensors").write_bytes(b"")
    assert "damaged" in says("empty")
    index = broken("index")
    (index / "model.safetensors").unlink()
    weights = {"weight_map": {"w": "../encoder/model.safetensors"}}
    (index / "model.safetensors.index.json").write_text(json.dumps(weights))
    assert "outside its folder" in says("index")
    (index / "model.safetensors.index.json").write_text('{"weight_map": {"w": "one.safetensors"}}')
    assert "missing" in says("index")
    write_safetensors(index / "one.safetensors", {"w": (4, 4)})
    submit(client, train_spec(model="index"))


def test_the_model_of_a_job(
    client: httpx.Client, fleet: FakeFleet, settings: Settings, train_spec: Spec, infer_spec: Spec,
    place: Path,
) -> None:  # fmt: skip
    training = submit(client, train_spec())["id"]
    spec = infer_spec(model=f"job:{training}")

    def says(model: str, code: str) -> str:
        answer = client.post("/v1/jobs", json={**spec, "model": model})
        return str(error_of(answer, 422, code)["message"])

    assert "is queued" in says(f"job:{training}", "model_not_found")
    assert "no job" in says("job:odd", "model_not_found")
    assert "no job" in says("job:job_01JD2V5N0W8R4QK7T9Y3ZB6XEM", "model_not_found")
    (holder,) = fleet.start(training)
    made = write_model(place / "made", CLASSIFIER)
    for file in made.iterdir():
        fleet.publish(holder, settings.data, f"model/{file.name}", file.read_bytes())
    assert "is running" in says(f"job:{training}", "model_not_found")
    fleet.finish(holder, {"accuracy": 0.9})
    batch = submit(client, spec)
    assert batch["model"] == f"job:{training}"
    assert "no training job" in says(f"job:{batch['id']}", "unsupported_model")
    next(settings.data.glob("jobs/*/*/artifacts/model/config.json")).unlink()
    assert "gone from the data folder" in says(f"job:{training}", "model_not_found")


def test_the_hub_where_it_is_enabled(
    database: str, make_settings: Callable[..., Settings], store: Store, train_spec: Spec
) -> None:
    settings = make_settings(database, hub=True, auth=False)
    with running(settings, store) as api, api.client() as client:
        submit(client, train_spec(model="google/bert_uncased_L-2"))
