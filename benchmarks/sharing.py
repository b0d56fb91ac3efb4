"""Jobs that share a device, a job that has two devices, and one row that is wanted at once.

A GPT-2 type of 6 layers and 512 hidden, fp32, mixed prompts of 8 to 200 tokens, answers of 1 to 64 tokens,
through a real stack: from submission to the last stored result. All jobs but the small ones are of the same
rows; for two devices there are four times as many, as a job has one for its first two seconds. Medians of
several turns, in which what is compared takes turns.

    python -m benchmarks.sharing [--requests 192] [--turns 3]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from benchmarks.generation import make_model, make_prompts
from gpuyard import Client
from gpuyard.local.background import stack
from gpuyard.local.stack import StackOptions

NEW_TOKENS = 64
SPLITS = (1, 2, 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--requests", type=int, default=192)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    found = bench(options.requests, options.turns)
    print(json.dumps(found) if options.json else table(found))


def bench(requests: int = 192, turns: int = 3) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="sharing-") as folder:
        data = Path(folder)
        model = data / "models" / "gpt"
        model.mkdir(parents=True)
        texts = make_model("gpt2", model)
        prompts = make_prompts(AutoTokenizer.from_pretrained(model), texts, requests)
        found: dict[str, Any] = {"requests": requests, "turns": turns}
        with _client(data, "cpu:1") as client:
            found |= _on_one_device(client, prompts, turns)
        with _client(data, "cpu:2") as client:
            found |= _on_two_devices(client, prompts, turns)
        return found


def table(found: dict[str, Any]) -> str:
    merged = found["jobs"]["1"]
    one, two = found["devices"]["1"], found["devices"]["2"]
    lines = [
        f"| {found['requests']} rows | seconds | ratio |",
        "| --- | --- | --- |",
        *(
            f"| as {n} {'job' if n == '1' else 'jobs'} on one device of two threads | {seconds:.1f} |"
            f" {merged / seconds:.2f} of the throughput |"
            for n, seconds in found["jobs"].items()
        ),
        f"| {4 * found['requests']} rows on one device of one thread | {one:.1f} | |",
        f"| on two | {two:.1f} | {two / one:.2f} of the time |",
        "",
        "| one row of 8 tokens, submit to answer | milliseconds, median (slowest) |",
        "| --- | --- |",
        *(
            f"| {how} | {statistics.median(seconds) * 1e3:.0f} ({max(seconds) * 1e3:.0f}) |"
            for how, seconds in found["one_row"].items()
        ),
    ]
    return "\n".join(lines)


@contextlib.contextmanager
def _client(data: Path, devices: str) -> Iterator[Client]:
    options = StackOptions(data=data, devices=devices, api_port=0, flower_port=0)
    with stack(options) as running, Client(url=running.api_url, api_key=running.api_key) as client:
        yield client


def _on_one_device(client: Client, prompts: list[str], turns: int) -> dict[str, Any]:
    _run(client, [prompts[:8]])
    seconds: dict[str, list[float]] = defaultdict(list)
    for _ in range(turns):
        for parts in SPLITS:
            seconds[str(parts)].append(_run(client, [prompts[n::parts] for n in range(parts)]))
    idle = [_run(client, [prompts[n : n + 1]], tokens=8) for n in range(10)]
    backlog = client.submit(_spec(prompts * 4)).id
    while not client.job(backlog).progress:
        time.sleep(0.1)
    beside = [_run(client, [prompts[n : n + 1]], tokens=8) for n in range(10)]
    assert client.job(backlog).state == "running", "the backlog was over too soon"
    client.cancel(backlog)
    client.wait(backlog, raise_on_failure=False)
    return {
        "jobs": {n: statistics.median(found) for n, found in seconds.items()},
        "one_row": {"the device idle": idle, "beside a backlog with the same model": beside},
    }


def _on_two_devices(client: Client, prompts: list[str], turns: int) -> dict[str, Any]:
    # Each device has the model before anything is timed.
    for _ in range(2):
        _run(client, [prompts[:32], prompts[:32]])
    seconds: dict[str, list[float]] = defaultdict(list)
    for _ in range(turns):
        for devices in (1, 2):
            seconds[str(devices)].append(_run(client, [prompts * 4], devices=devices))
    return {"devices": {n: statistics.median(found) for n, found in seconds.items()}}


def _spec(prompts: list[str], *, tokens: int = NEW_TOKENS, devices: int = 1) -> dict[str, Any]:
    return {
        "kind": "infer",
        "task": "text-generation",
        "model": "gpt",
        "rows": [{"prompt": prompt} for prompt in prompts],
        "generation": {"max_new_tokens": tokens},
        "resources": {"devices": devices},
    }


def _run(client: Client, parts: list[list[str]], **options: Any) -> float:
    """Seconds from the first submission to the last stored result."""
    began = time.perf_counter()
    jobs = [client.submit(_spec(part, **options)).id for part in parts]
    for job_id in jobs:
        job = client.wait(job_id, poll_seconds=0.01)
        assert job.state == "succeeded", job.failure
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
