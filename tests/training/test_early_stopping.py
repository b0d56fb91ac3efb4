"""Training ends when validation gets no better, and delivers the best model, killed on the way or not."""

from __future__ import annotations

import json
import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from shared.errors import InvalidSpec
from shared.lifecycle import FailureClass
from shared.messages import CheckpointRef, CheckpointWritten, Done, Metric, Notice, Report
from shared.specs import parse_spec
from tests.training.harness import TOPICS, Gang, make_assignment, make_rows, write_rows
from workers.ranks.checkpoint import begin, finish, part_name, write_part
from workers.ranks.train.failures import TrainingFailed
from workers.ranks.train.gang import Gang as RankGang
from workers.ranks.train.state import restore_best
from workers.ranks.train.stopping import best_of, without_improvement

# The rate stays as it is, so that the training to any step is the beginning of a longer one.
OPTIONS: dict[str, Any] = {
    "epochs": 40,
    "batch_size": 16,
    "learning_rate": 5e-3,
    "schedule": "constant",
    "eval_every_steps": 5,
}
RULE: dict[str, Any] = {"patience": 5, "metric": "loss"}


@dataclass(frozen=True)
class Material:
    folder: Path
    model: Path
    train: Path
    validation: Path

    def assignment(self, work: str, ranks: int = 2, **options: Any) -> Any:
        return make_assignment(
            self.folder / work,
            self.model,
            self.train,
            ranks=ranks,
            validation=self.validation,
            **{"early_stopping": RULE, **OPTIONS, **options},
        )


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory, bert: Path) -> Material:
    """Few examples, a third of them under some label or other: learned by heart, they mislead."""
    folder = tmp_path_factory.mktemp("stopping")
    draw, rows = random.Random(5), make_rows(150, seed=1)
    for row in draw.sample(rows, 50):
        row["label"] = draw.choice(sorted(TOPICS))
    train = write_rows(folder / "train.jsonl", rows)
    validation = write_rows(folder / "validation.jsonl", make_rows(70, seed=2))
    return Material(folder, bert, train, validation)


@pytest.fixture(scope="module")
def stopped(material: Material) -> Gang:
    """The training that nobody interrupts."""
    return Gang(material.assignment("whole")).run()


def losses(gang: Gang) -> dict[int, float]:
    return {m.step: m.values["loss"] for m in gang.of(Metric) if m.split == "validation"}


def test_it_stops_once_validation_gets_no_better(stopped: Gang) -> None:
    measured, summary = losses(stopped), stopped.done.summary
    best = min(measured, key=lambda step: measured[step])
    assert summary["stopped_early"] is True
    assert summary["steps"] == max(measured) == best + 5 * RULE["patience"] < 40 * 10
    assert (summary["best"]["step"], summary["best"]["metric"]) == (best, "loss")
    assert summary["best"]["value"] == measured[best] == summary["metrics"]["loss"]
    artifacts = Path(stopped.assignment.work_dir) / "artifacts"
    metrics = json.loads((artifacts / "metrics.json").read_text())
    assert (metrics["stopped_early"], metrics["best"]) == (True, summary["best"])
    support = sum(entry["support"] for entry in metrics["per_class"].values())
    assert support == 70, "the details are of the delivered model"
    assert f"the best model is delivered: step {best}" in stopped.log.read_text()


def test_the_model_that_is_delivered_scores_what_the_best_one_scored(stopped: Gang) -> None:
    best = stopped.done.summary["best"]
    model = AutoModelForSequenceClassification.from_pretrained(stopped.model)
    tokenizer = AutoTokenizer.from_pretrained(stopped.model)
    rows = make_rows(70, seed=2)
    inputs = tokenizer([row["text"] for row in rows], padding=True, return_tensors="pt")
    inputs.pop("token_type_ids", None)
    truth = torch.tensor([model.config.label2id[row["label"]] for row in rows])
    with torch.inference_mode():
        logits = model(**inputs).logits
    assert float((logits.argmax(-1) == truth).float().mean()) == pytest.approx(best["accuracy"])
    assert float(nn.functional.cross_entropy(logits, truth)) == pytest.approx(best["value"])


def test_it_is_bitwise_the_model_of_a_training_that_ends_at_the_best_step(
    material: Material, stopped: Gang
) -> None:
    best = stopped.done.summary["best"]["step"]
    short = Gang(material.assignment("short", early_stopping=None, max_steps=best)).run()
    assert short.weights == stopped.weights
    assert short.done.summary["stopped_early"] is False


