"""The report page: whole in itself, safe with any text, and of any training."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.writeup.facts import make_evaluations, make_facts, make_points
from workers.writeup.charts import Chart, Series
from workers.writeup.facts import Facts, Part
from workers.writeup.figures import fixed, shown, tick_labels, ticks
from workers.writeup.matrix import confusions
from workers.writeup.page import render

HOSTILE = '"><script>document.title="taken"</script><img src=x onerror=alert(1)>{{ 7*7 }}'
ALONE: dict[str, Any] = {"parts": [Part(1, 0, 1, "cpu0@a")], "ended": []}


def one_step(steps: int = 1) -> Facts:
    return make_facts(
        points=make_points(steps, steps),
        evaluations=make_evaluations(steps, steps),
        steps=steps,
        total_steps=steps,
        steps_per_epoch=1,
        **ALONE,
    )


def hostile() -> Facts:
    return make_facts(
        labels=(HOSTILE, "b" * 400, "ö"),
        spec={"name": HOSTILE, "model": HOSTILE},
        samples=[{"text": HOSTILE, "reference": HOSTILE, "predicted": HOSTILE}],
        parts=[Part(1, 0, 1, HOSTILE)],
    )


TRAININGS = {
    "resumed": make_facts(),
    "one step": one_step(),
    "two steps": one_step(2),
    "without validation": make_facts(evaluations=[], values={}, details={}, samples=[]),
    "long": make_facts(
        points=make_points(500, 10**6, gap=range(100, 140)),
        evaluations=make_evaluations(3000, 10**6),
        steps=10**6,
        total_steps=10**6,
    ),
    "hundred classes": make_facts(labels=tuple(f"class {i} with a long name" for i in range(100))),
    "hostile": hostile(),
}


@pytest.mark.parametrize("facts", TRAININGS.values(), ids=TRAININGS.keys())
def test_it_is_whole_small_and_well_formed(facts: Facts) -> None:
    page = render(facts)
    assert len(page.encode()) < 300_000
    body = re.sub(r"<svg.*?</svg>", "", page, flags=re.S)
    assert not re.findall(r"""(?:src|href)\s*=\s*["'](?!#)""", body), "it asks for nothing"
    assert "url(" not in page and "<script" not in page
    for svg in re.findall(r"<svg.*?</svg>", page, flags=re.S):
        drawing = ElementTree.fromstring(svg)  # noqa: S314  our own
        assert drawing.get("aria-label")
        for path in drawing.iter("path"):
            assert not re.search(r"nan|inf", path.get("d") or "")
    assert "None" not in re.sub(r"<pre>.*?</pre>", "", page, flags=re.S)


def test_it_says_what_was_resumed_and_why() -> None:
    page = render(make_facts())
    assert "went on from the checkpoint of step 150" in page
    assert "cpu0@a was not heard of for 60 s [lease_expired]" in page
    assert "attempt 2 goes on from step 150" in page, "the curves are marked"
    assert "in one go" in render(one_step())
    lost = make_facts(parts=[Part(2, 0, 2, "cpu1@a")])
    assert "began again from the first step" in render(lost)
    assert "nothing of it was kept" in render(lost)


def test_the_best_evaluation_is_marked_also_where_not_all_are_shown() -> None:
    facts = TRAININGS["long"]
    entries = [dict(entry) for entry in facts.evaluations]
    entries[1234]["accuracy"] = 0.99
    page = render(make_facts(points=facts.points, evaluations=entries, steps=10**6))
    assert page.count('class="best"') == 1 and "best accuracy" in page
    assert "more are in <code>metrics.csv</code>" in page


def test_mistakes_are_named_by_how_often_they_are_made() -> None:
    found = confusions([[5, 2, 0], [0, 4, 1], [3, 0, 0]], ["a", "b", "c"])
    assert [(c.truth, c.guess, c.count) for c in found] == [
        ("c", "a", 3),
        ("a", "b", 2),
        ("b", "c", 1),
    ]
    assert found[0].share == 1.0


def test_a_gap_is_no_line_and_a_value_between_two_gaps_is_a_dot() -> None:
    values = [(1, 1.0), (2, 2.0), (3, None), (4, 3.0), (5, float("nan")), (6, 1.0), (7, 2.0)]
    svg = ElementTree.fromstring(Chart("x", "", [Series("x", values)]).svg())  # noqa: S314
    (line,) = [p for p in svg.iter("path") if (p.get("class") or "").startswith("line")]
    assert (line.get("d") or "").count("M") == 2
    assert len(list(svg.iter("circle"))) == 1
    assert Chart("x", "", [Series("x", [(1, None)])]).svg() == ""


def test_names_at_the_ends_of_lines_do_not_meet() -> None:
    lines = [Series(f"s{i}", [(1, 1.0), (2, 1.0 + i * 1e-6)], colour=i + 1) for i in range(4)]
    svg = ElementTree.fromstring(Chart("x", "", lines).svg())  # noqa: S314
    names = [t for t in svg.iter("text") if (t.get("class") or "").startswith("name")]
    places = sorted(float(t.get("y") or 0) for t in names)
    assert len(places) == 4
    assert all(b - a >= 28 for a, b in pairwise(places))


@pytest.mark.parametrize(
    ("low", "high", "labels"),
    [
        (0, 1, ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]),
        (0.9031, 0.9208, ["0.905", "0.910", "0.915", "0.920"]),
        (0, 12345, ["0", "5,000", "10,000"]),
    ],
)
def test_ticks_are_round_and_few(low: float, high: float, labels: list[str]) -> None:
    assert tick_labels(ticks(low, high, 6)) == labels


def test_numbers_for_people() -> None:
    said = [shown(v) for v in (3, 1234567, 0.0, 0.91234, 12.0, 5e-5, 1500.0, 3.2e9)]
    assert said == [
        "3", "1,234,567", "0", "0.9123", "12", "5.00 × 10⁻⁵", "1,500", "3,200,000,000"
    ]  # fmt: skip
    assert [fixed(v) for v in (0.9, 70, 1.0)] == ["0.9000", "70", "1.0000"]


@pytest.fixture(scope="module")
def browser() -> str:
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if found := shutil.which(name):
            return found
    if os.environ.get("CI"):
        pytest.fail("no chromium: CI has to have it (apt-get install -y chromium)")
    pytest.skip("no chromium here (apt-get install -y chromium)")


@pytest.mark.parametrize("name", ["resumed", "hostile"])
def test_a_browser_shows_it_and_runs_nothing(browser: str, name: str, tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    file.write_text(render(TRAININGS[name]))
    done = subprocess.run(
        [
            browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
            f"--user-data-dir={tmp_path}", "--proxy-server=127.0.0.1:9", "--enable-logging=stderr",
            "--virtual-time-budget=5000", "--dump-dom", file.as_uri(),
        ],
        env={**os.environ, "HOME": str(tmp_path)}, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert not [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    title = re.search(r"<title>(.*?)</title>", done.stdout, re.S)
    assert title and title[1].endswith("training report")
    assert "<script" not in done.stdout and "<img" not in done.stdout
    assert done.stdout.count("<svg") == len(re.findall("<figure>", done.stdout))
