"""Training that was killed and resumed ends with the very same weights."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.e2e.processes import ranks_of_job
from tests.e2e.stack_process import StackProcess
from tests.e2e.test_faults import training
from tests.stack import eventually

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(240)]


def weights(stack: StackProcess, job_id: str) -> str:
    """SHA-256 of the weights of the published model."""
    found = [a for a in stack.client.artifacts(job_id) if a.name == "model/model.safetensors"]
    return found[0].sha256


@pytest.mark.parametrize("rank", [0, 1])
def test_killed_training_ends_bitwise_equal(
    stack: StackProcess, labelled: dict[str, Path], rank: int, tmp_path: Path
) -> None:
    client = stack.client
    spec = training(labelled, epochs=6, hyperparameters={
        "epochs": 6, "batch_size": 16, "learning_rate": 1e-3, "dropout": 0.2, "seed": 7,
        "micro_batch_size": 4,
    })  # fmt: skip
    whole = client.submit(spec, upload=True)
    client.wait(whole.id, timeout=120)

    killed = client.submit(spec, upload=True)
    eventually(lambda: client.checkpoints(killed.id), within=60, what="a checkpoint")
    os.kill(ranks_of_job(stack.data, killed.id)[rank], signal.SIGKILL)
    ended = client.wait(killed.id, timeout=120)

    assert len(ended.attempts) == 2
    assert ended.summary is not None
    assert ended.summary["resumed_from"] is not None
    assert weights(stack, killed.id) == weights(stack, whole.id)
    assert client.job(whole.id).attempts[0].world_size == 2

    (report,) = client.download(killed.id, "report.html", tmp_path)
    page = report.read_text()
    assert "It went on from the checkpoint of step" in page and "SIGKILL" in page
    told = [
        e.data["step"] for e in client.events(killed.id, follow=False) if e.type == "evaluation"
    ]
    assert set(told) == {m.step for m in client.metrics(killed.id, "validation")}
