"""The whole worker with the ranks of the product: DDP over two devices, killed, resumed, then used."""

from __future__ import annotations

import hashlib
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from shared.resolved import ResolvedInput
from shared.store import read
from shared.tables import Checkpoint
from tests.stack import eventually
from tests.training.harness import make_bert, make_rows, write_rows
from tests.training.packages import install
from tests.workers.fleet import Fleet

pytestmark = pytest.mark.slow


def train(fleet: Fleet, model: Path, **changes: Any) -> str:
    rows = ResolvedInput(path=str(fleet.data / "train.jsonl"), size=1)
    held_out = ResolvedInput(path=str(fleet.data / "held-out.jsonl"), size=1)
    return fleet.submit(
        {
            "kind": "train",
            "task": "text-classification",
            "data": {"train": "x", "validation": "y"},
            "resources": {"devices": 2},
            "hyperparameters": {"batch_size": 16, "epochs": 4, "learning_rate": 3e-3, "seed": 7},
            "checkpoint": {"every_steps": 4},
            **changes,
        },
        {"train": rows, "validation": held_out},
        model=str(model),
    )


def weights(fleet: Fleet, job_id: str) -> str:
    artifacts = fleet.store.call(read.list_artifacts, job_id)
    return next(a.sha256 for a in artifacts if a.name.endswith("model.safetensors"))


def require_only(fleet: Fleet, job_id: str, kept: Sequence[Checkpoint]) -> None:
    """Of the checkpoints of a job nothing is on disk but those kept, and these as they were written."""
    folders = (fleet.data / "jobs" / job_id).glob("attempts/*/checkpoints/*")
    assert set(folders) == {fleet.data / checkpoint.path for checkpoint in kept}
    for checkpoint in kept:
        for name, entry in checkpoint.manifest.items():
            content = (fleet.data / checkpoint.path / name).read_bytes()
            assert hashlib.sha256(content).hexdigest() == entry["sha256"]


@pytest.fixture
def material(new_fleet: Callable[..., Fleet], database: str, valkey_url: str) -> tuple[Fleet, Path]:
    """A fleet with a scheduler, data, and the folder of a tiny model."""
    # Long enough that loading on a busy machine is no lost lease.
    fleet = new_fleet(database, valkey_url, lease_ttl="20", claim_timeout="60", drain_grace="6")
    fleet.start_scheduler()
    write_rows(fleet.data / "train.jsonl", make_rows(256, seed=1))
    write_rows(fleet.data / "held-out.jsonl", make_rows(64, seed=2))
    return fleet, make_bert(fleet.data / "bert")


def test_a_drained_training_goes_on_where_it_was(material: tuple[Fleet, Path]) -> None:
    fleet, bert = material
    fleet.start_host("one", "--devices=cpu:2", real=True, devices=2)
    # Much longer than the grace: what would be over in time is left to end by itself.
    long: dict[str, Any] = {
        "hyperparameters": {"batch_size": 16, "epochs": 150, "learning_rate": 3e-3},
        "checkpoint": {"every_seconds": None},
    }
    undisturbed = train(fleet, bert, **long)
    fleet.wait(undisturbed, "succeeded", within=300)
    drained = train(fleet, bert, **long)
    eventually(lambda: (fleet.job(drained).progress or {}).get("step", 0) >= 20, within=60)
    assert fleet.stop_host() == 0
    (first,) = fleet.attempts(drained)
    assert first.failure is not None
    assert first.failure["code"] == "preempted", fleet.story(drained)
    (checkpoint,) = fleet.store.call(read.list_checkpoints, drained)
    assert 20 <= checkpoint.step < 150 * 16
    fleet.start_host("one", "--devices=cpu:2", real=True, devices=2)
    job = fleet.wait(drained, "succeeded", within=300)
    assert job.summary is not None
    assert job.summary["resumed_from"]["step"] == checkpoint.step
    assert len(fleet.attempts(drained)) == 2
    assert weights(fleet, drained) == weights(fleet, undisturbed)


def test_killed_training_ends_bitwise_equal_and_its_model_classifies(
    material: tuple[Fleet, Path],
) -> None:
    fleet, bert = material
    held_out = make_rows(64, seed=2)
    fleet.start_host("one", "--devices=cpu:2", real=True, devices=2)

    undisturbed = train(fleet, bert)
    fleet.wait(undisturbed, "succeeded", within=90)
    killed = train(fleet, bert)
    fleet.wait_for_event(killed, "checkpoint", within=60)
    victim = [pid for pid, name in fleet.processes().items() if name == "gpuyard-rank"][-1]
    os.kill(victim, signal.SIGKILL)
    job = fleet.wait(killed, "succeeded", within=90)
    attempts = fleet.attempts(killed)
    assert len(attempts) == 2, fleet.story(killed)  # the kill struck
    assert attempts[0].failure is not None
    assert attempts[0].failure["code"] == "rank_killed"
    assert job.summary is not None
    assert job.summary["resumed_from"]["step"] >= 4
    notices = [event.data for event in fleet.events(killed) if event.type == "notice"]
    # On a machine that is busy with other things a rank may well be slow.
    assert [notice for notice in notices if notice["code"] != "straggler"] == []
    kept = fleet.store.call(read.list_checkpoints, killed)
    assert len(kept) == 2
    require_only(fleet, killed, kept)
    for checkpoint in kept:  # by both ranks
        assert len([name for name in checkpoint.manifest if name.endswith("safetensors")]) == 2
    assert weights(fleet, killed) == weights(fleet, undisturbed)
    # Three attempts of two ranks, two files: tokenised by the first rank of all.
    first, *later = [
        log.read_text()
        for attempt in (undisturbed, killed)
        for log in sorted((fleet.data / "jobs" / attempt).glob("attempts/*/rank0.*.log"))
    ]
    assert first.count("tokenised into the token cache") == 2
    assert [log.count("from the token cache") for log in later] == [2, 2]

    metrics = fleet.store.call(read.list_metrics, killed, "validation")
    claimed = metrics[-1].values["accuracy"]
    assert claimed > 0.8
    model = next(
        fleet.data / artifact.path
        for artifact in fleet.store.call(read.list_artifacts, killed)
        if artifact.name.endswith("model.safetensors")
    ).parent
    source = fleet.data / "held-out.jsonl"
    batch = fleet.submit(
        {"kind": "infer", "task": "text-classification", "input": "x", "shard_rows": 10},
        {"input": ResolvedInput(path=str(source), size=source.stat().st_size)},
        source,
        model=str(model),
    )
    fleet.wait(batch, "succeeded", within=60)
    answers = [row["output"]["label"] for row in fleet.results(batch)]
    right = sum(said == row["label"] for said, row in zip(answers, held_out, strict=True))
    assert right / len(held_out) == pytest.approx(claimed)
    assert fleet.stop_host() == 0
    eventually(lambda: not fleet.processes())


