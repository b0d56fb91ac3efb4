"""Bad input: each is refused when it is submitted, names the field, and says what to do."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from shared.capability import GIB, Capability
from shared.settings import Settings
from shared.store import Store
from tests.api.conftest import Api, error_of, running, submit
from tests.api.fake_worker import FakeFleet
from tests.api.model_folders import CLASSIFIER, ENCODER, write_model, write_safetensors

Spec = Callable[..., dict[str, Any]]
T4 = Capability("cuda", 75, 16 * GIB)


def refused(
    client: httpx.Client, spec: Any, code: str, *, param: str | None = None, status: int = 422
) -> dict[str, Any]:
    error = error_of(client.post("/v1/jobs", content=json.dumps(spec)), status, code)
    assert error["param"] == param, error
    assert client.get("/v1/jobs").json()["items"] == [], "something was stored"
    return error


# --- the spec itself ---------------------------------------------------------------------------


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


# --- models -----------------------------------------------------------------------------------


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
    submit(client, infer_spec(model="causal", task="text-generation"))


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


# --- data -------------------------------------------------------------------------------------


def rows(n: int = 6) -> list[Any]:
    return [{"text": f"text {i}", "label": "ab"[i % 2]} for i in range(n)]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b'{"text": "x", "label": "a"}\n\n{"text": \n', "line 3: no JSON"),
        (b'{"text": "x", "label": "a"}\n[1]\n', "line 2: no JSON object but a list"),
        (b'{"text": "x", "label": "a"}\n{"text": "y"}\n', "line 2: there is no column 'label'"),
        (
            b'{"txt": "x", "label": "a"}\n',
            "line 1: there is no column 'text'; the row has 'txt', 'label'",
        ),
        (b'{"text": 5, "label": "a"}\n', "line 1: column 'text' must be a string, not a number"),
        (b'{"text": "x", "label": 0.5}\n', "column 'label' must be a string or a whole number"),
        (b'{"text": "x", "label": true}\n', "not a boolean"),
        (b'{"text": "x", "label": "a"}\n{"text": "\xff"}\n', "line 2: not UTF-8"),
        (b"", "has no rows"),
        (b"\n \n", "has no rows"),
        (b'{"text": "x", "label": "a"}\n' * 3, "only one label ('a')"),
    ],
)
def test_training_data_that_cannot_train(
    client: httpx.Client, train_spec: Spec, texts: Any, content: bytes, says: str
) -> None:
    spec = train_spec(data={"train": str(texts("bad.jsonl", content))})
    error = refused(client, spec, "data_error", param="data.train")
    assert says in error["message"]
    assert "bad.jsonl" in error["message"]


def test_a_byte_order_mark_and_integer_labels_are_fine(
    client: httpx.Client, train_spec: Spec, texts: Any
) -> None:
    content = b'\xef\xbb\xbf{"text": "x", "label": 0}\r\n{"text": "y", "label": 1}'
    submit(client, train_spec(data={"train": str(texts("bom.jsonl", content))}))


def test_a_label_that_training_lacks(client: httpx.Client, train_spec: Spec, texts: Any) -> None:
    odd = [*rows(), {"text": "z", "label": "c"}]
    data = {"train": str(texts("t.jsonl", rows())), "validation": str(texts("v.jsonl", odd))}
    error = refused(client, train_spec(data=data), "data_error", param="data.validation")
    assert "'v.jsonl' line 7: label 'c'" in error["message"]


def test_a_split_that_leaves_nothing(client: httpx.Client, train_spec: Spec, texts: Any) -> None:
    path = str(texts("t.jsonl", rows(40)))
    data = {"train": path, "validation_split": 0.02}
    refused(client, train_spec(data=data), "data_error", param="data.validation_split")
    submit(client, train_spec(data={"train": path, "validation_split": 0.1}))


def test_only_so_much_is_scanned(
    database: str,
    make_settings: Callable[..., Settings],
    store: Store,
    train_spec: Spec,
    texts: Any,
) -> None:
    content = "".join(json.dumps(row) + "\n" for row in rows()).encode() + b"no json\n"
    spec = train_spec(data={"train": str(texts("long.jsonl", content))})
    settings = make_settings(database, max_scan_bytes=60, auth=False)
    with running(settings, store) as api, api.client() as client:
        submit(client, spec)


@pytest.mark.parametrize("path", ["/etc/passwd", "/proc/self/environ", "/nowhere/at/all"])
def test_files_outside_the_roots(client: httpx.Client, train_spec: Spec, path: str) -> None:
    spec = train_spec(data={"train": path})
    error = refused(client, spec, "path_not_allowed", param="data.train", status=403)
    assert "exist" not in error["message"], "it tells nothing about files outside"


def test_ways_around_the_roots(
    client: httpx.Client, train_spec: Spec, infer_spec: Spec, texts: Any, place: Path
) -> None:
    secret = place / "secret.jsonl"
    secret.write_text('{"text": "x", "label": "a"}\n')
    (place / "texts" / "linked.jsonl").symlink_to(secret)
    for path in (place / "texts" / "linked.jsonl", place / "texts" / ".." / "secret.jsonl"):
        spec = train_spec(data={"train": str(path)})
        refused(client, spec, "path_not_allowed", param="data.train", status=403)
        spec = {**infer_spec(), "rows": None, "input": str(path)}
        refused(client, spec, "path_not_allowed", param="input", status=403)


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("relative.jsonl", "neither an uploaded file's id nor an absolute path"),
        ("file_01JD2V5N0W8R4QK7T9Y3ZB6XEM", "no uploaded file"),
        ("file_odd", "no uploaded file"),
        ("{texts}/missing.jsonl", "does not exist"),
        ("{texts}/folder", "is a folder"),
    ],
)
def test_files_that_are_not_there(
    client: httpx.Client, train_spec: Spec, place: Path, path: str, says: str
) -> None:
    (place / "texts" / "folder").mkdir()
    spec = train_spec(data={"train": path.replace("{texts}", str(place / "texts"))})
    assert says in refused(client, spec, "data_error", param="data.train")["message"]


def test_rows_of_a_batch_job_may_be_bad_but_there_must_be_some(
    client: httpx.Client, infer_spec: Spec, texts: Any
) -> None:
    spec = {**infer_spec(), "rows": None}
    for content in (b"", b"\n\n  \n"):
        bad = {**spec, "input": str(texts("none.jsonl", content))}
        assert "no rows" in refused(client, bad, "data_error", param="input")["message"]
    refused(client, {**spec, "rows": []}, "invalid_spec", param="rows")
    odd = {**spec, "input": str(texts("odd.jsonl", b'no json\n\xff\n{"text": 5}\n'))}
    assert submit(client, odd)["rows_total"] == 3


def test_one_endless_line_is_no_jsonl(client: httpx.Client, infer_spec: Spec, place: Path) -> None:
    path = place / "texts" / "endless.jsonl"
    with path.open("wb") as file:
        file.truncate(100_000_000)
    refused(client, {**infer_spec(), "rows": None, "input": str(path)}, "data_error", param="input")


# --- what the fleet has ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("resources", "says"),
    [
        ({"accelerator": "cuda", "memory_gb": 40}, "needs 40 GB, has 16 GB"),
        ({"min_compute_capability": 8.0}, "needs compute capability 8.0"),
        ({"accelerator": "cuda", "features": ["bf16"]}, "needs bf16"),
    ],
)
def test_requirements_that_no_device_can_ever_meet(
    client: httpx.Client, fleet: FakeFleet, train_spec: Spec, resources: Any, says: str
) -> None:
    fleet.add_device("gpu0@fake", T4)
    error = refused(client, train_spec(resources=resources), "unsatisfiable", param="resources")
    assert says in error["message"]
    assert error["hint"]


def test_the_precision_asked_for_is_a_requirement(
    client: httpx.Client, fleet: FakeFleet, train_spec: Spec
) -> None:
    fleet.add_device("gpu0@fake", T4)
    spec = train_spec(resources={"accelerator": "cuda"}, hyperparameters={"precision": "bf16"})
    refused(client, spec, "unsatisfiable", param="resources")


def test_an_empty_fleet_refuses_nothing_unless_asked_to(
    client: httpx.Client, train_spec: Spec
) -> None:
    wanted = {"accelerator": "cuda", "memory_gb": 40}
    refused(client, train_spec(fail_fast=True), "unsatisfiable", param="resources")
    submit(client, train_spec(resources=wanted))


def test_more_devices_than_the_fleet_has_waits_unless_asked_not_to(
    client: httpx.Client, fleet: FakeFleet, train_spec: Spec
) -> None:
    many = {"resources": {"devices": 4}}
    error = refused(client, train_spec(**many, fail_fast=True), "unsatisfiable", param="resources")
    assert "needs 4 devices, the fleet has 1" in error["message"]
    assert submit(client, train_spec(**many))["state"] == "queued"


def test_an_estimate_alone_refuses_nothing(
    client: httpx.Client, store: Store, train_spec: Spec, place: Path
) -> None:
    FakeFleet(store).add_device("gpu0@fake", Capability("cuda", 75, GIB // 4))
    job = submit(client, train_spec())
    assert job["requirements"]["memory_bytes"] > GIB // 4


def test_nothing_of_a_refused_submission_stays(api: Api, infer_spec: Spec) -> None:
    with api.client() as client:
        refused(client, infer_spec(model="nothing"), "model_not_found", param="model")
    assert not (api.settings.data / "inline").exists()