def test_the_best_is_delivered_also_where_training_runs_to_its_end(
    material: Material, stopped: Gang
) -> None:
    rule = {**RULE, "patience": 100}
    summary = stopped.done.summary
    last = summary["steps"]
    gang = Gang(material.assignment("patient", early_stopping=rule, max_steps=last)).run()
    assert gang.weights == stopped.weights
    assert gang.done.summary["stopped_early"] is False
    assert gang.done.summary["best"] == summary["best"]
    best = summary["best"]["step"]
    to_best = Gang(material.assignment("to best", early_stopping=rule, max_steps=best)).run()
    assert to_best.weights == stopped.weights, "the last is the best: it is in memory"
    assert best not in {report.step for report in to_best.of(CheckpointWritten)}


def test_best_models_become_checkpoints(stopped: Gang) -> None:
    """But those that a better one followed before they could be written."""
    measured = losses(stopped)
    best = [s for s in measured if all(measured[s] < measured[o] for o in measured if o < s)]
    written = [report.step for report in stopped.of(CheckpointWritten)]
    assert set(written) <= set(best) and written == sorted(written)
    assert (written[0], written[-1]) == (best[0], best[-1])
    assert all(report.best for report in stopped.of(CheckpointWritten))


def killed(
    material: Material, work: str, rank: int, *, of_best: int, behind: int, **more: Any
) -> Gang:
    """An attempt that SIGKILL ends as soon as a checkpoint ``behind`` steps or more behind the best of
    step ``of_best`` is durable."""
    rules = {"every_steps": 3, "every_seconds": None, "keep": 2}
    gang = Gang(material.assignment(work, checkpoint=rules, **more))

    def strike(_rank: int, report: Report) -> None:
        if not isinstance(report, CheckpointWritten) or report.best_step != of_best:
            return
        if report.step - of_best >= behind:
            gang.kill(rank)

    gang.run(on_report=strike)
    assert gang.exit_code(rank) == -9 and not gang.of(Done), "the fault did not strike"
    return gang


def resumed(material: Material, work: str, first: Gang, **more: Any) -> Gang:
    given = {"resume_from": first.checkpoints, "best_from": first.best, **more}
    return Gang(material.assignment(work, **given)).run()


def require_same_end(gang: Gang, stopped: Gang) -> None:
    assert gang.weights == stopped.weights
    for name in ("steps", "stopped_early", "best", "metrics"):
        assert gang.done.summary[name] == stopped.done.summary[name], name


@pytest.mark.parametrize(("rank", "behind"), [(0, 1), (1, 1), (1, 0), (0, 6)])
def test_killed_between_the_best_and_the_end_it_ends_the_same(
    material: Material, stopped: Gang, rank: int, behind: int
) -> None:
    best = stopped.done.summary["best"]["step"]
    first = killed(material, f"killed {rank} {behind}", rank, of_best=best, behind=behind)
    newest = first.checkpoints[0]
    assert newest.step >= best + behind and first.best[0].step == best
    state = json.loads((Path(newest.path) / "state.json").read_text())
    told = {entry["step"]: entry["loss"] for entry in state["position"]["evaluations"]}
    assert told == {step: loss for step, loss in losses(stopped).items() if step <= newest.step}
    second = resumed(material, f"resumed {rank} {behind}", first)
    assert second.done.summary["resumed_from"]["step"] == newest.step
    assert not second.of(Notice)
    require_same_end(second, stopped)


def test_killed_twice_it_ends_the_same(material: Material, stopped: Gang) -> None:
    best = stopped.done.summary["best"]["step"]
    earlier = max(step for step in (r.step for r in stopped.of(CheckpointWritten)) if step < best)
    first = killed(material, "once", 0, of_best=earlier, behind=0)
    second = killed(
        material, "twice", 1, of_best=best, behind=1,
        resume_from=first.checkpoints, best_from=first.best,
    )  # fmt: skip
    assert second.best[0].step == best
    require_same_end(resumed(material, "thrice", second), stopped)


def damage(checkpoint: CheckpointRef) -> None:
    [tensors, *_] = sorted(Path(checkpoint.path).glob("*.safetensors"))
    content = bytearray(tensors.read_bytes())
    content[-5] ^= 1
    tensors.write_bytes(content)


