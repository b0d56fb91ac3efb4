"""What is written beside the page: the model card, the table, TensorBoard's events."""

from __future__ import annotations

import csv
from pathlib import Path

import yaml
from huggingface_hub import ModelCard
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.writeup.facts import make_evaluations, make_facts, make_points
from workers.writeup import card
from workers.writeup.events import write_events
from workers.writeup.table import COLUMNS, metrics_csv, values


def test_the_table_has_every_value_that_was_measured_once() -> None:
    facts = make_facts()
    rows = list(csv.DictReader(metrics_csv(facts).splitlines()))
    assert tuple(rows[0]) == COLUMNS
    assert len(rows) == 330 * 7 + 6 * 3 == len({(r["split"], r["step"], r["metric"]) for r in rows})
    found = {(r["split"], int(r["step"]), r["metric"]): float(r["value"]) for r in rows}
    assert found == {(split, step, name): value for split, step, name, value in values(facts)}
    last = next(r for r in rows if (r["split"], r["step"]) == ("validation", "330"))
    assert float(last["epoch"]) == 6.0


def test_tensorboard_reads_the_events_back(tmp_path: Path) -> None:
    # Evaluations that lie between two points of a thinned history.
    facts = make_facts(points=make_points(50, 330), evaluations=make_evaluations(7, 330))
    write_events(tmp_path / "tensorboard", facts)
    (file,) = (tmp_path / "tensorboard").iterdir()
    assert file.name.startswith("events.out.tfevents.")
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    expected: dict[str, list[tuple[int, float]]] = {}
    for split, step, name, value in values(facts):
        expected.setdefault(f"{split}/{name}", []).append((step, value))
    assert set(events.Tags()["scalars"]) == set(expected)
    for tag, course in expected.items():
        read = events.Scalars(tag)
        assert [event.step for event in read] == [step for step, _ in course]
        for event, (_, value) in zip(read, course, strict=True):
            assert abs(event.value - value) <= 1e-6 * max(1.0, abs(value))
    times = [event.wall_time for event in events.Scalars("validation/loss")]
    assert times == sorted(times)
    assert abs(times[-1] - facts.points[-1].at) < 1e-3


def test_the_hub_reads_the_card() -> None:
    facts = make_facts(spec={"model": "google-bert/bert-base-uncased"})
    text = card.render(facts)
    data = ModelCard(text).data
    assert data.base_model == "google-bert/bert-base-uncased"
    assert data.pipeline_tag == "text-classification" and data.license is None
    assert data.metrics == ["accuracy", "f1", "loss"]
    results = {result.metric_name: result for result in data.eval_results or ()}
    assert results["macro_f1"].metric_value == facts.values["macro_f1"]
    assert results["macro_f1"].metric_type == "f1"
    for said in ("ab" * 32, "torch 2.13.0", "AutoModelForSequenceClassification", "| 330 | 6.00 |"):
        assert said in text
    spec = yaml.safe_load(text.split("````yaml\n")[1].split("````")[0])
    assert spec == facts.spec


def test_the_card_of_a_training_without_validation_names_no_result() -> None:
    text = card.render(make_facts(evaluations=[], values={}, details={}))
    data = ModelCard(text).data
    assert data.eval_results is None and data.metrics is None
    assert "## Metrics" not in text and "## Evaluations" not in text


def test_a_card_keeps_other_peoples_text_in_its_place() -> None:
    hostile = "a | b\n# <script>alert(1)</script> ```` `x`\n---\nlicense: mit"
    facts = make_facts(labels=(hostile, "b"), spec={"name": hostile, "model": "job:job_1"})
    text = card.render(facts)
    data = ModelCard(text).data
    assert data.license is None and data.base_model is None
    body = text.split("---\n", 2)[2].split("````yaml")[0]
    assert "<script>" not in body.replace(f"`{card._code(hostile)}`", "")
    assert "\n# &lt;" not in body
