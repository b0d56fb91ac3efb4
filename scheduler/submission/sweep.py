"""Submission of a sweep: all of its trials are checked before any of them is stored."""

from __future__ import annotations

from typing import Any

from scheduler.submission.submit import Known, check_key, refuse_unstorable, resolve
from shared.errors import InvalidRequest
from shared.messages import Shard
from shared.resolved import Resolved
from shared.settings import Settings
from shared.store import Store
from shared.store.sweeps import find_sweep_by_key, insert_sweep
from shared.sweeps import Trial, parse_sweep, plan
from shared.tables import Sweep


def submit_sweep(
    store: Store,
    settings: Settings,
    raw: Any,
    idempotency_key: str | None = None,
    created_by: str | None = None,
) -> tuple[Sweep, bool]:
    """Validate a sweep and insert it with the jobs of its trials.

    Reads files: call it in a thread. No database session is open while it does.

    Returns:
        The sweep, and whether it is new; a repeated idempotency key gives the first one.

    Raises:
        InvalidRequest: any of its subclasses; names the trial. Nothing was stored.
        IdempotencyMismatch: the key was used for another sweep.
        Unavailable: Postgres cannot be reached.
    """
    check_key(idempotency_key)
    sweep, owner = parse_sweep(raw), created_by or ""
    refuse_unstorable(sweep.model_dump(mode="json"))
    trials = plan(sweep)
    if idempotency_key is not None:
        first = store.call(find_sweep_by_key, owner, idempotency_key, sweep)
        if first is not None:
            return first, False
    known = Known()
    resolved = [(trial, *_resolve(store, settings, trial, known)) for trial in trials]
    return store.call(
        insert_sweep,
        sweep,
        resolved,
        idempotency_key=idempotency_key,
        created_by=owner,
    )


def _resolve(
    store: Store, settings: Settings, trial: Trial, known: Known
) -> tuple[Resolved, tuple[Shard, ...]]:
    try:
        return resolve(store, settings, trial.spec, known=known)
    except InvalidRequest as error:
        error.message = f"trial {trial.number}: {error.message}"
        raise
