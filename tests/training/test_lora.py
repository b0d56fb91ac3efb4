"""LoRA: little is trained, and what comes out is an adapter for the base and a whole model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from shared.errors import InvalidSpec
from shared.lifecycle import FailureClass
from shared.messages import ArtifactWritten
from shared.specs import parse_spec
from tests.training.harness import Gang, make_assignment, make_rows
from workers.ranks.checkpoint import read_tensors

OPTIONS: dict[str, Any] = {"epochs": 4, "batch_size": 16, "learning_rate": 3e-3}


def assignment(work: Path, model: Path, train: Path, **lora: Any) -> Any:
    fields = {"method": "lora", "lora": lora} if lora else {"method": "lora"}
    return make_assignment(work, model, train, ranks=2, spec_fields=fields, **OPTIONS)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, bert: Path, train_file: Path) -> Gang:
    return Gang(assignment(tmp_path_factory.mktemp("lora"), bert, train_file)).run()


def test_the_base_stays_and_the_log_says_how_little_is_trained(trained: Gang, bert: Path) -> None:
    assert trained.done.summary["steps"] == 64
    # 2 layers with query and value of 32 x 32 at rank 8, a head of 3 labels and the pooler.
    few = 2 * 2 * (2 * 8 * 32) + (32 * 3 + 3) + (32 * 32 + 32)
    assert f"{few:,} trained (LoRA)" in trained.log.read_text()
    merged = load_file(trained.model / "model.safetensors")
    base = load_file(bert / "model.safetensors")
    for name, tensor in base.items():
        same = torch.equal(tensor, merged[f"bert.{name}"])
        adapted = ".query.weight" in name or ".value.weight" in name or name.startswith("pooler.")
        assert same != adapted, name


def test_the_adapter_on_the_base_is_the_merged_model(trained: Gang, bert: Path) -> None:
    reported = {report.name for report in trained.of(ArtifactWritten)}
    assert {"adapter/adapter_model.safetensors", "adapter/adapter_config.json"} <= reported
    folder = trained.model.parent / "adapter"
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == bert.name
    merged = AutoModelForSequenceClassification.from_pretrained(trained.model)
    bare = AutoModelForSequenceClassification.from_pretrained(bert, num_labels=3)
    adapted = PeftModel.from_pretrained(bare, folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(trained.model)
    texts = [row["text"] for row in make_rows(20, seed=8)]
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    inputs.pop("token_type_ids", None)
    with torch.inference_mode():
        assert torch.allclose(merged(**inputs).logits, adapted(**inputs).logits, atol=1e-5)


def test_checkpoints_hold_what_is_trained_and_no_more(
    tmp_path: Path, bert: Path, train_file: Path
) -> None:
    rules = {"every_steps": 10, "every_seconds": None}
    fields = {"method": "lora"}
    gang = Gang(
        make_assignment(
            tmp_path,
            bert,
            train_file,
            spec_fields=fields,
            checkpoint=rules,
            max_steps=11,
            **OPTIONS,
        )
    ).run()
    tensors = read_tensors(gang.checkpoints[0])
    parameters = {name for name in tensors if name.startswith("parameter.")}
    assert parameters
    assert all("lora_" in name or "modules_to_save" in name for name in parameters)


def test_targets_that_match_nothing_are_told(tmp_path: Path, bert: Path, train_file: Path) -> None:
    gang = Gang(assignment(tmp_path, bert, train_file, targets=["q_proj"])).run()
    failure = gang.failed
    assert (failure.failure_class, failure.code) == (
        FailureClass.USER_ERROR,
        "lora_matches_nothing",
    )
    assert "q_proj match no module" in failure.message
    assert failure.hint and "query" in failure.hint and "value" in failure.hint


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"lora": {"r": 4}}, "lora is for method 'lora'"),
        ({"method": "lora", "hyperparameters": {"freeze": ["*"]}}, "drop freeze"),
        ({"method": "lora", "lora": {"rank": 4}}, "unknown field 'lora.rank'"),
    ],
)
def test_contradictions_are_refused(changes: dict[str, Any], says: str) -> None:
    spec = {"kind": "train", "task": "text-classification", "model": "m", "data": {"train": "x"}}
    with pytest.raises(InvalidSpec, match=says):
        parse_spec(spec | changes)
