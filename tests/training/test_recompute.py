"""Gradient checkpointing: the same training to the bit, in less memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertModel, MPNetConfig, MPNetForSequenceClassification

from shared.lifecycle import FailureClass
from shared.messages import CheckpointWritten, Report
from tests.training.cases import CASES, Case
from tests.training.harness import (
    SPARE_MEMORY_VARIABLE,
    Gang,
    make_assignment,
    make_bert,
    write_rows,
)
from workers.ranks.train.failures import TrainingFailed
from workers.ranks.train.recompute import recompute_layers

OPTIONS: dict[str, Any] = {"batch_size": 16, "max_steps": 12, "learning_rate": 5e-3, "dropout": 0.2}
KINDS = ("lora", "text2text", "summarization", "completion", "preference-lora", "fill-mask")
EVERY_5 = {"every_steps": 5, "every_seconds": None}


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.name in KINDS], ids=lambda case: case.name
)
def test_the_result_is_bitwise_that_without(tmp_path: Path, case: Case) -> None:
    model = case.model(tmp_path / "model")
    train = write_rows(tmp_path / "train.jsonl", case.rows(100, 1))
    validation = write_rows(tmp_path / "validation.jsonl", case.rows(20, 2))

    def train_with(work: str, **options: Any) -> Gang:
        assignment = make_assignment(
            tmp_path / work,
            model,
            train,
            ranks=2,
            task=case.task,
            problem=case.problem,
            validation=validation,
            spec_fields=case.spec_fields,
            **{**case.hyperparameters, **OPTIONS, **options},
        )
        return Gang(assignment).run()

    plain = train_with("plain")
    less = train_with("less", gradient_checkpointing=True)
    assert less.weights == plain.weights
    assert less.done.summary["metrics"] == plain.done.summary["metrics"]
    # Transformers says so where it has to change how a layer is called.
    assert "Warning" not in less.log.read_text() and "ncompatible" not in less.log.read_text()
    for file in ("config.json", "generation_config.json"):
        if (plain.model / file).exists():
            assert (less.model / file).read_text() == (plain.model / file).read_text()


def test_killed_and_resumed_it_ends_bitwise_the_same(
    tmp_path: Path, bert: Path, train_file: Path
) -> None:
    def gang(work: str, **fields: Any) -> Gang:
        options = {**OPTIONS, "micro_batch_size": 4, "gradient_checkpointing": True}
        assignment = make_assignment(
            tmp_path / work, bert, train_file, ranks=2, checkpoint=EVERY_5, **options
        )
        return Gang(assignment.model_copy(update=fields))

    first = gang("killed")

    def strike(_rank: int, report: Report) -> None:
        if isinstance(report, CheckpointWritten):
            first.kill(1)

    first.run(on_report=strike)
    assert first.exit_code(1) == -9, "the fault did not strike"
    second = gang("resumed", resume_from=first.checkpoints).run()
    assert second.done.summary["resumed_from"]["step"] >= 5
    assert second.weights == gang("whole").run().weights


def test_it_trains_in_memory_that_is_not_enough_without(tmp_path: Path) -> None:
    # Of 32 texts of 64 tokens in 48 layers backward keeps some 800 MB; of the layers' inputs, 25.
    folder = make_bert(tmp_path / "bert")
    torch.manual_seed(0)
    config = BertConfig.from_pretrained(
        folder, num_hidden_layers=48, hidden_size=64, intermediate_size=256
    )
    BertModel(config).save_pretrained(folder)
    rows = [{"text": "fish " * 62, "label": "animal"}, {"text": "soup " * 62, "label": "food"}] * 32
    train = write_rows(tmp_path / "train.jsonl", rows)

    def gang(**options: Any) -> Gang:
        work = tmp_path / "-".join(options or ["plain"])
        assignment = make_assignment(work, folder, train, batch_size=32, max_steps=1, **options)
        return Gang(assignment, environment={SPARE_MEMORY_VARIABLE: str(600 << 20)}).run()

    assert gang().failed.failure_class is FailureClass.OUT_OF_MEMORY
    assert gang(gradient_checkpointing=True).done.summary["steps"] == 1


def test_a_model_that_cannot_says_so() -> None:
    config = MPNetConfig(
        vocab_size=10, hidden_size=8, num_hidden_layers=1, num_attention_heads=1,
        intermediate_size=8, max_position_embeddings=8,
    )  # fmt: skip
    with pytest.raises(TrainingFailed) as failure:
        recompute_layers(MPNetForSequenceClassification(config))
    assert failure.value.failure_class is FailureClass.USER_ERROR
    assert failure.value.code == "gradient_checkpointing_unsupported"
    assert "MPNetForSequenceClassification" in failure.value.message