def test_what_builds_on_a_damaged_best_is_not_gone_on_from(
    material: Material, stopped: Gang
) -> None:
    best = stopped.done.summary["best"]["step"]
    first = killed(material, "best damaged", 0, of_best=best, behind=1)
    damage(first.best[0])
    second = resumed(material, "older", first)
    at_or_behind = [each.step for each in first.checkpoints if each.step >= best]
    notices = second.of(Notice)
    assert [notice.data["step"] for notice in notices] == at_or_behind
    assert f"the best model that it builds on, of step {best}: " in notices[0].message
    assert second.done.summary["resumed_from"]["step"] < best
    require_same_end(second, stopped)
    third = resumed(material, "anew", first, best_from=())
    assert "it is not there" in third.of(Notice)[0].message
    require_same_end(third, stopped)


def test_a_best_that_is_damaged_at_the_end_is_not_delivered(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    weights = {f"parameter.{name}": p.detach().clone() for name, p in model.named_parameters()}
    aside = begin(tmp_path, 5)
    written = finish(aside, 5, {part_name(0, 1): write_part(aside, 0, 1, weights)}, {})
    best = CheckpointRef(id="x", step=5, path=str(written.path), manifest=written.manifest)
    alone = RankGang(0, 1, torch.device("cpu"))
    with torch.no_grad():
        model.weight.zero_()
    restore_best(model, best, alone)
    assert torch.equal(model.weight, weights["parameter.weight"])
    damage(best)
    with pytest.raises(TrainingFailed, match="the best model, of step 5, cannot be delivered") as e:
        restore_best(model, best, alone)
    assert (e.value.failure_class, e.value.code) == (
        FailureClass.INFRASTRUCTURE,
        "best_model_damaged",
    )


def test_an_unknown_metric_names_those_that_there_are(material: Material) -> None:
    gang = Gang(
        material.assignment("unknown", early_stopping={"patience": 1, "metric": "f2"})
    ).run()
    assert gang.failed.failure_class is FailureClass.USER_ERROR
    assert gang.failed.code == "unknown_metric"
    assert gang.failed.message == (
        "early_stopping.metric 'f2' is not measured; what is: loss, accuracy, macro_f1"
    )


def test_without_validation_data_it_is_refused() -> None:
    spec = {
        "kind": "train", "task": "text-classification", "model": "m",
        "data": {"train": "x"}, "early_stopping": {"patience": 2},
    }  # fmt: skip
    with pytest.raises(InvalidSpec, match="early_stopping judges by validation data"):
        parse_spec(spec)
    parse_spec({**spec, "data": {"train": "x", "validation_split": 0.1}})


def evaluations(*values: float) -> list[dict[str, float]]:
    return [{"step": 10 * i, "m": value} for i, value in enumerate(values, start=1)]


def higher(new: float, old: float) -> bool:
    return new > old


def lower(new: float, old: float) -> bool:
    return new < old


def test_the_best_is_the_first_of_equals_and_always_a_number() -> None:
    assert best_of([], "m", higher) is None
    assert best_of(evaluations(math.nan), "m", higher) is None
    best = best_of(evaluations(math.nan, 1, 3, 3, 2), "m", higher)
    assert best is not None and (best.step, best.value) == (30, 3)
    best = best_of(evaluations(2, 1, math.nan, 3), "m", lower)
    assert best is not None and (best.step, best.value) == (20, 1)


@pytest.mark.parametrize(
    ("values", "min_delta", "waited"),
    [
        ((1,), 0, 0),
        ((1, 2, 3), 0, 0),
        ((3, 2, 3), 0, 2),
        ((3, 3, 3, 4), 0, 0),
        ((1, 1.4, 1.8), 0.5, 0),
        ((1, 1.4, 1.5), 0.5, 2),
        ((1, 3, 0, 0, 2.9), 0.5, 3),
        ((math.nan, math.nan), 0, 2),
        ((math.nan, 1, math.nan), 0, 1),
    ],
)
def test_small_improvements_count_together(
    values: tuple[float, ...], min_delta: float, waited: int
) -> None:
    assert without_improvement(evaluations(*values), "m", higher, min_delta) == waited
    negated = evaluations(*(-value for value in values))
    assert without_improvement(negated, "m", lower, min_delta) == waited
