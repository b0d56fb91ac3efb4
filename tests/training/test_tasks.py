"""Every task: it learns, the model loads without gpuyard, and a killed training ends bitwise the same, on
two ranks and on four."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import transformers
from huggingface_hub import ModelCard

from shared.messages import CheckpointWritten, Done, Metric, Notice, Report
from tests.training.cases import CASES, Case
from tests.training.harness import Gang, curve, make_assignment, write_rows

OPTIONS: dict[str, Any] = {
    "epochs": 5,
    "batch_size": 16,
    "learning_rate": 5e-3,
    "warmup_ratio": 0.1,
}

SAMPLED = {
    "entities", "parts-of-speech", "text2text", "summarization", "plain-text", "packed-text",
    "completion", "chat", "preference", "preference-lora",
}  # fmt: skip
"""Cases whose report always shows samples; a classifier's shows mistakes, if it makes any."""


class Material:
    """A case on disk, and its uninterrupted training on two ranks."""

    def __init__(self, case: Case, folder: Path) -> None:
        self.case = case
        self.folder = folder
        self.model = case.model(folder / "model")
        self.train = write_rows(folder / "train.jsonl", case.rows(250, 1))
        self.validation = write_rows(folder / "validation.jsonl", case.rows(70, 2))
        self.trained = Gang(self.assignment("whole")).run()

    def assignment(self, work: str, *, ranks: int = 2, **options: Any) -> Any:
        return make_assignment(
            self.folder / work,
            self.model,
            self.train,
            ranks=ranks,
            task=self.case.task,
            problem=self.case.problem,
            validation=self.validation,
            spec_fields=self.case.spec_fields,
            **{**OPTIONS, **self.case.hyperparameters, **options},
        )


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def material(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Material:
    return Material(request.param, tmp_path_factory.mktemp(request.param.name))


def test_it_learns(material: Material) -> None:
    case, gang = material.case, material.trained
    evaluations = [m.values for m in gang.of(Metric) if m.split == "validation"]
    assert len(evaluations) >= 2
    reached = gang.done.summary["metrics"][case.metric]
    assert evaluations[-1][case.metric] == reached
    better = reached <= case.learned if case.lower_is_better else reached >= case.learned
    assert better, f"{case.metric} came to {reached}, expected {case.learned}"
    assert "Warning" not in gang.log.read_text()


def test_the_model_loads_without_gpuyard(material: Material) -> None:
    auto = getattr(transformers, material.case.loads_as)
    _, info = auto.from_pretrained(material.trained.model, output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    assert transformers.AutoTokenizer.from_pretrained(material.trained.model)("the old town")


def test_it_is_written_up(material: Material) -> None:
    case, gang = material.case, material.trained
    assert not [n for n in gang.of(Notice) if n.code == "report_failed"], gang.log.read_text()
    page = (gang.model.parent / "report.html").read_text()
    assert "Course of the training" in page and "Evaluations" in page and "in one go" in page
    reached = gang.done.summary["metrics"][case.metric]
    card = ModelCard.load(gang.model / "README.md").data
    values = {r.metric_name: r.metric_value for r in card.eval_results or ()}
    assert values[case.metric] == reached
    told = ("<dl>" in page or 'class="words"' in page) == (case.name in SAMPLED)
    mistaken = (
        case.name in ("single-label", "lora") and gang.done.summary["metrics"]["accuracy"] < 1
    )
    assert told or mistaken


def test_killed_and_resumed_it_ends_bitwise_the_same(material: Material) -> None:
    _killed_and_resumed(material, material.trained, ranks=2, every=7)


def test_on_four_ranks_too(material: Material) -> None:
    # One epoch has 16 steps, so that the last batch of it, of 10 examples, is among these.
    options = {"max_steps": 20, "eval_every_steps": 6}
    whole = Gang(material.assignment("whole-of-four", ranks=4, **options)).run()
    _killed_and_resumed(material, whole, ranks=4, every=4, **options)


def _killed_and_resumed(
    material: Material, whole: Gang, *, ranks: int, every: int, **options: Any
) -> None:
    """SIGKILL strikes a random rank behind a random checkpoint; what goes on from there is ``whole``."""
    draw = random.Random(f"{material.case.name} {ranks}")
    after, rank = every * draw.randint(1, 3), draw.randrange(ranks)
    rules = {"every_steps": every, "every_seconds": None, "keep": 2}
    fields: dict[str, Any] = {"ranks": ranks, **options}
    first = Gang(material.assignment(f"killed-{ranks}", checkpoint=rules, **fields))
    written: list[int] = []

    def strike(_rank: int, report: Report) -> None:
        if isinstance(report, CheckpointWritten):
            written.append(report.step)
        if written and written[-1] >= after:
            first.kill(rank)

    first.run(on_report=strike)
    assert first.exit_code(rank) == -9 and not first.of(Done), "the fault did not strike"
    again = {"resume_from": first.checkpoints, **fields}
    second = Gang(material.assignment(f"resumed-{ranks}", **again)).run()
    assert second.done.summary["resumed_from"]["step"] == first.checkpoints[0].step >= after
    assert second.weights == whole.weights
    assert second.done.summary["metrics"] == whole.done.summary["metrics"]
    assert curve(first, second) == curve(whole)