def test_the_best_model_outlives_the_attempt_that_made_it(
    new_fleet: Callable[..., Fleet], database: str, valkey_url: str
) -> None:
    """Training learns what validation calls wrong, so that one of its first models stays the best."""
    fleet = new_fleet(database, valkey_url, lease_ttl="20", claim_timeout="60")
    fleet.start_scheduler()
    bert = make_bert(fleet.data / "bert")
    wrong = {"animal": "food", "food": "place", "place": "animal"}
    rows = make_rows(256, seed=1)
    write_rows(fleet.data / "train.jsonl", ({**row, "label": wrong[row["label"]]} for row in rows))
    write_rows(fleet.data / "held-out.jsonl", make_rows(64, seed=2))
    fleet.start_host("one", "--devices=cpu:2", real=True, devices=2)
    changes = {
        "early_stopping": {"patience": 30, "metric": "loss"},
        "hyperparameters": {
            "batch_size": 16, "epochs": 20, "learning_rate": 3e-3, "seed": 7,
            "eval_every_steps": 8, "schedule": "constant",
        },
        "checkpoint": {"every_steps": 4, "keep": 1},
    }  # fmt: skip

    undisturbed = train(fleet, bert, **changes)
    expected = fleet.wait(undisturbed, "succeeded", within=90).summary
    assert expected is not None and expected["stopped_early"]
    best = expected["best"]["step"]

    killed = train(fleet, bert, **changes)

    def is_behind_the_best() -> bool:
        kept = fleet.store.call(read.list_checkpoints, killed)
        return bool(kept) and kept[0].best_step == best < kept[0].step

    eventually(is_behind_the_best, within=60)
    victim = [pid for pid, name in fleet.processes().items() if name == "gpuyard-rank"][-1]
    os.kill(victim, signal.SIGKILL)
    summary = fleet.wait(killed, "succeeded", within=90).summary
    first, _ = fleet.attempts(killed)
    assert summary is not None and summary["resumed_from"]["step"] > best
    for name in ("steps", "stopped_early", "best", "metrics"):
        assert summary[name] == expected[name], name
    assert weights(fleet, killed) == weights(fleet, undisturbed)
    newest, made_best = fleet.store.call(read.list_checkpoints, killed)
    assert (made_best.step, made_best.attempt_id) == (best, first.id)
    assert newest.best_step == best and not newest.best
    require_only(fleet, killed, (newest, made_best))


SLICED = """
import json

class Sliced:
    def __init__(self, path, part):
        lines = open(path).read().splitlines()
        self.lines = lines[:200] if part == "train" else lines[200:]
    def __len__(self):
        return len(self.lines)
    def __getitem__(self, index):
        return json.loads(self.lines[index])
"""


def test_a_dataset_of_a_package_that_is_installed_for_the_workers(
    new_fleet: Callable[..., Fleet], database: str, valkey_url: str
) -> None:
    fleet = new_fleet(database, valkey_url, lease_ttl="20", claim_timeout="60")
    site = install(fleet.data / "site", "sliced_rows", SLICED, sliced="Sliced")
    fleet.environment["PYTHONPATH"] = f"{site}:{fleet.environment.get('PYTHONPATH', '')}"
    fleet.start_scheduler()
    fleet.start_host("one", "--devices=cpu:2", real=True, devices=2)
    file = write_rows(fleet.data / "all.jsonl", make_rows(256, seed=1))

    def part(name: str) -> dict[str, Any]:
        return {"dataset": "sliced", "options": {"path": str(file), "part": name}}

    job_id = fleet.submit(
        {
            "kind": "train",
            "task": "text-classification",
            "data": {"train": part("train"), "validation": part("validation")},
            "resources": {"devices": 2},
            "hyperparameters": {"batch_size": 16, "epochs": 8, "learning_rate": 5e-3},
        },
        {},
        model=str(make_bert(fleet.data / "bert")),
    )
    job = fleet.wait(job_id, "succeeded", within=120)
    assert job.summary is not None and job.summary["metrics"]["accuracy"] > 0.6  # chance: a third
    assert not list((fleet.data / "jobs" / job_id).glob("attempts/*/rows"))
