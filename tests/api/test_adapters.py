"""Specs that name a LoRA adapter: its base is found as any model is, and what cannot be applied is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from shared.resolved import Resolved
from shared.settings import Settings
from shared.store import Store
from shared.store.read import get_job
from tests.api.conftest import error_of, submit
from tests.api.fake_worker import FakeFleet
from tests.api.model_folders import CAUSAL, CLASSIFIER, write_model, write_safetensors
from tests.api.refusals import Spec, refused


@pytest.fixture
def base(settings: Settings) -> str:
    write_model(settings.model_roots[0] / "writer", CAUSAL)
    return "writer"


@pytest.fixture
def adapter(settings: Settings) -> Callable[..., str]:
    def make(name: str = "my-adapter", base: Any = "writer", **config: Any) -> str:
        write_adapter(settings.model_roots[0] / name, base, **config)
        return name

    return make


def write_adapter(folder: Path, base: Any, **config: Any) -> Path:
    folder.mkdir(parents=True)
    whole = {"peft_type": "LORA", "r": 4, "base_model_name_or_path": base, **config}
    (folder / "adapter_config.json").write_text(json.dumps(whole))
    write_safetensors(folder / "adapter_model.safetensors", {"a": (4, 16)})
    return folder


def generate(infer_spec: Spec, model: str, **changes: Any) -> dict[str, Any]:
    return infer_spec(
        **{"model": model, "task": "text-generation", "text_column": "text", **changes}
    )


def found(store: Store, job: dict[str, Any]) -> Resolved:
    row = store.call(get_job, job["id"])
    assert row is not None
    return Resolved.model_validate(row.resolved)


def test_a_folder_with_an_adapter_runs_on_its_base(
    client: httpx.Client,
    store: Store,
    settings: Settings,
    infer_spec: Spec,
    base: str,
    adapter: Any,
) -> None:
    for task in ("text-generation", "scoring"):
        spec = generate(infer_spec, adapter(f"for-{task}"), task=task)
        model = found(store, submit(client, spec)).model
        root = settings.model_roots[0]
        assert (model.path, model.adapter) == (str(root / base), str(root / f"for-{task}"))
        assert model.label == base  # what a device holds warm, and serves all of its adapters
    plain = submit(client, generate(infer_spec, base))
    assert found(store, plain).model.adapter is None


def test_the_adapter_of_a_training_runs_on_the_base_of_that(
    client: httpx.Client, store: Store, settings: Settings, fleet: FakeFleet,
    train_spec: Spec, infer_spec: Spec, base: str, place: Path, texts: Any,
) -> None:  # fmt: skip
    rows = texts("passages.jsonl", [{"text": "the cat"}, {"text": "sat"}])
    spec = train_spec(task="text-generation", model=base, method="lora", data={"train": str(rows)})
    trainings = []
    for parts in ("adapter", "model"):
        job = submit(client, spec)["id"]
        (holder,) = fleet.start(job)
        made = write_adapter(place / f"made-{job}", base)
        for file in sorted(made.iterdir()) if parts == "adapter" else []:
            fleet.publish(holder, settings.data, f"adapter/{file.name}", file.read_bytes())
        fleet.finish(holder, {})
        trainings.append(job)
    model = found(store, submit(client, generate(infer_spec, f"adapter:{trainings[0]}"))).model
    assert model.path == str(settings.model_roots[0] / base)
    assert model.adapter is not None and trainings[0] in model.adapter
    assert (Path(model.adapter) / "adapter_model.safetensors").is_file()
    spec = generate(infer_spec, f"adapter:{trainings[1]}")
    error = error_of(client.post("/v1/jobs", json=spec), 422, "model_not_found")
    assert "made no adapter" in error["message"] and "method lora" in error["hint"]


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"peft_type": "IA3"}, "has peft_type = IA3, which is not applied"),
        ({"use_dora": True}, "has use_dora = True, which is not applied"),
        ({"bias": "all"}, "has bias = all"),
        ({"modules_to_save": ["lm_head"]}, "has modules_to_save"),
        ({"base": None}, "names no base model"),
        ({"base": "gone"}, "the base of adapter 'my-adapter': there is no model 'gone'"),
        ({"base": "/etc"}, "lies outside the model roots"),
        ({"base": "my-adapter"}, "is an adapter itself"),
        ({"base": "labels"}, "the base of adapter 'my-adapter': model 'labels' is"),
    ],
)
def test_what_cannot_be_applied_is_refused(
    client: httpx.Client, settings: Settings, infer_spec: Spec, base: str, adapter: Any,
    config: dict[str, Any], says: str,
) -> None:  # fmt: skip
    write_model(settings.model_roots[0] / "labels", CLASSIFIER)
    answer = client.post("/v1/jobs", json=generate(infer_spec, adapter(**config)))
    assert answer.status_code in (403, 422), answer.text
    assert says in answer.json()["error"]["message"]


def test_tasks_and_trainings_take_no_adapter(
    client: httpx.Client, train_spec: Spec, infer_spec: Spec, base: str, adapter: Any
) -> None:
    name = adapter()
    spec = infer_spec(model=name, task="embeddings")
    error = refused(client, spec, "unsupported_model", param="model")
    assert "cannot be used for embeddings" in error["message"] and "Merge it" in error["hint"]
    error = refused(client, train_spec(model=name), "unsupported_model", param="model")
    assert "cannot be trained further" in error["message"]


def test_an_adapter_without_safetensors_is_refused(
    client: httpx.Client, settings: Settings, infer_spec: Spec, base: str, adapter: Any
) -> None:
    folder = settings.model_roots[0] / adapter()
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    error = refused(client, generate(infer_spec, folder.name), "unsupported_model", param="model")
    assert "has no adapter_model.safetensors" in error["message"]
