"""Memory that runs out is a signal: the training goes on with half as many rows at once."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import BertConfig, BertModel

from shared.resolved import ResolvedInput
from shared.store import read
from tests.training.harness import SPARE_MEMORY_VARIABLE, make_bert, make_rows, write_rows
from tests.workers.fleet import Fleet
from tests.workers.scarce import ENTRY

LONG, SHORT = "fish soup " * 30, "the old "


@pytest.mark.slow
def test_a_training_goes_on_from_its_checkpoint_with_half_of_the_rows(
    new_fleet: Callable[..., Fleet], database: str, valkey_url: str
) -> None:
    """Allocations of real ranks fail, in the one batch of long texts, which is not the first. It costs
    no try, and what comes out is what half of the rows would have come to from the beginning."""
    fleet = new_fleet(database, valkey_url, lease_ttl="20", claim_timeout="60")
    # 128 long rows at once take 400 to 500 MB beside what a rank begins with, and 256 take 700 to 800.
    fleet.environment |= {SPARE_MEMORY_VARIABLE: str(600 << 20), "MALLOC_ARENA_MAX": "1"}
    fleet.start_scheduler()
    fleet.start_host("one", "--devices=cpu:2", ENTRY, real=True, devices=2)
    rows = make_rows(3 * 512, seed=1)
    for row in rows:
        row["text"] = SHORT + row["text"].split()[-1]
    rows += [{**row, "text": LONG + row["text"]} for row in make_rows(512, seed=2)]
    write_rows(fleet.data / "train.jsonl", rows)
    write_rows(fleet.data / "held-out.jsonl", make_rows(64, seed=3))
    bert = make_bert(fleet.data / "bert")
    BertModel(BertConfig.from_pretrained(bert, intermediate_size=2048)).save_pretrained(bert)

    def train(micro_batch: int | None) -> str:
        options = {
            "batch_size": 512, "micro_batch_size": micro_batch, "epochs": 2, "dropout": 0.0,
            "learning_rate": 3e-3, "seed": 7,
        }  # fmt: skip
        inputs = {"train": "train.jsonl", "validation": "held-out.jsonl"}
        return fleet.submit(
            {
                "kind": "train",
                "task": "text-classification",
                "data": inputs,
                "resources": {"devices": 2},
                "hyperparameters": options,
                "checkpoint": {"every_steps": 1},
                "retry": {"max_attempts": 1},
            },
            {what: ResolvedInput(path=str(fleet.data / name), size=1) for what, name in inputs.items()},
            model=str(bert),
        )  # fmt: skip

    def loss_curve(job_id: str) -> list[float]:
        return [m.values["loss"] for m in fleet.store.call(read.list_metrics, job_id, "train")]

    struck, spared = train(None), train(128)
    job = fleet.wait(struck, "succeeded", within=180)
    first, second = fleet.attempts(struck)
    assert first.failure is not None
    assert (first.failure_class, first.failure["code"]) == ("out_of_memory", "out_of_memory")
    assert "with 256 rows at once" in first.failure["message"]
    assert (first.micro_batch, second.micro_batch) == (None, 128)
    retry = next(event for event in fleet.events(struck) if event.type == "retry")
    assert retry.message.startswith("out_of_memory with 256 rows at once: next with 128")
    assert retry.data["micro_batch"] == 128
    assert job.summary is not None
    assert job.summary["resumed_from"]["step"] >= 1
    assert "2 ranks x 128 micro-batch x 2 accumulation = 512 global batch" in fleet.log_text(struck)

    expected = fleet.wait(spared, "succeeded", within=180)
    assert len(fleet.attempts(spared)) == 1
    assert expected.summary is not None
    assert job.summary["metrics"] == pytest.approx(expected.summary["metrics"], abs=2e-3)
    assert loss_curve(struck) == pytest.approx(loss_curve(spared), rel=1e-3)


@pytest.fixture
def small_group() -> Iterator[Path]:
    """A control group of 64 MB."""
    group = Path(f"/sys/fs/cgroup/memory/gpuyard-test-{os.getpid()}")
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(64 << 20))
    except OSError as error:
        pytest.skip(f"no control group of our own (cgroup v1): {error}")
    yield group
    group.rmdir()


def test_what_the_kernel_kills_for_memory_is_tried_with_half(
    new_fleet: Callable[..., Fleet], database: str, valkey_url: str, small_group: Path
) -> None:
    fleet = new_fleet(database, valkey_url)
    fleet.environment["TEST_GROUP"] = str(small_group)
    fleet.start_scheduler()
    fleet.start_host()
    options: dict[str, Any] = {"batch_size": 12, "micro_batch_size": 6}
    job_id = fleet.train("hog", hyperparameters=options, retry={"max_attempts": 1})
    job = fleet.wait(job_id, "succeeded")
    first, second = fleet.attempts(job_id)
    assert first.failure is not None
    assert (first.failure_class, first.failure["code"]) == ("out_of_memory", "host_out_of_memory")
    assert (first.micro_batch, second.micro_batch) == (None, 3)
    assert job.summary is not None
    assert job.summary["held"] == 3
