"""Rings the doorbell: publishes due hints from the outbox to the broker.

The one module of the scheduler that imports Celery. A hint that could not be published stays due, so
an outage of the broker delays and loses nothing; a hint that was published and led to no claim is
due again after a while, so a broker that lost it loses nothing either.
"""

from __future__ import annotations

import logging
import time
from typing import Any

from celery import Celery
from kombu.exceptions import KombuError, OperationalError

from shared.broker import celery_config
from shared.messages import RUN_TASK, Hint
from shared.settings import Settings
from shared.store import Store
from shared.store.dispatch import due_hints, mark_published
from shared.tables import Outbox

log = logging.getLogger(__name__)

_SOCKET_TIMEOUT = 5.0
_CONNECT_TIMEOUT = 3.0
_BUDGET = 10.0
"""Seconds a call of ``publish_due`` may take before it leaves the rest to the next one."""
_MAX_PAUSE = 15.0


class Publisher:
    """One per scheduler process; used by one thread."""

    def __init__(self, settings: Settings) -> None:
        config = celery_config(settings)
        config["broker_transport_options"] |= {
            # Shorter than a worker's: the scheduler has other work to do than to wait for a broker.
            "socket_timeout": _SOCKET_TIMEOUT,
            "socket_connect_timeout": _CONNECT_TIMEOUT,
        }
        self._app = Celery("gpuyard.scheduler", set_as_current=False, config_source=config)
        self._again_after = settings.rering_every
        self._failures = 0
        self._not_before = 0.0

    def publish_due(self, store: Store) -> int:
        """Publish what is due; how many hints the broker took.

        While the broker is away this tries one hint at a time, at growing intervals.

        Raises:
            Unavailable: Postgres cannot be reached.
        """
        started = time.monotonic()
        if started < self._not_before:
            return 0
        published = 0
        for row in store.call(due_hints):
            if time.monotonic() - started > _BUDGET or not self._publish(row):
                break
            # Only now: a crash in between publishes it twice, which a claim sorts out.
            store.call(mark_published, row.attempt_id, row.rank, self._again_after)
            published += 1
        return published

    def close(self) -> None:
        self._app.close()

    def _publish(self, row: Outbox) -> bool:
        try:
            self._app.send_task(**task_call(row))
        except (OperationalError, KombuError, OSError) as error:
            self._failures += 1
            self._not_before = time.monotonic() + min(0.5 * 2**self._failures, _MAX_PAUSE)
            if self._failures == 1:
                log.warning("the broker cannot be reached, hints wait in the outbox: %s", error)
            return False
        if self._failures:
            log.info("the broker is back")
        self._failures, self._not_before = 0, 0.0
        if row.published:
            log.info("hint %s sent again to %s", row.hint["attempt_id"], row.queue)
        return True


def task_call(row: Outbox) -> dict[str, Any]:
    """A hint as the arguments of Celery's ``send_task``."""
    hint = Hint.model_validate(row.hint)
    return {
        "name": RUN_TASK,
        "kwargs": hint.model_dump(),
        "task_id": hint.task_id,
        "queue": row.queue,
        "priority": _broker_priority(row.priority),
        "retry": False,
        "declare": [],  # the default exchange needs no binding, and FLUSHALL would lose it
        "ignore_result": True,
        # What Flower shows: the kind and the model as name, the job in the arguments.
        "shadow": row.label,
        "argsrepr": f"({hint.job_id!r},)",
        "kwargsrepr": f"{{'rank': {hint.rank}, 'attempt': {hint.attempt_id!r}}}",
    }


def _broker_priority(priority: int) -> int:
    """Kombu's Redis transport reads the list of priority 0 first, then those of 3, 6 and 9."""
    if priority == 0:
        return 3
    return 0 if priority > 0 else 6
