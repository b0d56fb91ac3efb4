"""The whole worker with the ranks of the product: DDP over two devices, killed, resumed, then used."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from shared.resolved import ResolvedInput
from shared.store import read
from tests.stack import eventually
from tests.training.harness import make_bert, make_rows, write_rows
from tests.workers.fleet import Fleet

pytestmark = pytest.mark.slow


def train(fleet: Fleet, model: Path) -> str:
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
        },
        {"train": rows, "validation": held_out},
        model=str(model),
    )


def weights(fleet: Fleet, job_id: str) -> str:
    artifacts = fleet.store.call(read.list_artifacts, job_id)
    return next(a.sha256 for a in artifacts if a.name.endswith("model.safetensors"))


def test_killed_training_ends_bitwise_equal_and_its_model_classifies(
    new_fleet: Callable[..., Fleet], database: str, valkey_url: str
) -> None:
    # Long enough that loading on a busy machine is no lost lease.
    fleet = new_fleet(database, valkey_url, lease_ttl="20", claim_timeout="60")
    fleet.start_scheduler()
    bert = make_bert(fleet.data / "bert")
    write_rows(fleet.data / "train.jsonl", make_rows(256, seed=1))
    held_out = make_rows(64, seed=2)
    write_rows(fleet.data / "held-out.jsonl", held_out)
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
    assert [event.message for event in fleet.events(killed) if event.type == "notice"] == []
    kept = fleet.store.call(read.list_checkpoints, killed)
    assert len(kept) == 2
    assert all((fleet.data / checkpoint.path).is_dir() for checkpoint in kept)
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
