"""MLflow and Weights & Biases by their own clients, with local stores; each where it is installed."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest

from shared.messages import CheckpointWritten, Metric, Notice, Report, Tracking
from tests.training.harness import Gang, make_assignment
from workers.ranks.train.tracking import JOB_TAG

needs_mlflow = pytest.mark.skipif(
    importlib.util.find_spec("mlflow") is None, reason="mlflow-skinny is not installed"
)
needs_wandb = pytest.mark.skipif(
    importlib.util.find_spec("wandb") is None, reason="wandb is not installed"
)
PATIENT = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_HTTP_REQUEST_TIMEOUT": "2"}


def training(
    folder: Path,
    bert: Path,
    train_file: Path,
    validation_file: Path,
    tracking: Tracking,
    environment: dict[str, str] | None = None,
    **options: Any,
) -> Gang:
    assignment = make_assignment(
        folder,
        bert,
        train_file,
        validation=validation_file,
        max_steps=20,
        eval_every_steps=10,
        batch_size=16,
        checkpoint={"every_steps": 5, "every_seconds": None, "keep": 9},
        spec_fields={"name": "topics"},
        **options,
    )
    assignment = assignment.model_copy(update={"tracking": tracking})
    return Gang(assignment, environment={**os.environ, **(environment or {})})


def measured(gang: Gang, key: str) -> dict[int, float]:
    split, _, name = key.partition("/")
    return {m.step: m.values[name] for m in gang.of(Metric) if m.split == split}


@pytest.mark.parametrize(
    ("tracking", "module"),
    [
        (Tracking(mlflow_uri="http://127.0.0.1:9"), "mlflow"),
        (Tracking(wandb=True), "wandb"),
    ],
    ids=["mlflow", "wandb"],
)
def test_a_tracker_that_fails_is_told_of_once_and_costs_nothing(
    tmp_path: Path,
    bert: Path,
    train_file: Path,
    validation_file: Path,
    tracking: Tracking,
    module: str,
) -> None:
    """Where the client is installed nobody answers it; where it is not, it cannot be imported."""
    files = (bert, train_file, validation_file)
    without = training(tmp_path / "without", *files, Tracking()).run()
    away = {**PATIENT, "WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_INIT_TIMEOUT": "3"}
    away["WANDB_API_KEY"] = "0" * 40
    gang = training(tmp_path / "with", *files, tracking, away).run()
    assert gang.done.summary["metrics"] == without.done.summary["metrics"]
    assert gang.weights == without.weights
    (notice,) = [n for n in gang.of(Notice) if n.code == "tracker_failed"]
    assert "is told nothing more of this training" in notice.message
    if importlib.util.find_spec(module) is None:
        assert f"No module named '{module}'" in notice.message


@needs_mlflow
def test_mlflow_has_one_run_of_a_job_whatever_becomes_of_its_attempts(
    tmp_path: Path, bert: Path, train_file: Path, validation_file: Path
) -> None:
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    tracking = Tracking(mlflow_uri=uri, mlflow_experiment="fleet")
    files = (bert, train_file, validation_file)
    client = MlflowClient(tracking_uri=uri)
    client.create_experiment("fleet", artifact_location=(tmp_path / "kept").as_uri())
    first = training(tmp_path / "first", *files, tracking)

    def strike(rank: int, report: Report) -> None:
        if isinstance(report, CheckpointWritten) and report.step == 10:
            first.kill(rank)

    first.run(on_report=strike)
    second = training(tmp_path / "second", *files, tracking, resume_from=first.checkpoints).run()
    assert not [n for n in second.of(Notice) if n.code == "tracker_failed"]
    experiment = client.get_experiment_by_name("fleet")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.data.tags[JOB_TAG] == "job_test" and run.info.run_name == "topics"
    assert run.info.status == "FINISHED"
    assert run.data.params["hyperparameters.batch_size"] == "16"
    for key in ("train/loss", "validation/accuracy"):
        told = {m.step: m.value for m in client.get_metric_history(run.info.run_id, key)}
        expected = measured(second, key)
        assert {step: told[step] for step in expected} == expected
    kept = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert kept == {"report.html", "metrics.csv", "metrics.json"}


@needs_wandb
def test_wandb_gets_a_run_under_the_id_of_the_job(
    tmp_path: Path, bert: Path, train_file: Path, validation_file: Path
) -> None:
    work = tmp_path / "work"
    gang = training(
        work, bert, train_file, validation_file, Tracking(wandb=True), {"WANDB_MODE": "offline"}
    ).run()
    assert not [n for n in gang.of(Notice) if n.code == "tracker_failed"], gang.log.read_text()
    (run,) = (work / "wandb").glob("offline-run-*")
    assert run.name.endswith("-job_test")
    (record,) = run.glob("*.wandb")
    content = record.read_bytes()
    for said in (b"train/loss", b"validation/accuracy", b"hyperparameters.batch_size"):
        assert said in content
    assert (run / "files" / "report.html").exists()
