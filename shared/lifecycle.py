"""The life of a job and of an attempt: states, legal transitions, and who makes each.

``JOB_TRANSITIONS`` and ``ATTEMPT_TRANSITIONS`` are the whole truth: the store has one function per
row, guarded by state, attempt and fencing token; a property test proves that nothing else is
reachable; the CHECKs of the tables repeat the states.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Generic, TypeVar

S = TypeVar("S", bound=StrEnum)


class JobState(StrEnum):
    QUEUED = "queued"
    """Waits for admission and placement. The scheduler moves it on (dispatch), or the API (cancel)."""
    DISPATCHED = "dispatched"
    """Has an attempt with devices reserved; hints are out. A worker's claim moves it on, or the
    scheduler takes it back when nobody claims in time."""
    RUNNING = "running"
    """Every rank is claimed, but for those that a batch job is given while it runs. The workers move it
    on by reporting the end, or the scheduler by rescue once the lease ran out."""
    CANCELLING = "cancelling"
    """A user cancelled while an attempt was out. The worker moves it on once all ranks are ended,
    or the scheduler by rescue."""
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def terminal(self) -> bool:
        """Nobody moves the job on: it is over."""
        return self in (JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED)

    @property
    def active(self) -> bool:
        """An attempt is out."""
        return self in (JobState.DISPATCHED, JobState.RUNNING, JobState.CANCELLING)


class AttemptState(StrEnum):
    DISPATCHED = "dispatched"
    """Committed with its leases; not every rank is claimed yet."""
    RUNNING = "running"
    """Every rank is claimed and its lease is renewed."""
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    """Ended by a classified failure, reported by a worker."""
    CANCELLED = "cancelled"
    LOST = "lost"
    """Ended by the scheduler: nobody claimed it, or a lease ran out."""

    @property
    def terminal(self) -> bool:
        return self not in (AttemptState.DISPATCHED, AttemptState.RUNNING)


class LeaseState(StrEnum):
    """The right of one rank to one device. Unreleased ones reserve their device."""

    RESERVED = "reserved"
    """Made at dispatch, or when a batch job grows. A worker's claim moves it to held; the end of the
    attempt releases it."""
    HELD = "held"
    """Renewed by its worker. Released by that worker once the rank's processes are gone, by the
    scheduler once it ran out, or when its device registers anew."""
    RELEASED = "released"


class FailureClass(StrEnum):
    """Why an attempt ended. The retry policy decides by it."""

    USER_ERROR = "user_error"
    DATA_ERROR = "data_error"
    OUT_OF_MEMORY = "out_of_memory"
    LOST_DEVICE = "lost_device"
    LOST_WORKER = "lost_worker"
    PREEMPTED = "preempted"
    CANCELLED = "cancelled"
    DEADLINE = "deadline"
    INFRASTRUCTURE = "infrastructure"
    UNCLAIMED = "unclaimed"
    """No worker took it in time (the broker was down, the device vanished): it never started."""


@dataclass(frozen=True, slots=True)
class Transition(Generic[S]):
    """One legal step. ``by`` names the store function that makes it, ``who`` the part that calls it."""

    source: S
    target: S
    by: str
    who: str
    why: str


_J = JobState
JOB_TRANSITIONS: tuple[Transition[JobState], ...] = (
    Transition(_J.QUEUED, _J.DISPATCHED, "dispatch_attempt", "scheduler", "devices were found"),
    Transition(_J.QUEUED, _J.CANCELLED, "cancel_job", "api", "the user cancelled it"),
    Transition(_J.QUEUED, _J.FAILED, "fail_queued_job", "scheduler", "it can never run"),
    Transition(_J.DISPATCHED, _J.RUNNING, "claim_rank", "worker", "the last rank was claimed"),
    Transition(_J.DISPATCHED, _J.CANCELLED, "cancel_job", "api", "no rank was claimed yet"),
    Transition(_J.DISPATCHED, _J.CANCELLING, "cancel_job", "api", "the user cancelled it"),
    Transition(_J.DISPATCHED, _J.QUEUED, "fail_rank", "worker", "it is tried again"),
    Transition(_J.DISPATCHED, _J.QUEUED, "lose_rank", "worker, scheduler", "it is tried again"),
    Transition(_J.DISPATCHED, _J.FAILED, "fail_rank", "worker", "no retry is left"),
    Transition(_J.DISPATCHED, _J.FAILED, "lose_rank", "worker, scheduler", "no retry is left"),
    Transition(_J.RUNNING, _J.SUCCEEDED, "finish_rank", "worker", "every rank succeeded"),
    Transition(
        _J.RUNNING,
        _J.SUCCEEDED,
        "lose_rank",
        "worker, scheduler",
        "the last rank of a batch job was lost after the last row",
    ),
    Transition(_J.RUNNING, _J.CANCELLING, "cancel_job", "api", "the user cancelled it"),
    Transition(_J.RUNNING, _J.QUEUED, "fail_rank", "worker", "it is tried again"),
    Transition(_J.RUNNING, _J.QUEUED, "lose_rank", "worker, scheduler", "it is tried again"),
    Transition(_J.RUNNING, _J.FAILED, "fail_rank", "worker", "no retry is left"),
    Transition(_J.RUNNING, _J.FAILED, "lose_rank", "worker, scheduler", "no retry is left"),
    Transition(_J.CANCELLING, _J.CANCELLED, "leave_attempt", "worker", "the last rank is gone"),
    Transition(
        _J.CANCELLING,
        _J.CANCELLED,
        "finish_rank",
        "worker",
        "the last rank had finished, others left",
    ),
    Transition(_J.CANCELLING, _J.CANCELLED, "fail_rank", "worker", "its attempt ended"),
    Transition(_J.CANCELLING, _J.CANCELLED, "lose_rank", "worker, scheduler", "its attempt ended"),
    Transition(
        _J.CANCELLING,
        _J.SUCCEEDED,
        "finish_rank",
        "worker",
        "it had finished before the order came",
    ),
)

_A = AttemptState
ATTEMPT_TRANSITIONS: tuple[Transition[AttemptState], ...] = (
    Transition(_A.DISPATCHED, _A.RUNNING, "claim_rank", "worker", "the last rank was claimed"),
    Transition(_A.DISPATCHED, _A.FAILED, "fail_rank", "worker", "a rank failed at its start"),
    Transition(_A.DISPATCHED, _A.CANCELLED, "cancel_job", "api", "no rank was claimed yet"),
    Transition(_A.DISPATCHED, _A.CANCELLED, "leave_attempt", "worker", "cancelled, ranks are gone"),
    Transition(_A.DISPATCHED, _A.CANCELLED, "finish_rank", "worker", "cancelled, ranks are gone"),
    Transition(_A.DISPATCHED, _A.LOST, "lose_rank", "worker, scheduler", "nobody took or kept it"),
    Transition(_A.RUNNING, _A.SUCCEEDED, "finish_rank", "worker", "every rank succeeded"),
    Transition(
        _A.RUNNING, _A.SUCCEEDED, "lose_rank", "worker, scheduler", "lost after the last row"
    ),
    Transition(_A.RUNNING, _A.FAILED, "fail_rank", "worker", "a rank failed"),
    Transition(_A.RUNNING, _A.CANCELLED, "leave_attempt", "worker", "cancelled, ranks are gone"),
    Transition(_A.RUNNING, _A.CANCELLED, "finish_rank", "worker", "cancelled, ranks are gone"),
    Transition(_A.RUNNING, _A.LOST, "lose_rank", "worker, scheduler", "a lease ran out"),
)

_LEGAL_JOB = {(t.source, t.target) for t in JOB_TRANSITIONS}
_LEGAL_ATTEMPT = {(t.source, t.target) for t in ATTEMPT_TRANSITIONS}


def job_may_become(source: JobState, target: JobState) -> bool:
    return (source, target) in _LEGAL_JOB


def attempt_may_become(source: AttemptState, target: AttemptState) -> bool:
    return (source, target) in _LEGAL_ATTEMPT


def job_states_leading_to(target: JobState) -> frozenset[JobState]:
    """The states a guarded UPDATE to ``target`` may start from."""
    return frozenset(s for s, t in _LEGAL_JOB if t is target)
