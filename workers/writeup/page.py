"""The report of a training as one HTML page: no script, no request, nothing outside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from workers.writeup.charts import Chart, Series
from workers.writeup.facts import Facts, Point
from workers.writeup.figures import binary_unit, duration, fixed, power_of_ten, shown, size
from workers.writeup.matrix import confusions, matrix

_MOST_EVALUATIONS = 60
"""Rows of the table of evaluations."""
_MOST_CURVES = 4
_MOST_LETTERS = 4000
"""Of a text among the samples."""
_PER_CLASS = {
    "per_class": ("Classes", "class"),
    "per_tag": ("Tags", "tag"),
    "per_entity": ("Entities", "entity"),
}
_LEGIBLE = {"source": "text", "reference": "expected"}


@dataclass(frozen=True, slots=True)
class Tile:
    name: str
    value: str
    note: str = ""


def render(facts: Facts) -> str:
    """The whole page. Texts of others (names, labels, samples) are escaped."""
    environment = Environment(
        loader=PackageLoader("workers.writeup", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=False,
    )
    environment.filters["fixed"] = fixed
    evaluations = _thinned(facts)
    counts = facts.details.get("confusion")
    marks = _marks(facts)
    return environment.get_template("page.html").render(
        facts=facts,
        tiles=_tiles(facts),
        charts=[chart for chart in _charts(facts, marks) if chart.svg()],
        marks=marks,
        metrics=metric_names(facts),
        evaluations=evaluations,
        left_out=len(facts.evaluations) - len(evaluations),
        classes=_classes(facts),
        matrix=matrix(counts, facts.labels) if counts else "",
        confusions=confusions(counts, facts.labels) if counts else [],
        samples=[_legible(sample) for sample in facts.samples],
        samples_are=_what_samples_are(facts),
        attempts=_attempts(facts),
        story=_story(facts),
        made=_made(facts),
        spec=yaml.safe_dump(_without_nulls(facts.spec), sort_keys=False, allow_unicode=True),
    )


def metric_names(facts: Facts) -> list[str]:
    """What evaluations measure: what the model is judged by first."""
    found = dict.fromkeys(name for entry in facts.evaluations for name in entry if name != "step")
    return sorted(found, key=lambda name: name != facts.judged_by)


def _tiles(facts: Facts) -> list[Tile]:
    seconds = sum(point.seconds for point in facts.points[-1:])
    examples = _mean_rate(facts.points)
    devices = max((part.ranks for part in facts.parts), default=1)
    tiles = [
        Tile(name.replace("_", " "), shown(facts.values[name]), "on the validation data")
        for name in dict.fromkeys((facts.judged_by, "loss"))
        if name in facts.values
    ]
    tiles += [
        Tile(
            "steps",
            f"{facts.steps:,}",
            facts.extent + (", stopped early" if facts.stopped_early else ""),
        ),
        Tile("training time", duration(facts.seconds), f"{duration(seconds)} of it in steps"),
        Tile("examples/s", shown(examples), f"{devices} device" + ("s" if devices > 1 else "")),
    ]
    memory = facts.peak_memory_bytes or max((p.memory_bytes for p in facts.points), default=0)
    tiles.append(Tile("memory at most", size(memory), _memory_is(facts)))
    return tiles


def _mean_rate(points: Sequence[Point]) -> float:
    """Examples a second over all steps."""
    before = examples = 0.0
    for point in points:
        examples += point.examples_per_second * (point.seconds - before)
        before = point.seconds
    return examples / max(1e-9, before)


def _memory_is(facts: Facts) -> str:
    return "allocated on the GPU" if facts.device_kind == "cuda" else "of the process"


def _charts(facts: Facts, marks: Mapping[float, str]) -> list[Chart]:
    points = facts.points
    losses = [Series("training", [(p.step, p.loss) for p in points])]
    losses.append(Series("validation", _course(facts, "loss"), colour=2, sparse=True))
    rate_unit, rate = power_of_ten(max((p.learning_rate for p in points), default=0.0))
    byte_unit, unit = binary_unit(max((p.memory_bytes for p in points), default=0))
    charts = [Chart("Loss", "", losses, marks), *_metric_charts(facts, marks)]
    for title, symbol, values, zero, log in (
        ("Learning rate", rate_unit, [p.learning_rate / rate for p in points], True, False),
        ("Gradient norm", "", [p.grad_norm for p in points], False, True),
        ("Throughput", "examples/s", [p.examples_per_second for p in points], True, False),
        ("Tokens", "tokens/s", [p.tokens_per_second for p in points], True, False),
        ("Memory", f"{byte_unit}, {_memory_is(facts)}", [p.memory_bytes / unit for p in points], True, False),
    ):  # fmt: skip
        line = Series("", [(p.step, v) for p, v in zip(points, values, strict=True)])
        charts.append(Chart(title, symbol, [line], marks, from_zero=zero, log=log))
    return charts


def _metric_charts(facts: Facts, marks: Mapping[float, str]) -> list[Chart]:
    """What lies between -1 and 1 in one chart, and each other metric in its own."""
    names = [name for name in metric_names(facts) if name not in ("loss", "generated_examples")]
    spread = {name: [y for _, y in _course(facts, name)] for name in names}
    scores = [name for name in names if all(abs(y) <= 1 for y in spread[name])][:_MOST_CURVES]
    charts = []
    if scores:
        lines = [
            Series(name.replace("_", " "), _course(facts, name), colour=i + 1, sparse=True)
            for i, name in enumerate(scores)
        ]
        charts.append(Chart("Validation scores", "", lines, marks))
    others = [n for n in names if n not in scores and any(abs(y) > 1 for y in spread[n])]
    for name in others[:_MOST_CURVES]:
        title = name.replace("_", " ").capitalize()
        line = Series("validation", _course(facts, name), colour=2, sparse=True)
        charts.append(Chart(title, "", [line], marks, log=name == "perplexity"))
    return charts


def _course(facts: Facts, name: str) -> list[tuple[float, float]]:
    return [(e["step"], e[name]) for e in facts.evaluations if e.get(name) is not None]


def _marks(facts: Facts) -> dict[float, str]:
    """Where attempts went on from a checkpoint."""
    return {
        p.step: f"attempt {p.number} goes on from step {p.step:,}" for p in facts.parts if p.step
    }


def _thinned(facts: Facts) -> list[Mapping[str, float]]:
    """Some of many evaluations, the best and the last among them."""
    entries = facts.evaluations
    every = -(-len(entries) // _MOST_EVALUATIONS)
    last = len(entries) - 1
    return [
        e for i, e in enumerate(entries) if i % every == 0 or i == last or e["step"] == facts.best_step
    ]  # fmt: skip


def _classes(facts: Facts) -> dict[str, Any] | None:
    for key, (title, what) in _PER_CLASS.items():
        if rows := facts.details.get(key):
            columns = list(next(iter(rows.values())))
            return {"title": title, "what": what, "columns": columns, "rows": rows.items()}
    return None


def _legible(sample: Mapping[str, Any]) -> dict[str, Any]:
    if "words" in sample:
        return {
            "words": list(zip(sample["words"], sample["tags"], sample["predicted"], strict=True))
        }
    return {
        _LEGIBLE.get(name, name): text if len(text) <= _MOST_LETTERS else text[:_MOST_LETTERS] + " …"
        for name, text in sample.items()
    }  # fmt: skip


def _what_samples_are(facts: Facts) -> str:
    if facts.task == "text-classification":
        return "mistakes that the model is surest of"
    if facts.task == "token-classification":
        return "a dashed line is under a wrong tag"
    return "written by the delivered model, always its likeliest next token"


def _attempts(facts: Facts) -> list[dict[str, Any]]:
    """All of them, by number; of one whose work was lost nobody knows where it began."""
    parts = {part.number: part for part in facts.parts}
    rows: list[dict[str, Any]] = []
    for end in facts.ended:
        part = parts.pop(end.number, None)
        took = ""
        if end.started_at is not None and end.finished_at is not None:
            took = f" after {duration((end.finished_at - end.started_at).total_seconds())}"
        rows.append(
            {
                "number": end.number,
                "begin": "" if part is None else f"{part.step:,}",
                "ranks": end.ranks,
                "device": "" if part is None else part.device,
                "end": f"{end.failure_class.replace('_', ' ')}{took}: {end.message} [{end.code}]"
                + ("" if part else "; nothing of it was kept"),
            }
        )
    for part in parts.values():
        end_of = "succeeded" if part is facts.parts[-1] else ""
        rows.append(
            {
                "number": part.number,
                "begin": f"{part.step:,}",
                "ranks": part.ranks,
                "device": part.device,
                "end": end_of,
            }
        )
    return sorted(rows, key=lambda row: row["number"])


def _story(facts: Facts) -> str:
    """In words: what was resumed."""
    resumed = [part for part in facts.parts if part.step]
    if not facts.ended:
        return "It ran in one go."
    if not resumed:
        return "It began again from the first step, as no checkpoint had been made."
    steps = ", ".join(f"{part.step:,}" for part in resumed)
    return (
        f"It went on from the checkpoint of step {steps}: what had been done beyond was done again, and "
        "the curves show the steps that the model is made of."
    )


def _made(facts: Facts) -> list[tuple[str, str]]:
    options = facts.spec.get("hyperparameters", {})
    parameters = f"{facts.parameters:,} parameters"
    if facts.trained_parameters != facts.parameters:
        parameters += f", {facts.trained_parameters:,} of them trained"
    rate = f"{shown(float(options['learning_rate']))}, {options.get('schedule')}"
    lines = [
        ("model", f"{facts.base}, {parameters}"),
        ("method", str(facts.spec.get("method"))),
        ("batch", facts.batch),
        ("optimizer", f"{options.get('optimizer')}, learning rate {rate}"),
        ("seed", str(options.get("seed"))),
        ("precision", f"{facts.precision} on {facts.device_kind}"),
        ("versions", ", ".join(f"{name} {version}" for name, version in facts.versions.items())),
    ]
    if teacher := facts.spec.get("teacher"):
        lines.insert(1, ("teacher", str(teacher)))
    return lines


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    return [_without_nulls(v) for v in value] if isinstance(value, list | tuple) else value
