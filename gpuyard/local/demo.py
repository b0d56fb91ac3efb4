"""``gpuyard demo``: the main job end to end, on real models and real text.

Fine-tune a BERT-type encoder with DDP on two devices, classify a held-out file with what came out,
generate with a chat model, and say where everything is. Talks to the service as any user does, by
``gpuyard.Client``. Jobs carry idempotency keys made of their specs: a second run finds the first
one's and shows their results at once.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from gpuyard.cli import render
from gpuyard.client import Client
from gpuyard.connection import data_folder
from gpuyard.local.background import RunningStack, stack
from gpuyard.local.demo_models import ENCODER, GENERATOR, Conversion, provide_encoder
from gpuyard.local.stack import StackOptions
from shared.errors import ConfigurationError, IdempotencyMismatch
from shared.lifecycle import JobState
from shared.views import JobDetail

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def run(data: Path | None = None, console: Console | None = None) -> None:
    """Run the demo on a stack of its own, or on the one that serves the data folder already.

    Raises:
        ConfigurationError: the example data or the models are not installed.
        JobFailed: a job failed; says why.
    """
    console = console or Console()
    folder = (data or data_folder()).expanduser().resolve()
    if not (EXAMPLES / "data" / "glosses-train.jsonl").exists():
        raise ConfigurationError(
            "the demo needs the folder examples/ of the source", hint="Run it in a clone."
        )
    began = time.monotonic()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    conversion = Conversion(folder)
    converts = conversion.start()
    try:
        with console.status(
            "starting the stack: Postgres, Valkey, API, scheduler, workers, Flower"
        ):
            running = stack(StackOptions(data=folder, devices=_devices()), join=True)
            service = running.__enter__()
        try:
            _tick(console, f"the stack runs ({_seconds(began)}), data in {folder}")
            if provide_encoder(folder) is None:
                raise ConfigurationError("the demo's models are not installed", hint="`make demo`")
            with console.status(f"unpacking {GENERATOR} (once)" if converts else "models"):
                conversion.wait()
            with Client(service.api_url, service.api_key) as client:
                _show(client, console, service)
        finally:
            with console.status("stopping everything" if service.process else "done"):
                running.__exit__(None, None, None)
    finally:
        conversion.end()
    what = "nothing is left running" if service.process else "the stack goes on running"
    console.print()
    _tick(console, f"done in {_seconds(began)}; {what}")


def _show(client: Client, console: Console, service: RunningStack) -> None:
    """The main job, step by step."""
    if len([device for device in client.devices() if device.state == "up"]) < 2:
        raise ConfigurationError(
            "the stack that runs on this data folder has fewer than two devices",
            hint="Stop it, or start it with `gpuyard up --workers 2`.",
        )
    data = EXAMPLES / "data"

    console.rule("1 · fine-tune MiniLM on 2,000 WordNet glosses, DDP on two devices", align="left")
    trained = _job(client, console, "train", training_spec(data))
    console.print(f"  {trained.id}: {_describe(trained)}", soft_wrap=True)

    console.rule("2 · classify 600 held-out glosses with the model just trained", align="left")
    answers = _job(client, console, "classify", classification_spec(data, trained.id))
    # The same seed makes the same new head as the training above started from; one step at a
    # vanishing learning rate leaves it as it is.
    untrained = _job(client, console, "untrained head", untrained_spec(data))
    baseline = _job(client, console, "classify", classification_spec(data, untrained.id))
    console.print(accuracy_table(client, data / "glosses-heldout.jsonl", answers.id, baseline.id))

    console.rule("3 · generate with SmolLM2-135M-Instruct, batched", align="left")
    generated = _job(client, console, "generate", generation_spec(data))
    _print_answers(client, console, data / "prompts.jsonl", generated)

    console.rule("4 · where everything is", align="left")
    _print_whereabouts(client, console, service, trained, (answers, generated))


def training_spec(data: Path) -> dict[str, Any]:
    """MiniLM on the glosses: 63 steps of 32, embeddings frozen (most of its parameters)."""
    return {
        "kind": "train",
        "name": "demo: topics of glosses",
        "task": "text-classification",
        "model": ENCODER,
        "data": {
            "train": str(data / "glosses-train.jsonl"),
            "validation": str(data / "glosses-validation.jsonl"),
        },
        "hyperparameters": {
            "epochs": 1,
            "batch_size": 32,
            "learning_rate": 3e-4,
            "warmup_ratio": 0.1,
            "freeze": ["*embeddings*"],
            "max_length": 96,
        },
        "checkpoint": {"every_steps": 20},
        "resources": {"devices": 2},
    }


def untrained_spec(data: Path) -> dict[str, Any]:
    """The encoder under its new head as training finds it, published like any trained model."""
    spec = training_spec(data)
    spec["name"] = "demo: untrained head"
    spec["data"] = {"train": spec["data"]["train"]}
    spec["hyperparameters"] |= {"max_steps": 1, "learning_rate": 1e-12, "warmup_ratio": None}
    spec["resources"] = {"devices": 1}
    del spec["checkpoint"]
    return spec


def classification_spec(data: Path, job_id: str) -> dict[str, Any]:
    return {
        "kind": "infer",
        "name": "demo: classify held-out glosses",
        "task": "text-classification",
        "model": f"job:{job_id}",
        "input": str(data / "glosses-heldout.jsonl"),
        "batch_size": 32,
        "shard_rows": 100,
    }


def generation_spec(data: Path) -> dict[str, Any]:
    return {
        "kind": "infer",
        "name": "demo: answer prompts",
        "task": "text-generation",
        "model": GENERATOR,
        "input": str(data / "prompts.jsonl"),
        "generation": {"max_new_tokens": 40},
        "shard_rows": 8,
    }


def _job(client: Client, console: Console, title: str, spec: Mapping[str, Any]) -> JobDetail:
    """Submit, show progress, and wait; or find the same job of an earlier run.

    Raises:
        JobFailed: it failed.
    """
    job = _submit_once(client, spec)
    if job.state is JobState.SUCCEEDED:
        _tick(console, f"{title}: done by an earlier run")
        return job
    with _progress(console, title) as show:
        job = client.wait(job.id, on_progress=show)
    started = job.started_at or job.created_at
    took = ((job.finished_at or started) - job.created_at).total_seconds()
    _tick(console, f"{title}: {render.duration(took)}")
    return job


def _submit_once(client: Client, spec: Mapping[str, Any]) -> JobDetail:
    """A new job, or an earlier run's that is good or still going on."""
    digest = hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()[:20]
    for number in itertools.count(1):
        key = f"demo-{digest}-{number}"
        try:
            job = client.submit(spec, idempotency_key=key, upload=True)
        except IdempotencyMismatch:
            continue  # of another version of gpuyard, which understood the same spec differently
        if job.state not in (JobState.FAILED, JobState.CANCELLED):
            return job
    raise AssertionError("the numbers do not end")


