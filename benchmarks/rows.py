"""``python -m benchmarks.rows``: a job of very many tiny rows, and the memory of all who touch it.

A stub-sized model, so that what is measured is the service. Peaks are the kernel's (VmHWM), reset where a
phase begins; "before" is what the process had then. Not part of ``make bench``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.processes import children
from benchmarks.service import make_tiny_language_model
from gpuyard import Client
from gpuyard.local.background import RunningStack, stack
from gpuyard.local.stack import StackOptions

ROOT = Path(__file__).resolve().parents[1]
MIB = 1024 * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--format", choices=("jsonl", "csv", "parquet"), default="csv")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory(prefix="gpuyard-rows-") as folder:
        figures = bench(Path(folder), args.rows, args.format)
    print(json.dumps(figures, indent=2))
    print(report(figures))


def bench(folder: Path, rows: int, format: str) -> dict[str, Any]:
    """Seconds and MiB of each phase."""
    data = folder / "data"
    make_tiny_language_model(data / "models" / "tiny")
    path = write_rows(folder / f"in.{format}", rows)
    options = StackOptions(data=data, devices="cpu:1", api_port=0, flower_port=0)
    with (
        stack(options) as running,
        Client(url=running.api_url, api_key=running.api_key) as client,
    ):
        phases: dict[str, Any] = {}
        spec = {
            "kind": "infer",
            "task": "text-generation",
            "model": "tiny",
            "generation": {"max_new_tokens": 1},
            "batch_size": 256,
            "shard_rows": 256,
        }
        client.wait(client.submit({**spec, "rows": [{"prompt": "w1"}]}).id)  # the engine is warm
        upload = client.upload(path)
        with Phase(phases, "submit", running):
            job = client.submit({**spec, "input": upload.id}).id
        with Phase(phases, "compute", running):
            client.wait(job, poll_seconds=1.0)
        for name, arguments in {
            "stream in input order": ["stream", "input"],
            "stream as they came": ["stream", "completion"],
            "download JSONL": ["download", str(folder / "out.jsonl")],
            "download Parquet": ["download", str(folder / "out.parquet")],
        }.items():
            with Phase(phases, name, running) as phase:
                phase.client_mib = read_in_process(running, job, arguments, rows)
        with Phase(phases, "list and look", running):
            for _ in range(50):
                assert any(each.id == job for each in client.jobs())
                assert client.job(job).rows_done == rows
        return {
            "rows": rows,
            "format": format,
            "input_mib": path.stat().st_size / MIB,
            "jsonl_mib": (folder / "out.jsonl").stat().st_size / MIB,
            "parquet_mib": (folder / "out.parquet").stat().st_size / MIB,
            "phases": phases,
        }


def write_rows(path: Path, rows: int) -> Path:
    """Rows of three words."""
    made: Iterator[tuple[int, str]] = (
        (n, f"w{n % 50} w{n // 50 % 50} w{n // 2500 % 50}") for n in range(rows)
    )
    if path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        ids, prompts = zip(*made, strict=True)
        pq.write_table(pa.table({"id": ids, "prompt": prompts}), path)
        return path
    with path.open("w") as file:
        if path.suffix == ".csv":
            file.write("id,prompt\n")
        for id, prompt in made:
            row = (
                f"{id},{prompt}"
                if path.suffix == ".csv"
                else json.dumps({"id": id, "prompt": prompt})
            )
            file.write(row + "\n")
    return path


class Phase:
    """Measures the service's processes from its beginning to its end."""

    client_mib: float | None = None

    def __init__(self, phases: dict[str, Any], name: str, running: RunningStack) -> None:
        self._phases, self._name = phases, name
        self._processes = parts(running)

    def __enter__(self) -> Phase:
        for pids in self._processes.values():
            for pid in pids:
                Path(f"/proc/{pid}/clear_refs").write_text("5")
        self._before = self._memory("VmRSS")
        self._began = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        seconds = time.perf_counter() - self._began
        peaks = self._memory("VmHWM")
        self._phases[self._name] = {
            "seconds": round(seconds, 1),
            "before_mib": self._before,
            "peak_mib": peaks | ({"client": self.client_mib} if self.client_mib else {}),
        }
        print(self._name, self._phases[self._name], flush=True)

    def _memory(self, field: str) -> dict[str, float]:
        """The most of the processes of each part."""
        found = {}
        for part, pids in self._processes.items():
            found[part] = max((status(pid, field) for pid in pids), default=0.0)
        return found


def parts(running: RunningStack) -> dict[str, list[int]]:
    """Processes by what they are; "worker" are all on a host that do not compute."""
    pids = running.pids()
    below = [pids["workers"], *descendants(pids["workers"])]
    engines = [pid for pid in below if comm(pid) == "gpuyard-rank"]
    return {
        "API": [pids["api"]],
        "scheduler": [pids["scheduler"]],
        "worker": [pid for pid in below if pid not in engines],
        "engine": engines,
    }


def descendants(pid: int) -> list[int]:
    found = children(pid)
    return found + [each for child in found for each in descendants(child)]


def comm(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def status(pid: int, field: str) -> float:
    """A line of /proc/PID/status in MiB; 0 of a process that is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(x.split()[1]) / 1024 for x in lines if x.startswith(f"{field}:")), 0.0)


READER = """
import sys, resource
from gpuyard import Client
from pathlib import Path
_, url, key, job, what, argument, rows = sys.argv
with Client(url, key) as client:
    if what == "stream":
        count = sum(1 for _ in client.results(job, order=argument))
    else:
        count = client.download_results(job, argument)
assert count == int(rows), count
print(next(l.split()[1] for l in open("/proc/self/status") if l.startswith("VmHWM")))
"""


def read_in_process(running: RunningStack, job: str, arguments: list[str], rows: int) -> float:
    """Read all results in a process of its own: its peak in MiB."""
    told = subprocess.run(
        [
            sys.executable,
            "-c",
            READER,
            running.api_url,
            running.api_key,
            job,
            *arguments,
            str(rows),
        ],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    return int(told.stdout) / 1024


def report(figures: dict[str, Any]) -> str:
    """The table, as Markdown."""
    names = ("API", "scheduler", "worker", "engine", "client")
    lines = [
        f"| {figures['rows']:,} rows | seconds | {' | '.join(f'{name}, MiB' for name in names)} |",
        "| --- " * (2 + len(names)) + "|",
    ]
    for name, phase in figures["phases"].items():
        cells = []
        for part in names:
            peak, before = phase["peak_mib"].get(part), phase["before_mib"].get(part)
            cells.append("" if not peak else f"{peak:.0f}" + (f" ({before:.0f})" if before else ""))
        lines.append(f"| {name} | {phase['seconds']} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
