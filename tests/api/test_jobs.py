"""Submit, list, look at and cancel."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from shared.lifecycle import FailureClass
from shared.store import Store
from shared.tables import Job
from tests.api.conftest import Api, error_of, submit
from tests.api.fake_worker import FakeFleet

Spec = Callable[..., dict[str, Any]]


def test_a_training_job_is_accepted_with_everything_resolved(
    client: httpx.Client, store: Store, train_spec: Spec, place: Path
) -> None:
    answer = client.post("/v1/jobs", json=train_spec(name="first"))
    assert answer.status_code == 201
    job = answer.json()
    assert answer.headers["location"] == f"/v1/jobs/{job['id']}"
    assert (job["state"], job["name"], job["model"]) == ("queued", "first", "encoder")
    assert job["spec"]["hyperparameters"]["epochs"] == 3, "defaults are filled in"
    assert job["requirements"]["memory_is_estimate"] is True
    assert job["requirements"]["memory_bytes"] > 500 * 1024**2
    with store.transaction() as session:
        resolved = session.get_one(Job, job["id"]).resolved
    assert resolved["model"]["path"] == str(place / "roots" / "encoder")
    assert resolved["model"]["parameters"] == 50 * 16
    assert resolved["inputs"]["train"]["rows"] == 40
    assert client.get(f"/v1/jobs/{job['id']}").json() == job


CHAT = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "There."}]


@pytest.mark.parametrize(
    ("task", "model", "row", "options"),
    [
        ("text-generation", "causal", {"text": "the old town"}, {"packing": True}),
        ("text-generation", "causal", {"prompt": "Where?", "completion": " There."}, {}),
        ("text-generation", "causal", {"messages": CHAT}, {"label_smoothing": 0.1}),
        ("fill-mask", "encoder", {"text": "the old town"}, {"mask_probability": 0.3}),
        ("embeddings", "encoder", {"text": "a", "positive": "b"}, {"contrastive_temperature": 0.1}),
    ],
)
def test_trainings_of_language_models_and_embeddings_are_accepted(
    client: httpx.Client,
    train_spec: Spec,
    texts: Callable[..., Path],
    task: str,
    model: str,
    row: dict[str, Any],
    options: dict[str, Any],
) -> None:
    data = {"train": str(texts("lm.jsonl", [row] * 20)), "validation_split": 0.2}
    spec = train_spec(task=task, model=model, data=data, hyperparameters=options)
    job = submit(client, spec)
    assert job["requirements"]["memory_bytes"] > 500 * 1024**2
    # What was stored has every field set, also those of other tasks.
    assert submit(client, job["spec"])["spec"] == job["spec"]


def test_inline_rows_become_a_file_and_shards(
    client: httpx.Client, settings: Any, infer_spec: Spec
) -> None:
    job = submit(client, infer_spec(10))
    assert (job["rows_total"], job["rows_done"], job["row_errors"]) == (10, 0, 0)
    assert job["spec"]["rows"] is None
    stored = Path(job["spec"]["input"])
    assert stored.parent == settings.data / "inline"
    assert len(stored.read_text().splitlines()) == 10
    again = submit(client, {**infer_spec(10), "rows": None, "input": str(stored)})
    assert again["rows_total"] == 10, "the stored spec can be submitted as it is"


def test_an_idempotency_key_gives_the_first_job(client: httpx.Client, infer_spec: Spec) -> None:
    spec = infer_spec()
    first = client.post("/v1/jobs", json=spec, headers={"Idempotency-Key": "k1"})
    again = client.post("/v1/jobs", json=spec, headers={"Idempotency-Key": "k1"})
    assert (first.status_code, again.status_code) == (201, 200)
    assert first.json()["id"] == again.json()["id"]
    other = client.post("/v1/jobs", json=infer_spec(3), headers={"Idempotency-Key": "k1"})
    error_of(other, 409, "idempotency_mismatch")
    assert submit(client, infer_spec(3), **{"Idempotency-Key": "k2"})["id"] != first.json()["id"]
    error_of(
        client.post("/v1/jobs", json=spec, headers={"Idempotency-Key": "x" * 256}),
        422,
        "invalid_request",
    )


def test_submissions_with_one_key_at_once_make_one_job(api: Api, infer_spec: Spec) -> None:
    spec, answers, start = infer_spec(), [], threading.Barrier(6)

    def post() -> None:
        with api.client() as client:
            client.get("/healthz")
            start.wait()
            answers.append(client.post("/v1/jobs", json=spec, headers={"Idempotency-Key": "race"}))

    threads = [threading.Thread(target=post) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(a.status_code for a in answers) == [200] * 5 + [201]
    assert len({a.json()["id"] for a in answers}) == 1
    with api.client() as client:
        assert len(client.get("/v1/jobs").json()["items"]) == 1


def test_pages_do_not_shift_when_jobs_are_added(client: httpx.Client, infer_spec: Spec) -> None:
    made = [submit(client, infer_spec(1, name=f"j{i}"))["id"] for i in range(7)]
    first = client.get("/v1/jobs", params={"limit": 3}).json()
    assert [j["id"] for j in first["items"]] == made[:3:-1]
    submit(client, infer_spec(1))
    second = client.get("/v1/jobs", params={"limit": 3, "cursor": first["next"]}).json()
    assert [j["id"] for j in second["items"]] == made[3:0:-1]
    last = client.get("/v1/jobs", params={"limit": 3, "cursor": second["next"]}).json()
    assert [j["id"] for j in last["items"]] == made[:1]
    assert last["next"] is None
    whole = client.get("/v1/jobs", params={"limit": 8}).json()
    assert (len(whole["items"]), whole["next"]) == (8, None)


def test_lists_are_filtered(client: httpx.Client, infer_spec: Spec, train_spec: Spec) -> None:
    batch = submit(client, infer_spec(1, name="a"))["id"]
    train = submit(client, train_spec(name="b"))["id"]
    client.post(f"/v1/jobs/{batch}/cancel")

    def ids(**params: Any) -> list[str]:
        return [job["id"] for job in client.get("/v1/jobs", params=params).json()["items"]]

    assert ids(state="queued") == [train]
    assert ids(state=["queued", "cancelled"]) == [train, batch]
    assert ids(kind="infer") == [batch]
    assert ids(name="b") == [train]
    assert ids(name="b", kind="infer") == []
    error_of(client.get("/v1/jobs", params={"state": "odd"}), 422, "invalid_request")
    error_of(client.get("/v1/jobs", params={"cursor": "odd"}), 422, "invalid_request")
    error_of(client.get("/v1/jobs", params={"limit": 0}), 422, "invalid_request")
    error_of(client.get("/v1/jobs?name=%00"), 422, "invalid_request")
    odd = error_of(client.get("/v1/jobs?kind=training"), 422, "invalid_request")
    assert odd["message"] == "kind must be 'train' or 'infer', not 'training'"
    many = error_of(client.get("/v1/jobs?state=queued&state=done"), 422, "invalid_request")
    assert many["param"] == "state"


def test_a_queued_job_is_cancelled_at_once_and_only_once(
    client: httpx.Client, infer_spec: Spec
) -> None:
    job = submit(client, infer_spec())["id"]
    cancelled = client.post(f"/v1/jobs/{job}/cancel", json={"reason": "wrong data"}).json()
    assert cancelled["state"] == "cancelled"
    assert cancelled["failure"]["message"] == "wrong data"
    broken = client.post(
        f"/v1/jobs/{job}/cancel", content="{reason", headers={"Content-Type": "application/json"}
    )
    error_of(broken, 422, "invalid_json")
    again = client.post(f"/v1/jobs/{job}/cancel")
    assert (again.status_code, again.json()) == (200, cancelled)
    events = client.get(f"/v1/jobs/{job}/events", params={"format": "json"}).json()
    assert [e["type"] for e in events] == ["submitted", "cancelled"]


def test_a_running_job_is_cancelling_until_its_ranks_are_gone(
    client: httpx.Client, fleet: FakeFleet, infer_spec: Spec
) -> None:
    job = submit(client, infer_spec())["id"]
    fleet.start(job)
    assert client.post(f"/v1/jobs/{job}/cancel").json()["state"] == "cancelling"


def test_a_failed_job_says_why_and_shows_its_attempts(
    client: httpx.Client, fleet: FakeFleet, infer_spec: Spec
) -> None:
    job = submit(client, infer_spec())["id"]
    (holder,) = fleet.start(job)
    running = client.get(f"/v1/jobs/{job}").json()
    assert running["attempts"][0]["ranks"] == [
        {"rank": 0, "device_id": "cpu0@fake", "state": "held"}
    ]
    devices = client.get("/v1/devices").json()["items"]
    assert [(d["id"], d["runs"]) for d in devices] == [("cpu0@fake", [{"job_id": job, "rank": 0}])]
    fleet.fail(holder, FailureClass.DATA_ERROR, "row 3 is odd")
    failed = client.get(f"/v1/jobs/{job}").json()
    assert failed["state"] == "failed"
    assert failed["failure"] == {
        "failure_class": "data_error",
        "code": "fake_failure",
        "message": "row 3 is odd",
        "hint": "Change the test.",
    }
    assert failed["attempts"][0]["failure"]["message"] == "row 3 is odd"


def test_what_does_not_exist_is_404(client: httpx.Client) -> None:
    for path in ("job_01JD2V5N0W8R4QK7T9Y3ZB6XEM", "odd", "%00", "job_%F0%9F%90%88"):
        error_of(client.get(f"/v1/jobs/{path}"), 404, "not_found")
    error_of(client.get("/v1/jobs/job_01JD2V5N0W8R4QK7T9Y3ZB6XEM/events"), 404, "not_found")
    error_of(client.post("/v1/jobs/job_01JD2V5N0W8R4QK7T9Y3ZB6XEM/cancel"), 404, "not_found")


def test_workers_are_listed(client: httpx.Client, fleet: FakeFleet) -> None:
    fleet.add_device("cpu1@fake")
    workers = client.get("/v1/workers").json()["items"]
    assert [w["device_id"] for w in workers] == ["cpu0@fake", "cpu1@fake"]
    assert {w["id"] for w in workers} == set(fleet.workers.values())
