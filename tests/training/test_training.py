"""Whole trainings by real rank processes: they learn, report, and deliver what anyone can load."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from shared.formats import DataFile
from shared.messages import ArtifactWritten, Listening, Metric, Progress, Ready
from shared.specs import DataFormat
from tests.training.harness import TOPICS, Gang, make_assignment, make_rows
from tests.training.test_records import write


@pytest.fixture(scope="module", params=[1, 2])
def trained(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    bert: Path,
    train_file: Path,
    validation_file: Path,
) -> Gang:
    assignment = make_assignment(
        tmp_path_factory.mktemp("work"),
        bert,
        train_file,
        ranks=request.param,
        validation=validation_file,
        epochs=6,
        batch_size=16,
        learning_rate=5e-3,
        warmup_ratio=0.1,
        dropout=0.0,
    )
    return Gang(assignment).run()


@pytest.mark.parametrize("format", ["csv", "parquet"])
def test_the_format_of_the_data_makes_no_difference(
    tmp_path: Path, bert: Path, format: DataFormat
) -> None:
    def weights(file: DataFile) -> str:
        work = tmp_path / f"work-{file.format}"
        options = {"epochs": 1, "batch_size": 16, "validation_split": 0.2}
        return Gang(make_assignment(work, bert, file.path, ranks=2, **options)).run().weights

    rows = make_rows(60, seed=4)
    jsonl = write(tmp_path, "jsonl", rows)
    assert weights(write(tmp_path, format, rows)) == weights(jsonl)


def test_it_learns_what_the_majority_class_cannot_give(trained: Gang) -> None:
    metrics = trained.done.summary["metrics"]
    majority = max(Counter(row["label"] for row in make_rows(70, seed=2)).values()) / 70
    assert majority < 0.5
    assert metrics["accuracy"] > 0.9
    assert metrics["macro_f1"] > 0.9


def test_every_rank_ends_well_and_rank_0_speaks_for_all(trained: Gang) -> None:
    ranks = trained.assignment.world_size
    assert {trained.exit_code(rank) for rank in range(ranks)} == {0}
    assert len(trained.of(Ready)) == ranks
    assert len(trained.of(Listening)) == (1 if ranks > 1 else 0)
    assert {rank for rank, r in trained.reports if isinstance(r, Progress | Metric)} == {0}
    assert trained.of(Progress)[-1].step == trained.done.summary["steps"] == 6 * 16
    evaluations = [m for m in trained.of(Metric) if m.split == "validation"]
    assert [m.step for m in evaluations] == [16 * epoch for epoch in range(1, 7)]
    assert trained.done.summary["epochs"] == 6
    assert trained.done.summary["resumed_from"] is None


def test_the_log_states_the_batch_arithmetic_and_holds_no_noise(trained: Gang) -> None:
    log = trained.log.read_text()
    ranks = trained.assignment.world_size
    assert f"{ranks} ranks x {16 // ranks} micro-batch x 1 accumulation = 16 global batch" in log
    assert "the last batch of an epoch has 10" in log
    assert "a new classification head for 3 labels" in log
    assert "Warning" not in log
    assert "%|" not in log


def test_the_model_loads_plainly_and_classifies(trained: Gang) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(trained.model)
    tokenizer = AutoTokenizer.from_pretrained(trained.model)
    assert model.config.id2label == dict(enumerate(sorted(TOPICS)))
    rows = make_rows(40, seed=9)
    inputs = tokenizer([row["text"] for row in rows], padding=True, return_tensors="pt")
    inputs.pop("token_type_ids", None)
    with torch.inference_mode():
        guesses = model(**inputs).logits.argmax(-1).tolist()
    right = sum(model.config.id2label[g] == r["label"] for g, r in zip(guesses, rows, strict=True))
    assert right >= 36


def test_artifacts_are_reported_as_they_lie_on_disk(trained: Gang) -> None:
    artifacts = Path(trained.assignment.work_dir) / "artifacts"
    reported = {report.name: report for report in trained.of(ArtifactWritten)}
    on_disk = {f.relative_to(artifacts).as_posix() for f in artifacts.rglob("*") if f.is_file()}
    assert set(reported) == on_disk >= {"model/model.safetensors", "model/config.json"}
    for name, report in reported.items():
        content = (artifacts / name).read_bytes()
        assert (report.size, report.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    others = {name: r.kind for name, r in reported.items() if r.kind != "model"}
    (events,) = [name for name in others if name.startswith("tensorboard/events.out.tfevents.")]
    assert others == {
        "metrics.json": "metrics",
        "metrics.csv": "metrics",
        "report.html": "report",
        events: "file",
    }
    metrics = json.loads((artifacts / "metrics.json").read_text())
    assert set(metrics["per_class"]) == set(TOPICS)
    assert metrics["best"]["accuracy"] >= metrics["evaluations"][0]["accuracy"]


def test_a_model_that_knows_the_labels_keeps_its_head(
    trained: Gang, tmp_path: Path, train_file: Path, validation_file: Path
) -> None:
    assignment = make_assignment(
        tmp_path,
        trained.model,
        train_file,
        validation=validation_file,
        max_steps=1,
        batch_size=4,
        learning_rate=1e-9,
    )
    gang = Gang(assignment).run()
    assert gang.done.summary["metrics"]["accuracy"] > 0.9
    assert "its own classification head" in gang.log.read_text()


def test_options_of_every_kind_take_part(tmp_path: Path, bert: Path, train_file: Path) -> None:
    assignment = make_assignment(
        tmp_path,
        bert,
        train_file,
        ranks=2,
        validation_split=0.2,
        max_steps=6,
        batch_size=16,
        micro_batch_size=4,
        precision="bf16",
        schedule="cosine",
        warmup_steps=2,
        label_smoothing=0.1,
        max_grad_norm=None,
        max_length=8,
        freeze=("bert.embeddings.*",),
        eval_every_steps=4,
    )
    gang = Gang(assignment).run()
    log = gang.log.read_text()
    assert gang.done.summary["steps"] == 6
    assert "precision bf16" in log
    assert " cut to that" in log
    assert "200 training and 50 validation" in log
    steps = [m.step for m in gang.of(Metric) if m.split == "validation"]
    assert steps == [4, 6]
    before = AutoModelForSequenceClassification.from_pretrained(bert, num_labels=3).state_dict()
    after = AutoModelForSequenceClassification.from_pretrained(gang.model).state_dict()
    assert after["classifier.weight"].dtype == torch.float32
    frozen = "bert.embeddings.word_embeddings.weight"
    moved = "bert.encoder.layer.0.attention.self.query.weight"
    assert torch.equal(before[frozen], after[frozen])
    assert not torch.equal(before[moved], after[moved])


def test_the_new_head_and_the_training_follow_the_seed(
    tmp_path: Path, bert: Path, train_file: Path
) -> None:
    def weights(name: str, seed: int) -> str:
        assignment = make_assignment(
            tmp_path / name, bert, train_file, max_steps=2, batch_size=8, seed=seed
        )
        return Gang(assignment).run().weights

    assert weights("a", 1) == weights("b", 1) != weights("c", 2)
