"""The commands about published models and sweeps."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gpuyard import Client
from tests.api.fake_worker import FakeFleet
from tests.client.conftest import Said

Cli = Callable[..., Said]
Spec = Callable[..., dict[str, Any]]


def test_models_are_published_promoted_and_named(
    cli: Cli, sdk: Client, fleet: FakeFleet, train_spec: Spec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    assert cli("models").err.startswith("no published models")
    jobs = []
    for _ in range(2):
        job = sdk.submit(train_spec()).id
        (holder,) = fleet.start(job)
        fleet.finish(holder, {"metrics": {"accuracy": 0.875, "loss": 0.5}})
        jobs.append(job)
    said = cli("models", "publish", jobs[0], "topics", "--tag", "first")
    assert (said.code, said.out) == (0, "topics@1\n")
    assert "tags first" in said.err
    assert cli("models", "publish", jobs[1], "topics").out == "topics@2\n"
    assert cli("models", "stage", "topics@1", "production").code == 0
    assert sdk.model("topics@production").job_id == jobs[0]
    assert sdk.model("topics").version == 2
    listed = cli("models")
    assert "topics@2" in listed.out and "accuracy 0.875" in listed.out
    shown = cli("models", "show", "topics")
    assert "topics@1" in shown.out and "production" in shown.out
    refused = cli("models", "delete", "topics@1")
    assert (refused.code, refused.out) == (5, "")
    assert cli("models", "stage", "topics@1", "none").code == 0
    assert cli("models", "delete", "topics@1").code == 0
    assert cli("models", "show", "topics@1").code == 3
    assert cli("models", "show", "../../v1/jobs").code == 2
    assert json.loads(cli("models", "show", "topics", "--json").out)["reference"] == "topics@2"


def test_a_sweep_is_submitted_followed_and_shown(
    cli: Cli,
    sdk: Client,
    fleet: FakeFleet,
    train_spec: Spec,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    assert cli("sweeps").err.startswith("no sweeps yet")
    file = tmp_path / "sweep.json"
    parameters = {"hyperparameters.learning_rate": [1e-4, 3e-4]}
    file.write_text(json.dumps({"spec": train_spec(), "parameters": parameters}))
    said = cli("sweep", str(file))
    assert said.code == 0, said.err
    id = said.out.strip()
    assert f"gpuyard sweeps {id}" in said.err
    for trial, accuracy in zip(sdk.sweep(id).trials, (0.5, 0.75), strict=True):
        assert sdk.job(trial.job_id).spec["data"]["train"].startswith("file_"), "uploaded once"
        (holder,) = fleet.start(trial.job_id)
        objective = {"metric": "accuracy", "goal": "maximize"}
        fleet.finish(holder, {"metrics": {"accuracy": accuracy}, "objective": objective})
    assert len(list(sdk.files())) == 1
    shown = cli("sweeps", id)
    assert "LEARNING_RATE" in shown.out and "0.75 best" in shown.out
    assert f"model job:{sdk.sweep(id).trials[1].job_id}" in shown.err
    assert "trial 2: accuracy 0.75" in cli("sweeps").out
    repeated = cli("sweep", str(file), "--idempotency-key", "k", "--json")
    other = json.loads(repeated.out)["id"]
    assert cli("sweeps", other, "--cancel").code == 0
    followed = cli("sweep", str(file), "--idempotency-key", "k", "--wait")
    assert followed.code == 1
    assert "2 cancelled" in followed.err and "no trial succeeded" in followed.err
    assert cli("sweeps", "swp_1").code == 3
    file.write_text(json.dumps({"spec": train_spec(), "parameters": {"hyperparameters.x": [1]}}))
    assert cli("sweep", str(file)).code == 2
