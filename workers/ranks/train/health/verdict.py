"""Who hangs, as a pure function of what a rank that waits sees of the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

_MEDIANS = 20
_FIRST_STEPS = 10
_BETWEEN = 25
_ALONE = 5


@dataclass(frozen=True, slots=True)
class Limits:
    """How long a rank that waits has patience, in seconds."""

    silent: float
    """With one that gives no sign of life at all: its process is stopped, or its host is gone."""
    step: float
    """With one that is in a step; the first ones may load and compile what later ones have."""
    between: float
    """With one that evaluates or writes a checkpoint."""
    alone: float
    """With a step of its own, for which nobody else waits."""


def limits(hung_after: float, median_step: float | None) -> Limits:
    """``hung_after`` is the least of them; ``median_step`` None: too few steps are done to say."""
    first = median_step is None
    step = hung_after * _FIRST_STEPS if first else max(hung_after, _MEDIANS * (median_step or 0.0))
    return Limits(hung_after, step, max(step, hung_after * _BETWEEN), step * _ALONE)


@dataclass(frozen=True, slots=True)
class Seen:
    """What a rank that waits knows of another one."""

    rank: int
    device: str
    silent: float
    """Seconds without a sign of life."""
    in_step: bool = True
    waiting: bool = False
    seconds: float = 0.0
    """So long it has been at what it is at."""


@dataclass(frozen=True, slots=True)
class Hung:
    """The rank that did not arrive, and what tells of it."""

    rank: int
    device: str
    why: str


def find_hung(here: float, waiting: bool, others: Sequence[Seen], limit: Limits) -> Hung | None:
    """The first rank for which another one need wait no longer, that has been ``here``, at one place, for
    so many seconds; ``waiting``: as far as it knows, for the others. With a model in shards it waits for
    them in the middle of its own work as well, and does not know.

    A rank that is alive and waits as well is no cause. Where all wait, the connection between them is,
    and its own time limit ends it.
    """
    for other in others:
        if min(here, other.silent) > limit.silent:
            return Hung(
                other.rank,
                other.device,
                f"gave no sign of life for {other.silent:.0f} s: its process is stopped, or its host "
                "is gone",
            )
    for other in others if waiting else ():
        patience = limit.step if other.in_step else limit.between
        if not other.waiting and min(here, other.seconds) > patience:
            where = "in its part of a step" if other.in_step else "between two steps"
            return Hung(
                other.rank,
                other.device,
                f"has been {where} for {other.seconds:.0f} s, and the others wait for it",
            )
    return None
