"""What people see on narrow and on wide terminals."""

from __future__ import annotations

import io
from datetime import UTC, datetime
from typing import Any

import pytest
from rich.console import Console

from gpuyard.cli import render
from shared.views import AttemptView, JobDetail

NOW = datetime(2026, 1, 5, 9, 30, tzinfo=UTC)


def shown(width: int, renderable: Any) -> list[str]:
    text = io.StringIO()
    Console(file=text, width=width).print(renderable)
    return text.getvalue().splitlines()


@pytest.mark.parametrize("width", [60, 80, 100, 140, 200])
def test_a_long_message_takes_nothing_from_what_identifies_a_row(width: int) -> None:
    failure = {"failure_class": "infrastructure", "code": "killed", "message": "lost " * 60}
    attempt = {
        "id": "att_1", "number": 1, "token": 1, "state": "failed", "world_size": 2,
        "ranks": [{"rank": r, "device_id": f"cpu{r}@host", "state": "released"} for r in (0, 1)],
        "failure": failure, "created_at": NOW, "started_at": NOW, "finished_at": NOW,
    }  # fmt: skip
    console = Console(width=width)
    lines = shown(width, render.attempts(console, [AttemptView.model_validate(attempt)]))
    assert len(lines) == 2 and max(map(len, lines)) <= width
    assert lines[0].split()[:2] == ["ATTEMPT", "STATE"]
    assert lines[1].split()[:2] == ["1", "failed"]
    if width >= 80:
        assert "cpu0@host, cpu1@host" in lines[1]
    assert "infrastructure: lost" in lines[1] and lines[1].rstrip().endswith("…")


def test_widths_are_taken_from_the_widest_that_may_be_cut() -> None:
    assert render.fit([7, 6, 20], [True, True, False], 40) == [7, 6, 20]
    assert render.fit([7, 6, 300], [True, True, False], 40) == [7, 6, 27]
    assert render.fit([10, 300, 300], [True, False, False], 50) == [10, 20, 20]
    assert render.fit([10, 12, 300], [True, False, False], 40) == [10, 12, 18]
    assert sum(render.fit([30, 300, 8], [True, False, False], 20)) == 30 + 4 + 4


def test_progress_is_broken_between_its_parts() -> None:
    job = JobDetail.model_validate(
        {
            "id": "job_1", "kind": "train", "task": "text-classification", "model": "minilm",
            "state": "running", "priority": 0, "created_at": NOW, "spec": {}, "requirements": {},
            "progress": {
                "step": 120, "total_steps": 330, "epoch": 1.09, "loss": 0.71, "grad_norm": 1.84,
                "learning_rate": 3.5e-5, "examples_per_second": 1096.0, "tokens_per_second": 23000.0,
                "memory_bytes": 812 << 20, "eta_seconds": 185.0,
            },
        }
    )  # fmt: skip
    parts = render.standing_of(job)
    assert parts == [
        "step 120/330", "epoch 1.09", "loss 0.7100", "grad norm 1.84", "lr 3.50e-05",
        "1,096.0 examples/s", "23,000 tokens/s", "memory 812 MiB",
    ]  # fmt: skip
    assert render.time_left(job) == "ETA 3 m 05 s"
    for width in (20, 78, 138):
        lines = render.wrapped(parts, width)
        assert max(map(len, lines)) <= width
        assert " · ".join(lines) == " · ".join(parts)
    assert len(render.wrapped(parts, 78)) == 2 and len(render.wrapped(parts, 138)) == 1
