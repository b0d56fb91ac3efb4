"""The command ``submit``: a spec from a file, from flags, or both."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer

from gpuyard.cli import specs
from gpuyard.cli.command import command
from gpuyard.cli.session import Session
from gpuyard.cli.submitted import IdempotencyKey, Wait, tell
from gpuyard.cli.transfers import transfer_bar
from gpuyard.references import local_file, named_files
from shared.errors import DataError, InvalidRequest, PathNotAllowed


def register(app: typer.Typer) -> None:
    command(app)(submit)


def _options(panel: str) -> Callable[..., Any]:
    """Makes the options of one panel of the help."""

    def option(help: str | None, *names: str, **settings: Any) -> Any:
        return typer.Option(*names, help=help, rich_help_panel=panel, **settings)

    return option


_what, _data, _how, _where = (
    _options(panel) for panel in ("What", "Data", "How", "Where and when")
)


def submit(
    session: Session,
    spec: Annotated[
        str | None,
        typer.Argument(metavar="SPEC", help="YAML or JSON file, or - for stdin; flags go over it."),
    ] = None,
    *,
    kind: Annotated[str | None, _what("train or infer; mostly seen from the data.")] = None,
    task: Annotated[
        str | None, _what("text-classification, text-generation, embeddings, …")
    ] = None,
    model: Annotated[str | None, _what("Of the service, or job:<id>.", "--model", "-m")] = None,
    name: Annotated[str | None, _what("A label of your own.")] = None,
    train: Annotated[
        str | None, _data("What to train on: JSONL, CSV, TSV, Parquet or text.", metavar="FILE")
    ] = None,
    validation: Annotated[str | None, _data("And to evaluate on.", metavar="FILE")] = None,
    validation_split: Annotated[float | None, _data("Or this share of the first.")] = None,
    input: Annotated[
        str | None,
        _data("Of a batch job: JSONL, CSV, TSV, Parquet or text.", "--input", "-i", metavar="FILE"),
    ] = None,
    prompt: Annotated[
        list[str] | None, _data("A row, in place of --input. Repeatable.", "--prompt", "-p")
    ] = None,
    text_column: Annotated[str | None, _data("Where the text is.")] = None,
    label_column: Annotated[str | None, _data("Where the label is.")] = None,
    epochs: Annotated[int | None, _how("How often over the data.")] = None,
    max_steps: Annotated[int | None, _how("Ends training early.")] = None,
    batch_size: Annotated[int | None, _how("Over all ranks; or rows at once.")] = None,
    learning_rate: Annotated[float | None, _how("At its peak.", "--learning-rate", "--lr")] = None,
    seed: Annotated[int | None, _how("Of training, or of sampling.")] = None,
    max_new_tokens: Annotated[int | None, _how("Generated for a row, at most.")] = None,
    temperature: Annotated[float | None, _how("Of sampling; 0 is greedy.")] = None,
    settings: Annotated[
        list[str] | None,
        _how("Any field: hyperparameters.dropout=0.2. Repeatable.", "--set", metavar="FIELD=VALUE"),
    ] = None,
    devices: Annotated[
        str | None,
        _where("One rank each; 2-8: as many as are free.", "--devices", "-n", metavar="N"),
    ] = None,
    accelerator: Annotated[str | None, _where("auto, cpu or cuda.")] = None,
    memory_gb: Annotated[float | None, _where("Of each device; else estimated.")] = None,
    priority: Annotated[int | None, _where("-100 to 100; higher goes first.")] = None,
    time_limit: Annotated[float | None, _where("For one attempt.", metavar="SECONDS")] = None,
    fail_fast: Annotated[
        bool, _where("Refuse what the fleet of now cannot run.", "--fail-fast")
    ] = False,
    wait: Wait = False,
    idempotency_key: IdempotencyKey = None,
    upload: Annotated[
        bool, typer.Option(help="Upload the files that exist here, unless the service has them.")
    ] = True,
) -> None:
    """Submit a job and print its id.

    gpuyard submit fine-tune.yaml --wait

    gpuyard submit -m minilm --train train.jsonl --devices 2 --lr 3e-4

    gpuyard submit -m smollm2-135m-instruct -p "Why is the sky blue?" --wait
    """
    base = specs.read_spec(spec) if spec else {}
    infer = bool(input or prompt) or (kind or base.get("kind")) == "infer"
    generate = (task or base.get("task") or "text-generation") == "text-generation"
    column = text_column or base.get("text_column") or ("prompt" if generate else "text")
    flags: dict[str, Any] = {
        "kind": kind,
        "task": task or ("text-generation" if prompt and "task" not in base else None),
        "model": model,
        "name": name,
        "data.train": train,
        "data.validation": validation,
        "data.validation_split": validation_split,
        "input": input,
        "rows": [{column: text} for text in prompt or ()] or None,
        "text_column" if infer else "data.columns.text": text_column,
        "data.columns.label": label_column,
        "hyperparameters.epochs": epochs,
        "hyperparameters.max_steps": max_steps,
        "batch_size" if infer else "hyperparameters.batch_size": batch_size,
        "hyperparameters.learning_rate": learning_rate,
        "generation.seed" if infer else "hyperparameters.seed": seed,
        "generation.max_new_tokens": max_new_tokens,
        "generation.temperature": temperature,
        "resources.devices": specs.parse_devices(devices),
        "resources.accelerator": accelerator,
        "resources.memory_gb": memory_gb,
        "priority": priority,
        "timeout_seconds": time_limit,
        "fail_fast": fail_fast or None,
    }
    wanted = specs.build_spec(base, flags, settings or ())
    specs.check(wanted, None if not spec else "stdin" if spec == "-" else spec)
    # Relative files of a spec file are looked for here first, then beside it.
    bases = [Path(spec).parent] if spec and spec != "-" else []
    with ExitStack() as stack:
        on_bytes = stack.enter_context(transfer_bar(session, "uploading")) if upload else None
        try:
            job = session.client.submit(
                wanted,
                idempotency_key=idempotency_key,
                upload=upload,
                bases=bases,
                on_bytes=on_bytes,
            )
        except (DataError, PathNotAllowed) as error:
            raise _not_here_either(error, wanted, bases) from None
    tell(session, job, wait=wait)


def _not_here_either(
    error: InvalidRequest, spec: dict[str, Any], bases: list[Path]
) -> InvalidRequest:
    """``error`` with a hint where it is about a file that was not uploaded."""
    for field, reference in named_files(spec):
        if error.param == ".".join(field):
            if local_file(reference, bases) is None:
                error.hint = f"{reference} is no file here, so it was taken for one of the service."
            else:
                error.hint = "The file exists here: leave out --no-upload to upload it."
    return error
