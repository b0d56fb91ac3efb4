"""The retry policy: what follows the end of an attempt. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from shared.lifecycle import FailureClass
from shared.specs import Retry

_FINAL = {
    FailureClass.USER_ERROR: "the same spec would fail the same way",
    FailureClass.DATA_ERROR: "the same data would fail the same way",
    FailureClass.CANCELLED: "the job was cancelled",
    FailureClass.DEADLINE: "its time limit was reached",
}
_FREE = frozenset({FailureClass.PREEMPTED, FailureClass.UNCLAIMED})
"""Ends in which the job was not at fault and nothing broke in it: they cost no try."""
MAX_BACKOFF = 300.0
MAX_OUT_OF_MEMORY = 2


@dataclass(frozen=True, slots=True)
class End:
    """How an attempt ended."""

    failure_class: FailureClass
    micro_batch: int | None = None
    """Of the attempt, where memory had run out with a larger one before."""
    progressed: bool = False
    """It left something durable that no attempt before it had: a further checkpoint, or results."""


@dataclass(frozen=True, slots=True)
class LessAtOnce:
    """What can be done about memory that ran out in a training."""

    held: int
    """Rows that a rank held when it ran out."""
    micro_batch: int
    """Rows that it is to hold next."""


@dataclass(frozen=True, slots=True)
class TryAgain:
    after_seconds: float
    reason: str
    micro_batch: int | None = None
    """What the next attempt is to hold at once, where it is less than before."""


@dataclass(frozen=True, slots=True)
class GiveUp:
    reason: str


def decide(policy: Retry, ends: Sequence[End], less: LessAtOnce | None = None) -> TryAgain | GiveUp:
    """What follows the newest of ``ends`` (oldest first, one per ended attempt of the job).

    User and data errors, cancellation and deadlines are final. A training that ran out of memory goes
    on at once with ``less``, and that costs no try: each time it is half at most, so it comes to an end.
    Where there is nothing less, out of memory is tried once more, in case something else held the
    memory; not after smaller ones were tried. Everything else is tried again until ``max_attempts`` have
    failed in a row; preemptions and unclaimed attempts count for nothing. The row ends with an attempt that
    brought the job on, and a failure of that one is a first one: a run of weeks may lose as many hosts as it
    likes as long as it gets further between, and comes to an end because it does.

    The first failure is followed at once: what broke by chance does not break again. More in a row
    wait, twice as long with each, so that a job that breaks wherever it goes does not spin. Memory that
    something else holds always gets the wait.
    """
    newest = ends[-1].failure_class
    if newest in _FINAL:
        return GiveUp(f"{newest}: {_FINAL[newest]}")
    if newest in _FREE:
        return TryAgain(0.0, f"{newest}: costs no try")
    if newest is FailureClass.OUT_OF_MEMORY and less is not None:
        return TryAgain(0.0, f"{newest} {_how(less)}; costs no try", less.micro_batch)
    row = _row(ends)
    if newest is FailureClass.OUT_OF_MEMORY and row.of(newest) >= MAX_OUT_OF_MEMORY:
        return GiveUp(f"{newest}: it ran out of memory {MAX_OUT_OF_MEMORY} times or more")
    if row.failures >= policy.max_attempts:
        return GiveUp(f"{newest}: all {policy.max_attempts} attempts{row.since} are used up")
    failed = f"{newest}: failure {row.failures} of {policy.max_attempts} in a row"
    if row.failures == 1 and row.since:
        failed = f"{newest}: the first failure{row.since}"
    waits = max(row.failures - 1, int(newest is FailureClass.OUT_OF_MEMORY))
    if waits == 0:
        return TryAgain(0.0, failed)
    return TryAgain(min(policy.backoff_seconds * 2 ** min(waits - 1, 30), MAX_BACKOFF), failed)


def _how(less: LessAtOnce) -> str:
    rows = "1 row" if less.held == 1 else f"{less.held} rows"
    return f"with {rows} at once: next with {less.micro_batch}, the global batch stays what it is"


def _costs_a_try(ends: Sequence[End]) -> list[bool]:
    """Of each end: not if it is free, nor if it was a lack of memory that the next attempt answered
    with a smaller micro-batch."""
    following = [*ends[1:], ends[-1]]
    return [
        end.failure_class not in _FREE
        and not (
            end.failure_class is FailureClass.OUT_OF_MEMORY and after.micro_batch != end.micro_batch
        )
        for end, after in zip(ends, following, strict=True)
    ]


@dataclass(frozen=True, slots=True)
class _Row:
    """The ends since the job last got further, that of the attempt that brought it on included."""

    ends: Sequence[End]
    failures: int
    """Those that cost a try."""

    def of(self, failure_class: FailureClass) -> int:
        return sum(end.failure_class is failure_class for end in self.ends)

    @property
    def since(self) -> str:
        return " since the job got further" if self.ends[0].progressed else ""


def _row(ends: Sequence[End]) -> _Row:
    first = max((at for at, end in enumerate(ends) if end.progressed), default=0)
    return _Row(ends[first:], sum(_costs_a_try(ends)[first:]))
