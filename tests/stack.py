"""What tests share that is no fixture: waiting for events with a deadline."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def eventually(
    predicate: Callable[[], T], within: float = 30.0, what: str | Callable[[], str] = ""
) -> T:
    """Poll until ``predicate()`` is true and return its value.

    An ``AssertionError`` in the predicate counts as "not yet" and is part of the message when the
    time (seconds) is over; any other exception is raised at once. ``what`` says what was waited
    for, as text or as a function that looks at the state of that moment.

    Raises:
        AssertionError: it did not become true in time.
    """
    deadline = time.monotonic() + within
    pause = 0.01
    while True:
        try:
            value = predicate()
            if value:
                return value
            reason = f"last answer: {value!r}"
        except AssertionError as error:
            reason = str(error)
        if time.monotonic() > deadline:
            said = what() if callable(what) else what or getattr(predicate, "__name__", "event")
            raise AssertionError(f"waited {within:g} s in vain for {said}; {reason}")
        time.sleep(pause)
        pause = min(pause * 1.5, 0.2)
