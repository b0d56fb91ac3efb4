"""Sweeps: trials are jobs, submitted together or not at all; the best of them is named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import pytest

from tests.api.conftest import error_of
from tests.api.fake_worker import FakeFleet

Spec = Callable[..., dict[str, Any]]
RATE, SEED = "hyperparameters.learning_rate", "hyperparameters.seed"


def jobs(client: httpx.Client) -> list[dict[str, Any]]:
    return list(client.get("/v1/jobs").json()["items"])


@pytest.fixture
def grid(train_spec: Spec) -> dict[str, Any]:
    return {"name": "rates", "spec": train_spec(), "parameters": {RATE: [1e-4, 3e-4], SEED: [1, 2]}}


def test_a_grid_is_one_submission(client: httpx.Client, grid: dict[str, Any]) -> None:
    answer = client.post("/v1/sweeps", json=grid)
    assert answer.status_code == 201, answer.text
    sweep = answer.json()
    assert [t["parameters"] for t in sweep["trials"]] == [
        {RATE: rate, SEED: seed} for rate in (1e-4, 3e-4) for seed in (1, 2)
    ]
    assert (sweep["states"], sweep["best"]) == ({"queued": 4}, None)
    made = {job["id"]: job for job in jobs(client)}
    assert set(made) == {trial["job_id"] for trial in sweep["trials"]}
    assert {job["name"] for job in made.values()} == {f"rates #{n}" for n in range(1, 5)}
    detail = client.get(f"/v1/jobs/{sweep['trials'][3]['job_id']}").json()
    assert detail["spec"]["hyperparameters"]["learning_rate"] == 3e-4
    assert detail["spec"]["hyperparameters"]["seed"] == 2
    assert client.get(answer.headers["Location"]).json() == sweep
    listed = client.get("/v1/sweeps").json()["items"]
    assert [(s["id"], s["name"], s["states"]) for s in listed] == [
        (sweep["id"], "rates", {"queued": 4})
    ]


@pytest.mark.parametrize(("goal", "best"), [("maximize", 3), ("minimize", 2)])
def test_the_best_trial_is_named(
    client: httpx.Client, fleet: FakeFleet, grid: dict[str, Any], goal: str, best: int
) -> None:
    trials = client.post("/v1/sweeps", json=grid).json()["trials"]
    reached = {1: 0.5, 2: 0.25, 3: 0.75}
    for trial in trials:
        (holder,) = fleet.start(trial["job_id"])
        if value := reached.get(trial["number"]):
            summary = {
                "metrics": {"accuracy": value, "loss": 1.0},
                "objective": {"metric": "accuracy", "goal": goal},
            }
            fleet.finish(holder, summary)
    sweep = client.get("/v1/sweeps").json()["items"][0]
    assert (sweep["metric"], sweep["goal"]) == ("accuracy", goal)
    assert (sweep["best"]["number"], sweep["best"]["value"]) == (best, reached[best])
    assert sweep["states"] == {"succeeded": 3, "running": 1}


def test_a_metric_of_ones_own(client: httpx.Client, fleet: FakeFleet, grid: dict[str, Any]) -> None:
    sweep = client.post("/v1/sweeps", json=grid | {"metric": "loss", "goal": "minimize"}).json()
    for trial, loss in zip(sweep["trials"], (4.0, 2.0, 3.0, None), strict=True):
        (holder,) = fleet.start(trial["job_id"])
        metrics = {"accuracy": 0.5} if loss is None else {"accuracy": 0.5, "loss": loss}
        fleet.finish(holder, {"metrics": metrics})
    found = client.get(f"/v1/sweeps/{sweep['id']}").json()
    assert (found["best"]["number"], found["best"]["value"]) == (2, 2.0)
    assert found["trials"][3]["value"] is None


def test_random_search_draws_the_same_for_the_same_seed(
    client: httpx.Client, train_spec: Spec
) -> None:
    sweep = {
        "spec": train_spec(),
        "strategy": "random",
        "trials": 20,
        "seed": 3,
        "parameters": {
            RATE: {"min": 1e-5, "max": 1e-3, "log": True},
            "hyperparameters.epochs": {"min": 1, "max": 4, "whole": True},
            "hyperparameters.schedule": ["linear", "cosine"],
        },
    }
    first, second = (client.post("/v1/sweeps", json=sweep).json()["trials"] for _ in range(2))
    assert [t["parameters"] for t in first] == [t["parameters"] for t in second]
    rates = [t["parameters"][RATE] for t in first]
    assert all(1e-5 <= rate <= 1e-3 for rate in rates) and min(rates) < 1e-4 < max(rates)
    assert {t["parameters"]["hyperparameters.epochs"] for t in first} <= {1, 2, 3, 4}
    other = client.post("/v1/sweeps", json=sweep | {"seed": 4}).json()["trials"]
    assert [t["parameters"] for t in other] != [t["parameters"] for t in first]


def test_a_repeated_key_gives_the_first_sweep(client: httpx.Client, grid: dict[str, Any]) -> None:
    headers = {"Idempotency-Key": "k"}
    first = client.post("/v1/sweeps", json=grid, headers=headers)
    again = client.post("/v1/sweeps", json=grid, headers=headers)
    assert (first.status_code, again.status_code) == (201, 200)
    assert again.json()["id"] == first.json()["id"]
    assert len(jobs(client)) == 4
    other = client.post("/v1/sweeps", json=grid | {"name": "x"}, headers=headers)
    assert error_of(other, 409, "idempotency_mismatch")


def test_cancelling_a_sweep_cancels_what_is_not_over(
    client: httpx.Client, fleet: FakeFleet, grid: dict[str, Any]
) -> None:
    sweep = client.post("/v1/sweeps", json=grid).json()
    (holder,) = fleet.start(sweep["trials"][0]["job_id"])
    fleet.finish(holder, {"metrics": {}})
    for _ in range(2):
        found = client.post(f"/v1/sweeps/{sweep['id']}/cancel").json()
        assert found["states"] == {"succeeded": 1, "cancelled": 3}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"parameters": {}}, "parameters"),
        ({"parameters": {RATE: []}}, f"parameters.{RATE} has no values"),
        ({"parameters": {RATE: {"min": 1, "max": 2}}}, "a grid needs a list of values"),
        (
            {"parameters": {RATE: {"min": 2, "max": 1}}, "strategy": "random", "trials": 2},
            "min must be below",
        ),
        (
            {"parameters": {RATE: 3}, "strategy": "random", "trials": 2},
            f"parameters.{RATE} must be",
        ),
        ({"parameters": {"hyperparameters.rate": [1]}}, "unknown field 'hyperparameters.rate'"),
        ({"parameters": {RATE: [1e-4, -1]}}, f"trial 2 ({RATE}=-1)"),
        ({"parameters": {"model": ["encoder", "nothing"]}}, "trial 2: there is no model 'nothing'"),
        ({"parameters": {"kind": ["infer"]}}, "trial 1"),
        ({"parameters": {SEED: list(range(40)), RATE: [1e-4] * 40}}, "1600 combinations"),
        ({"strategy": "random"}, "needs trials"),
        ({"trials": 3}, "a grid tries all combinations"),
        ({"metric": "loss"}, "metric and goal belong together"),
        ({"zzz": 1}, "zzz"),
    ],
)
def test_what_is_wrong_is_said_and_nothing_is_stored(
    client: httpx.Client, grid: dict[str, Any], changes: dict[str, Any], says: str
) -> None:
    answer = client.post("/v1/sweeps", json=grid | changes)
    assert answer.status_code == 422, answer.text
    assert says in answer.json()["error"]["message"]
    assert jobs(client) == []
    assert client.get("/v1/sweeps").json()["items"] == []


def test_there_is_no_such_sweep(client: httpx.Client) -> None:
    assert error_of(client.get("/v1/sweeps/swp_1"), 404, "not_found")
    assert error_of(client.post("/v1/sweeps/job_1/cancel"), 404, "not_found")
