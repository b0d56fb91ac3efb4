"""Waiting for events in tests."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def eventually(predicate: Callable[[], T], *, within: float, what: str, every: float = 0.05) -> T:
    """Poll until ``predicate`` is truthy and return its value; fail after ``within`` seconds,
    saying ``what`` was waited for and what the last answer was."""
    deadline = time.monotonic() + within
    while True:
        answer = predicate()
        if answer:
            return answer
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {within:g} s for {what}; last answer: {answer!r}")
        time.sleep(every)
