"""The labels of the training data: found by rank 0, once for all attempts and jobs on the same file."""

from __future__ import annotations

import contextlib
import hashlib
import json
import secrets
from pathlib import Path

from shared.formats import DataFile
from shared.messages import TrainAssignment
from shared.specs import TrainSpec
from workers.ranks.checkpoint import digest
from workers.ranks.train.gang import Gang
from workers.ranks.train.reading import training_file
from workers.ranks.train.reports import Reporter
from workers.ranks.train.rows import find_labels
from workers.ranks.train.tasks.base import NOT_READ

_FORMAT = 1
_POLL_SECONDS = 0.1


def share_labels(
    assignment: TrainAssignment, gang: Gang, reporter: Reporter
) -> tuple[str, ...] | None:
    """The labels as ``find_labels`` gives them, on every rank; None for a task that has none.

    Raises:
        DataProblem: on rank 0, as ``find_labels``.
        Stopped: the worker ordered it, or is gone.
    """
    if not assignment.spec.labels_needed:
        return None
    found: tuple[str, ...] = ()
    if gang.rank == 0:
        cache = None if assignment.cache_dir is None else Path(assignment.cache_dir) / "labels"
        found = _obtain(training_file(assignment), assignment.spec, cache)
    else:
        # Not by the store's own timeout: reading a large file may take hours.
        gang.wait_for("labels", lambda: reporter.check_orders(wait=_POLL_SECONDS))
    return tuple(gang.share("labels", list(found)))


def _obtain(file: DataFile, spec: TrainSpec, cache: Path | None) -> tuple[str, ...]:
    path = None
    if cache is not None:
        try:
            path = cache / f"{_key(file, spec)}.json"
            found = json.loads(path.read_bytes())
            if isinstance(found, list) and len(found) >= spec.labels_needed:
                return tuple(map(str, found))
        except (OSError, ValueError):
            pass  # not there, or damaged; a file that cannot be read is told below
    labels = find_labels(file, spec, at_least=spec.labels_needed)
    if path is not None:
        _keep(path, labels)
    return labels


def _key(file: DataFile, spec: TrainSpec) -> str:
    """Of all that decides about the labels of a file. Raises OSError where it cannot be read."""
    parts = {
        "format": [_FORMAT, file.format],
        "content": digest(file.path).sha256,
        "spec": spec.model_dump(mode="json", exclude=NOT_READ),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _keep(path: Path, labels: tuple[str, ...]) -> None:
    """Some hundred bytes, so none is ever deleted. What cannot be kept is found again."""
    aside = path.with_name(f".writing-{secrets.token_hex(8)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(json.dumps(list(labels)))
        aside.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            aside.unlink()
