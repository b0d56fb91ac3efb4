"""Published models: versions that mean one thing for ever, stages, and specs that name them."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from shared.errors import GpuyardError
from shared.store import Store
from shared.store.models import change_model, list_versions, publish_model
from tests.api.conftest import error_of, submit
from tests.api.fake_worker import FakeFleet
from tests.api.model_folders import CLASSIFIER, write_model

Spec = Callable[..., dict[str, Any]]


@pytest.fixture
def train(
    client: httpx.Client, fleet: FakeFleet, train_spec: Spec, place: Path, settings: Any
) -> Any:
    """Runs a training job to its end: its id."""

    def run(**changes: Any) -> str:
        job = submit(client, train_spec(**changes))["id"]
        (holder,) = fleet.start(job)
        made = write_model(place / job, CLASSIFIER)
        for file in sorted(made.iterdir()):
            fleet.publish(holder, settings.data, f"model/{file.name}", file.read_bytes())
        fleet.finish(holder, {"metrics": {"accuracy": 0.9}})
        return job

    return run


def test_a_job_publishes_what_it_made_as_it_succeeds(client: httpx.Client, train: Any) -> None:
    first = train(publish="topics")
    second = train(publish="topics")
    models = client.get("/v1/models").json()["items"]
    assert [(m["reference"], m["job_id"]) for m in models] == [("topics@2", second)]
    versions = client.get("/v1/models/topics").json()["items"]
    assert [(m["version"], m["job_id"]) for m in versions] == [(2, second), (1, first)]
    assert versions[0]["metrics"] == {"accuracy": 0.9}
    assert versions[0]["task"] == "text-classification"
    story = client.get(f"/v1/jobs/{first}/events?format=json").json()
    assert story[-1]["type"] == "published" and "topics@1" in story[-1]["message"]


def test_publishing_later_and_again(client: httpx.Client, train: Any) -> None:
    job = train()
    body = {"job": job, "name": "topics", "tags": ["good", "good"]}
    answer = client.post("/v1/models", json=body)
    assert answer.status_code == 201, answer.text
    assert answer.json()["tags"] == ["good"]
    again = client.post("/v1/models", json=body)
    assert (again.status_code, again.json()) == (200, answer.json())
    assert client.post("/v1/models", json={"job": job, "name": "other"}).json()["version"] == 1


def test_a_spec_names_a_version_the_latest_or_a_stage(
    client: httpx.Client, train: Any, infer_spec: Spec
) -> None:
    jobs = [train(publish="topics") for _ in range(3)]
    client.patch("/v1/models/topics/2", json={"stage": "production"}).raise_for_status()
    wanted = {"topics@1": jobs[0], "topics@latest": jobs[2], "topics@production": jobs[1]}
    for reference, job in wanted.items():
        made = submit(client, infer_spec(1, model=reference))
        path = client.get(f"/v1/jobs/{job}/artifacts").json()["items"][0]["path"]
        assert made["model"] == reference
        detail = client.get(f"/v1/jobs/{made['id']}").json()
        assert detail["spec"]["model"] == reference
        assert job in path
    for reference, says in [
        ("topics@9", "topics@3, topics@2, topics@1"),
        ("topics@staging", "topics@3"),
        ("nothing@1", "gpuyard models"),
    ]:
        spec = infer_spec(1, model=reference)
        error = error_of(client.post("/v1/jobs", json=spec), 422, "model_not_found")
        assert says in error["hint"]


def test_one_version_is_in_production(client: httpx.Client, train: Any) -> None:
    for _ in range(2):
        train(publish="topics")
    assert client.patch("/v1/models/topics/1", json={"stage": "production"}).status_code == 200
    assert client.patch("/v1/models/topics/2", json={"stage": "production"}).status_code == 200
    stages = {m["version"]: m["stage"] for m in client.get("/v1/models/topics").json()["items"]}
    assert stages == {1: "archived", 2: "production"}
    error = error_of(client.delete("/v1/models/topics/2"), 409, "conflict")
    assert "production" in error["message"]
    assert client.get("/v1/models/topics/production").json()["version"] == 2


def test_a_deleted_number_is_never_given_again(client: httpx.Client, train: Any) -> None:
    job = train(publish="topics")
    client.delete("/v1/models/topics/1").raise_for_status()
    assert error_of(client.get("/v1/models/topics"), 404, "not_found")
    assert client.get("/v1/models").json()["items"] == []
    answer = client.post("/v1/models", json={"job": job, "name": "topics"})
    assert answer.json()["version"] == 2


def test_bad_requests_are_told(
    client: httpx.Client, train: Any, train_spec: Spec, infer_spec: Spec
) -> None:
    waiting = submit(client, train_spec())["id"]
    for body, status, code in [
        ({"job": waiting, "name": "topics"}, 409, "conflict"),
        ({"job": submit(client, infer_spec(1))["id"], "name": "topics"}, 409, "conflict"),
        ({"job": "job_0", "name": "topics"}, 404, "not_found"),
        ({"job": waiting, "name": "Topics!"}, 422, "invalid_request"),
        ({"job": waiting, "name": "topics", "tags": [""]}, 422, "invalid_request"),
    ]:
        assert error_of(client.post("/v1/models", json=body), status, code)
    train(publish="topics")
    assert error_of(
        client.patch("/v1/models/topics/1", json={"stage": "live"}), 422, "invalid_request"
    )
    assert error_of(
        client.patch("/v1/models/topics/7", json={"stage": "staging"}), 404, "not_found"
    )
    assert error_of(client.get("/v1/models/topics/nowhere"), 404, "not_found")
    assert error_of(client.post("/v1/jobs", json=train_spec(publish="A b")), 422, "invalid_spec")


def test_models_are_paged_by_name(client: httpx.Client, train: Any) -> None:
    job = train()
    for name in ("c", "a", "b"):
        client.post("/v1/models", json={"job": job, "name": name}).raise_for_status()
    seen: list[str] = []
    cursor: str | None = None
    while True:
        asked = {"limit": 2} | ({"cursor": cursor} if cursor else {})
        page = client.get("/v1/models", params=asked).json()
        seen += [m["name"] for m in page["items"]]
        if (cursor := page["next"]) is None:
            break
    assert seen == ["a", "b", "c"]


def test_many_publish_and_promote_at_once(store: Store, train: Any) -> None:
    jobs = [train() for _ in range(6)]
    problems: list[GpuyardError] = []

    def publish(job: str) -> None:
        try:
            model, _ = store.call(publish_model, job, "topics")
            store.call(change_model, "topics", model.version, stage="production")
        except GpuyardError as error:
            problems.append(error)

    threads = [threading.Thread(target=publish, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []
    versions = store.call(list_versions, "topics")
    assert [m.version for m in versions] == [6, 5, 4, 3, 2, 1]
    assert {m.job_id for m in versions} == set(jobs)
    assert [m.stage for m in versions].count("production") == 1
    assert json.dumps([m.stage for m in versions]).count("archived") == 5