@contextmanager
def _progress(console: Console, title: str) -> Iterator[Any]:
    """A bar of the steps or rows of one job; nothing where output goes to no terminal."""
    progress = Progress(
        SpinnerColumn(),
        TextColumn(f"{title:<14}"),
        BarColumn(bar_width=30),
        TextColumn("{task.fields[remark]}", markup=False),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    with progress:
        bar = progress.add_task(title, total=None, remark="")

        def show(job: JobDetail) -> None:
            done, total = 0, None
            if job.rows_total:
                done, total = job.rows_done or 0, job.rows_total
            elif job.progress is not None:
                done, total = job.progress.step, job.progress.total_steps
            remark = render.remark(job) or render.pace(job) or str(job.state)
            progress.update(bar, completed=done, total=total, remark=remark)

        yield show


def accuracy_table(client: Client, heldout: Path, trained: str, untrained: str) -> Table:
    """Accuracy of both jobs on the same rows, beside that of the commonest label."""
    labels = [json.loads(line)["label"] for line in heldout.read_text().splitlines()]
    table = Table("on 600 held-out glosses, 10 topics", "accuracy", box=None, padding=(0, 2))
    majority = Counter(labels).most_common(1)[0][1] / len(labels)
    table.add_row("majority class", f"{majority:.3f}")
    table.add_row("untrained head", f"{accuracy(client, untrained, labels):.3f}")
    table.add_row("fine-tuned", f"{accuracy(client, trained, labels):.3f}", style="bold")
    return table


def accuracy(client: Client, job_id: str, labels: list[str]) -> float:
    """Share of rows whose label is right; a row with an error is wrong."""
    right = sum(
        1
        for row in client.rows(job_id)
        if row["output"] is not None and row["output"]["label"] == labels[row["row"]]
    )
    return right / len(labels)


def _print_answers(client: Client, console: Console, prompts: Path, job: JobDetail) -> None:
    asked = [json.loads(line) for line in prompts.read_text().splitlines()]
    rows = list(client.rows(job.id))
    tokens = sum(row["usage"]["output_tokens"] for row in rows)
    for row in rows[:3] + rows[-3:]:
        question = asked[row["row"]]
        text = question.get("prompt") or question["messages"][-1]["content"]
        answer = row["output"]["text"] if row["output"] else row["error"]["message"]
        console.print(Text(f"  {text}", "bold"), Text(f"    {' '.join(answer.split())}"), sep="\n")
    console.print(f"  … {len(rows)} answers, {tokens} tokens")


def _describe(job: JobDetail) -> str:
    metrics = (job.summary or {}).get("metrics") or {}
    parts = [f"{name} {value:.3f}" for name, value in metrics.items() if isinstance(value, float)]
    return f"validation {', '.join(parts)}" if parts else "trained"


def _print_whereabouts(
    client: Client,
    console: Console,
    service: RunningStack,
    trained: JobDetail,
    batches: Sequence[JobDetail],
) -> None:
    instance, data = service.instance, service.data
    # Commands find a local stack by its data folder; only another than the usual one has to be said.
    prefix = "" if data == data_folder() else f"GPUYARD_DATA={data} "
    prefix += "" if shutil.which("gpuyard") else f"{_relative(Path(sys.executable).parent)}/"
    checkpoints = client.checkpoints(trained.id)
    model = next((a for a in client.artifacts(trained.id) if a.name.endswith(".safetensors")), None)
    lines = [
        ("start it again", f"{prefix}gpuyard up"),
        ("API", f"{instance.url}/docs  (key in {instance.api_key_file})"),
        (
            "Flower",
            f"{instance.flower_url or 'switched off'}  (user {instance.flower_user}, password in "
            f"{instance.flower_password_file})",
        ),
        *(("results", f"{prefix}gpuyard results {job.id}") for job in batches),
        ("checkpoint", str(data / checkpoints[0].path) if checkpoints else "none"),
        ("trained model", f"model: job:{trained.id} in a spec"),
        ("", str(data / model.path) if model is not None else ""),
        (
            "your own job",
            f"{prefix}gpuyard submit {_relative(EXAMPLES / 'fine-tune.yaml')} --wait",
        ),
        ("logs", str(data / "logs")),
    ]
    for name, value in lines:
        console.print(Text.assemble((f"  {name:<16}", "dim"), value), soft_wrap=True)


def _devices() -> str:
    """Two devices at least: GPUs where there are two, else CPU slots (beside one GPU)."""
    count = len(list(Path("/dev").glob("nvidia[0-9]*")))
    return "gpu:all" if count >= 2 else "gpu:all,cpu:2" if count == 1 else "cpu:2"


def _relative(path: Path) -> Path:
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def _tick(console: Console, text: str) -> None:
    # Text, not markup: the command line's console takes none, as names are other people's.
    console.print(Text.assemble(("  ✓ ", "green"), text), soft_wrap=True)


def _seconds(began: float) -> str:
    return render.duration(time.monotonic() - began)
