"""Models in shards (FSDP2): the training of DDP, with a part of it on each rank."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file

from shared.lifecycle import FailureClass
from shared.messages import CheckpointRef, CheckpointWritten, Done, Metric, Notice, Progress, Report
from tests.training.cases import CASES, Case
from tests.training.harness import Gang, make_assignment, make_bert, write_rows
from workers.ranks.train.sharding import span

OPTIONS: dict[str, Any] = {"batch_size": 12, "max_steps": 18, "learning_rate": 5e-3, "dropout": 0.0}
EVERY_5 = {"every_steps": 5, "every_seconds": None}
KINDS = (
    "single-label", "regression", "lora", "text2text", "summarization", "completion", "embeddings",
)  # fmt: skip


class Material:
    def __init__(self, case: Case, folder: Path) -> None:
        self.case, self.folder = case, folder
        self.model = case.model(folder / "model")
        self.train = write_rows(folder / "train.jsonl", case.rows(100, 1))
        # An odd number of batches: ranks have unequal shares of an evaluation.
        self.validation = write_rows(folder / "validation.jsonl", case.rows(33, 2))

    def gang(self, work: str, **options: Any) -> Gang:
        fields = {
            "ranks": 2,
            "parallelism": "fsdp",
            "validation": self.validation,
            "spec_fields": self.case.spec_fields,
            **self.case.hyperparameters,
            **OPTIONS,
            **options,
        }
        assignment = make_assignment(
            self.folder / work,
            self.model,
            self.train,
            task=self.case.task,
            problem=self.case.problem,
            **fields,
        )
        return Gang(assignment)


@pytest.fixture(params=[c for c in CASES if c.name in KINDS], ids=lambda case: case.name)
def material(request: pytest.FixtureRequest, tmp_path: Path) -> Material:
    return Material(request.param, tmp_path)


@pytest.fixture
def topics(tmp_path: Path) -> Material:
    return Material(CASES[0], tmp_path)


def losses(gang: Gang, split: str = "train") -> list[float]:
    return [m.values["loss"] for m in gang.of(Metric) if m.split == split]


def test_it_is_the_training_of_ddp_and_delivers_a_plain_model(material: Material) -> None:
    sharded = material.gang("sharded").run()
    whole = material.gang("whole", parallelism="ddp").run()
    assert "the model in shards (FSDP)" in sharded.log.read_text()
    assert "Warning" not in sharded.log.read_text()
    assert losses(sharded) == pytest.approx(losses(whole), rel=2e-3)
    assert losses(sharded, "validation") == pytest.approx(losses(whole, "validation"), rel=2e-3)

    auto = getattr(transformers, material.case.loads_as)
    _, info = auto.from_pretrained(sharded.model, output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"] and not info["unexpected_keys"]
    assert (sharded.model / "config.json").read_text() == (whole.model / "config.json").read_text()
    theirs = load_file(whole.model / "model.safetensors")
    ours = load_file(sharded.model / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.allclose(ours[name], tensor, atol=5e-3), name
