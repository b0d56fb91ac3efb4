"""Store calls that must be answered, however long Postgres is away."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Concatenate, ParamSpec, TypeVar

from sqlmodel import Session

from shared.errors import Unavailable
from shared.store import Store

log = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")


class GivenUp(Exception):
    """Nobody waits for the answer any more."""


class Insistent:
    """Calls store functions again until Postgres answers, or ``give_up`` is set.

    Every function called through this is guarded, so a call whose answer was lost may be repeated.
    """

    def __init__(self, store: Store, give_up: threading.Event) -> None:
        self._store = store
        self._give_up = give_up
        self.repeated = 0
        """How many calls went unanswered so far: the one before an answer may have counted."""

    def call(
        self, function: Callable[Concatenate[Session, P], R], *args: P.args, **kwargs: P.kwargs
    ) -> R:
        """Raises: GivenUp: ``give_up`` was set before Postgres answered."""
        pause, since = 0.1, time.monotonic()
        while True:
            try:
                return self._store.call(function, *args, **kwargs)
            except Unavailable as error:
                self.repeated += 1
                if pause == 0.1:
                    log.warning("%s: %s; trying on", function.__name__, error)
            if self._give_up.wait(pause):
                raise GivenUp(f"{function.__name__}: after {time.monotonic() - since:.0f} s")
            pause = min(2 * pause, 1.0)
