"""``make bench``: everything in one run, as the tables of docs/performance.md."""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import checkpoints, generation, jobs, recovery, training
from benchmarks.service import service
from benchmarks.texts import write_texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="turns of each pair; medians count")
    parser.add_argument("--requests", type=int, default=64, help="prompts of the generation part")
    parser.add_argument("--out", type=Path, default=Path("bench-out"))
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    args.out.mkdir(exist_ok=True)

    figures: dict[str, Any] = {}

    def note(part: str, found: Any) -> None:
        """What is measured is kept, whatever becomes of the rest."""
        figures[part] = found
        (args.out / "figures.json").write_text(json.dumps(figures, indent=2))

    with tempfile.TemporaryDirectory(prefix="gpuyard-bench-") as folder:
        print("starting a local stack", flush=True)
        with service(Path(folder)) as running:
            print("jobs", flush=True)
            note("jobs", jobs.bench(running))
            print("training", flush=True)
            note("training", training.bench(running, rounds=args.rounds))
            print("recovery", flush=True)
            texts = write_texts(running.data, "short")
            note("recovery", recovery.bench(running, texts, rounds=args.rounds))
    print("checkpoints", flush=True)
    note("checkpoints", checkpoints.bench(args.rounds))
    print("generation", flush=True)
    options = ["--requests", str(args.requests), "--slots", "32"]
    note("generation", generation.bench(generation.parse_arguments(options)))
    text = report(figures)
    (args.out / "performance.md").write_text(text)
    print(text)


def report(figures: dict[str, Any]) -> str:
    """The tables, as Markdown."""
    done = figures["jobs"]
    lines = [
        f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "",
        "| training: MiniLM, 2 ranks (gloo), global batch 32 | examples/s | gpuyard is |",
        "| --- | --- | --- |",
    ]
    for what, rates in figures["training"]["examples_per_second"].items():
        for name, rate in rates.items():
            lines.append(f"| {what}: {name} | {rate:.1f} | {rates['gpuyard'] / rate:.2f} × |")
    first = figures["training"]["seconds_to_first_step"]
    lines += _seconds("from start to the first step", first, "gpuyard, warm")
    new = figures["recovery"]["seconds_to_first_new_step"]
    lines += _seconds("from SIGKILL of a rank to the first new step", new, "gpuyard")
    again = figures["recovery"]["steps_computed_twice"]
    lines += [
        "",
        f"gpuyard computed {again:.0f} steps twice; torchrun's script begins again at step 1, and came "
        f"back at all in {figures['recovery']['torchrun_came_back']} cases.",
    ]
    lines += ["", checkpoints.table(figures["checkpoints"])]
    lines += ["", generation.table(figures["generation"])]
    lines += [
        "",
        "| doing next to nothing, 2 devices | a second |",
        "| --- | --- |",
        f"| gpuyard jobs, submit to stored result | {done['jobs_per_second']:.1f} |",
        f"| gpuyard submissions | {done['submissions_per_second']:.1f} |",
        f"| bare Celery tasks | {done['celery_tasks_per_second']:.0f} |",
        "",
        f"One job alone, submit to succeeded: {done['seconds_for_one_job'] * 1000:.0f} ms (median). "
        f"Bare Celery does {done['celery_tasks_per_second'] / done['jobs_per_second']:.0f} × as many tasks.",
        "",
    ]
    return "\n".join(lines)


def _seconds(title: str, figures: dict[str, float], ours: str) -> list[str]:
    lines = ["", f"| {title} | seconds | against {ours} |", "| --- | --- | --- |"]
    for name, seconds in figures.items():
        lines.append(f"| {name} | {seconds:.2f} | {seconds / figures[ours]:.1f} × as long |")
    return lines


if __name__ == "__main__":
    main()
