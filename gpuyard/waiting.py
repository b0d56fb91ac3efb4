"""Watching a job until it is over, through outages of the API."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from shared.errors import Unavailable
from shared.views import JobDetail, SweepDetail

OUTAGE = 900.0
"""Seconds that the API may be away once it has answered: the job goes on meanwhile."""


Looked = TypeVar("Looked", JobDetail, SweepDetail)


def looks(
    look: Callable[[], Looked], *, every: float, outage: float = OUTAGE
) -> Iterator[Looked | Unavailable]:
    """The job (or sweep) every so many seconds; the last is over. An outage is yielded, too, each time.

    Raises:
        Unavailable: the API did not answer the first look, or was away for longer than ``outage``.
    """
    reached: float | None = None
    while True:
        try:
            job = look()
        except Unavailable as error:
            if reached is None or time.monotonic() - reached > outage:
                raise
            yield error
        else:
            reached = time.monotonic()
            yield job
            if job.over:
                return
        time.sleep(every)
