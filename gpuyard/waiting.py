"""Watching a job until it is over, through outages of the API."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from shared.errors import Unavailable
from shared.views import JobDetail

OUTAGE = 900.0
"""Seconds that the API may be away once it has answered: the job goes on meanwhile."""


def looks(
    look: Callable[[], JobDetail], *, every: float, outage: float = OUTAGE
) -> Iterator[JobDetail | Unavailable]:
    """The job every so many seconds; the last is terminal. An outage is yielded, too, each time.

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
            if job.state.terminal:
                return
        time.sleep(every)
