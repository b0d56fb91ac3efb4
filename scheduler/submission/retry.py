"""A job once more: the same spec, with changes, over all of its rows or over those that failed."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scheduler.submission.paths import INLINE
from scheduler.submission.submit import Again, submit
from scheduler.submission.writing import write_lines
from shared.errors import Conflict, DataError, InvalidRequest
from shared.lifecycle import JobState
from shared.messages import Shard as ShardRange
from shared.resolved import ResolvedInput
from shared.rows import failed_rows, read_lines
from shared.settings import Settings
from shared.store import Store
from shared.store.ledger import row_totals
from shared.store.results import shards_by_row
from shared.store.retried import all_numbers
from shared.tables import Job, Shard

_OF_THE_INPUT = ("kind", "input", "rows", "format")
"""What is not to be changed where rows of the input are run again."""


@dataclass(slots=True)
class _Rows:
    """Rows that failed, and what is known of them once they were all written."""

    path: Path
    numbers: array[int]


def retry(
    store: Store,
    settings: Settings,
    job: Job,
    *,
    failed: bool,
    changes: dict[str, Any],
    idempotency_key: str | None = None,
    created_by: str | None = None,
) -> tuple[Job, bool]:
    """Submit ``job`` again; ``failed``: only its rows that have an error, with their row numbers.

    Reads files: call it in a thread.

    Args:
        changes: Laid over the spec as a JSON merge patch (RFC 7396): null takes a field away.

    Returns:
        The new job, and whether it is new; see ``submit``.

    Raises:
        Conflict: the job is not over, or no row of it failed.
        InvalidRequest: any of its subclasses: a training has no rows, the changes do not go with rows that
            failed, or the spec is wrong with them.
    """
    if not JobState(job.state).terminal:
        raise Conflict(
            f"{job.id} is {job.state}: only a job that is over can be run again",
            param="job_id",
            hint="Wait for its end, or cancel it first.",
        )
    spec = merged(job.spec, changes)
    numbers: array[int] | None = None
    if failed:
        _refuse_other_rows(job, spec, changes)
        rows = _write_failed_rows(store, settings, job)
        numbers = rows.numbers
        spec |= {"input": str(rows.path), "rows": None, "format": "jsonl"}
    elif all(spec.get(name) == job.spec.get(name) for name in _OF_THE_INPUT):
        numbers = store.call(all_numbers, job.id)
    return submit(store, settings, spec, idempotency_key, created_by, Again(job.id, numbers))


def merged(spec: Any, changes: Any) -> Any:
    """``spec`` with a JSON merge patch over it."""
    if not isinstance(changes, dict):
        return changes
    found = dict(spec) if isinstance(spec, dict) else {}
    for name, value in changes.items():
        if value is None:
            found.pop(name, None)
        else:
            found[name] = merged(found.get(name), value)
    return found


def _refuse_other_rows(job: Job, spec: dict[str, Any], changes: dict[str, Any]) -> None:
    if job.kind != "infer":
        raise InvalidRequest(
            f"{job.id} is a training and has no rows that failed",
            param="failed",
            hint=f"`gpuyard retry {job.id}` runs all of it again.",
        )
    for name in _OF_THE_INPUT:
        if name in changes:
            raise InvalidRequest(
                f"the rows that failed are those of {job.id}: '{name}' cannot be changed",
                param=name,
                hint="Submit a new job, or run all of it again without `failed`.",
            )
    found = ResolvedInput.model_validate(job.resolved["inputs"]["input"])
    moved = [name for name in ("task", "text_column") if spec.get(name) != job.spec.get(name)]
    if moved and found.format != "jsonl":
        raise InvalidRequest(
            f"of the {found.format} input only the columns that {job.id} reads were kept: "
            f"'{moved[0]}' cannot be changed",
            param=moved[0],
            hint="Run all of it again without `failed`, or submit a new job.",
        )


def _write_failed_rows(store: Store, settings: Settings, job: Job) -> _Rows:
    totals = store.call(row_totals, job.id)
    if not totals["errors"]:
        left = totals["rows"] - totals["done"]
        never = f"{left} rows were never computed; " if left else ""
        raise Conflict(
            f"no row of {job.id} failed",
            param="failed",
            hint=f"{never}`gpuyard retry {job.id}` runs all of its rows again.",
        )
    found = ResolvedInput.model_validate(job.resolved["inputs"]["input"])
    own = store.call(all_numbers, job.id)
    rows: array[int] = array("q")
    try:
        path = write_lines(
            settings.data / INLINE, _failed_lines(store, job, settings.data / found.path, rows)
        )
    except OSError as error:
        raise DataError(
            f"the input of {job.id} cannot be read any more: {error.strerror}", param="job_id"
        ) from None
    except ValueError as error:
        raise DataError(
            str(error), param="job_id", code="input_changed", hint="Submit a new job."
        ) from None
    return _Rows(path, rows if own is None else array("q", (own[row] for row in rows)))


def _failed_lines(store: Store, job: Job, path: Path, rows: array[int]) -> Iterator[bytes]:
    """The lines of the rows that failed, as they were submitted; adds their numbers to ``rows``."""
    for shard in _failed_shards(store, job.id):
        failed = set(failed_rows(shard.results or b""))
        place = ShardRange(
            index=shard.index,
            first_row=shard.first_row,
            rows=shard.rows,
            offset=shard.offset,
            length=shard.length,
        )
        for row, line in read_lines(path, place):
            if row in failed:
                rows.append(row)
                yield line + b"\n"


def _failed_shards(store: Store, job_id: str) -> Iterator[Shard]:
    after = -1
    while shards := store.call(shards_by_row, job_id, after, failed=True):
        yield from shards
        after = shards[-1].first_row
