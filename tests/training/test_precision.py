"""Precisions: fp16 scales the loss, skips steps that overflow, and resumes exactly all the same."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from scheduler.submission.requirements import asked
from shared.errors import InvalidSpec
from shared.lifecycle import FailureClass
from shared.messages import CheckpointWritten, Done, Metric, Progress, Report
from shared.specs import parse_spec
from tests.training.cases import scored_rows
from tests.training.harness import Gang, make_assignment, write_rows
from workers.ranks.train.scaling import GROWS_AFTER, LARGEST_FIRST, LossScale

EVERY_5 = {"every_steps": 5, "every_seconds": None}
HALF: dict[str, Any] = {"batch_size": 16, "learning_rate": 5e-3, "precision": "fp16"}


@pytest.fixture(scope="module")
def large_scores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scores of thousands: at first their gradients overflow fp16 with any larger scale than 32."""
    rows = [{**row, "label": 500 * row["label"]} for row in scored_rows(250, 1)]
    return write_rows(tmp_path_factory.mktemp("scores") / "train.jsonl", rows)


def scoring(work: Path, model: Path, train: Path, ranks: int = 2, **options: Any) -> Any:
    return make_assignment(
        work, model, train, ranks=ranks, problem="regression", checkpoint=EVERY_5, **HALF, **options
    )


def scales(gang: Gang) -> list[float]:
    """Of the steps that were skipped."""
    said = re.findall(r"moved no weight: .* loss scale of ([\d.]+)", gang.log.read_text())
    return [float(scale) for scale in said]


def test_it_learns_in_fp16_and_delivers_fp32(
    tmp_path: Path, bert: Path, train_file: Path, validation_file: Path
) -> None:
    assignment = make_assignment(
        tmp_path,
        bert,
        train_file,
        ranks=2,
        validation=validation_file,
        epochs=6,
        dropout=0.0,
        **HALF,
    )
    gang = Gang(assignment).run()
    assert gang.done.summary["metrics"]["accuracy"] > 0.9
    assert gang.done.summary["skipped_steps"] == 0
    assert "precision fp16" in gang.log.read_text()
    kept = [m.values for m in gang.of(Metric) if m.split == "train"]
    assert {values["loss_scale"] for values in kept} == {LARGEST_FIRST}
    assert all(
        t.dtype == torch.float32 for t in load_file(gang.model / "model.safetensors").values()
    )


def test_a_step_that_overflows_moves_nothing_and_halves_the_scale(
    tmp_path: Path, bert: Path, large_scores: Path
) -> None:
    gang = Gang(scoring(tmp_path, bert, large_scores, max_steps=4)).run()
    assert scales(gang) == [LARGEST_FIRST / 2**step for step in range(4)]
    assert gang.done.summary["skipped_steps"] == 4
    assert all(progress.loss is None for progress in gang.of(Progress))
    assert not [m for m in gang.of(Metric) if m.split == "train"], "there is no loss to keep"
    after = load_file(gang.model / "model.safetensors")
    for name, tensor in load_file(bert / "model.safetensors").items():
        assert torch.equal(after[f"bert.{name}"], tensor), name


def test_killed_among_skipped_steps_it_ends_bitwise_the_same(
    tmp_path: Path, bert: Path, large_scores: Path
) -> None:
    whole = Gang(scoring(tmp_path / "whole", bert, large_scores, max_steps=40)).run()
    skipped = scales(whole)
    assert len(skipped) >= 7, "the scale has not come down"
    assert whole.done.summary["skipped_steps"] == len(skipped) < 40
    losses = [m.values["loss"] for m in whole.of(Metric) if m.split == "train"]
    assert losses[-1] < losses[0]

    first = Gang(scoring(tmp_path / "killed", bert, large_scores, max_steps=40))

    def strike(_rank: int, report: Report) -> None:
        if isinstance(report, CheckpointWritten):
            first.kill(1)

    first.run(on_report=strike)
    assert first.exit_code(1) == -9 and not first.of(Done), "the fault did not strike"
    newest = first.checkpoints[0]
    state = json.loads((Path(newest.path) / "state.json").read_text())["position"]["loss_scale"]
    assert state["factor"] < LARGEST_FIRST and state["skipped"] >= 5

    resumed = scoring(tmp_path / "resumed", bert, large_scores, max_steps=40)
    second = Gang(resumed.model_copy(update={"resume_from": first.checkpoints})).run()
    assert second.weights == whole.weights
    assert second.done.summary["skipped_steps"] == len(skipped)
    assert scales(second) == [scale for scale in skipped if scale <= state["factor"]]


def test_what_no_scale_cures_has_diverged(tmp_path: Path, bert: Path, train_file: Path) -> None:
    options = {
        **HALF,
        "learning_rate": 10.0,
        "optimizer": "sgd",
        "max_grad_norm": None,
        "epochs": 9,
    }
    gang = Gang(make_assignment(tmp_path, bert, train_file, ranks=2, l1=1.0, **options)).run()
    assert gang.failed.failure_class is FailureClass.USER_ERROR
    assert gang.failed.code == "diverged"
    assert "fp16" in (gang.failed.hint or "")
    assert scales(gang)[-1] == 2.0, "it gave up before the last scale"


def test_the_scale_grows_after_many_good_steps() -> None:
    scale = LossScale(factor=4.0)
    for _ in range(GROWS_AFTER - 1):
        scale.went_well()
    assert scale == LossScale(4.0, GROWS_AFTER - 1)
    scale.went_well()
    assert scale == LossScale(8.0, 0)
    assert scale.back_off() and scale == LossScale(4.0, 0, 1)
    assert scale.back_off() and scale.back_off() and not scale.back_off()
    assert scale == LossScale(1.0, 0, 3)


def test_tf32_is_a_need_and_plain_fp32_where_a_simulated_device_has_it(
    tmp_path: Path, bert: Path, train_file: Path
) -> None:
    def gang(precision: str) -> Gang:
        work = tmp_path / precision
        assignment = make_assignment(work, bert, train_file, max_steps=3, precision=precision)
        return Gang(assignment).run()

    tf32 = gang("tf32")
    assert asked(tf32.assignment.spec).compute_capability == 80
    assert "precision fp32" in tf32.log.read_text()
    assert tf32.weights == gang("fp32").weights


@pytest.mark.parametrize(
    ("precision", "resources", "says"),
    [
        ("tf32", {"accelerator": "cpu"}, "'tf32' is of CUDA devices"),
        ("fp16", {"features": ["bf16"]}, "precision 'fp16' and the required feature 'bf16'"),
        ("fp64", {}, "precision"),
    ],
)
def test_contradictions_are_refused(
    precision: str, resources: dict[str, Any], says: str, train_file: Path
) -> None:
    spec = {
        "kind": "train",
        "task": "text-classification",
        "model": "bert",
        "data": {"train": str(train_file)},
        "hyperparameters": {"precision": precision},
        "resources": resources,
    }
    with pytest.raises(InvalidSpec, match=says):
        parse_spec(spec)
