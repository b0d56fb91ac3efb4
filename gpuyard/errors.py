"""Errors that only a client meets. All others are the tree of ``shared.errors``."""

from __future__ import annotations

from shared.errors import GpuyardError
from shared.lifecycle import FailureClass, JobState
from shared.views import JobDetail


class JobFailed(GpuyardError):
    """A job that was waited for ended, and not with success.

    ``failure_class`` says whose fault it was, ``code`` what it was, ``hint`` what to do about it;
    ``job`` is the job as it ended. A cancelled job comes with the class and code ``cancelled``.
    """

    code = "job_failed"
    exit_code = 1

    def __init__(self, job: JobDetail) -> None:
        failure = job.failure
        if failure is not None:
            super().__init__(failure.message, hint=failure.hint, code=failure.code)
            self.failure_class = failure.failure_class
        elif job.state is JobState.CANCELLED:
            super().__init__(f"{job.id} was cancelled", code="cancelled")
            self.failure_class = FailureClass.CANCELLED
        else:
            super().__init__(f"{job.id} {job.state}")
            self.failure_class = FailureClass.INFRASTRUCTURE
        self.job = job


class WaitTimedOut(GpuyardError, TimeoutError):
    """The job was not over in time. It goes on; ``job`` is how it stood."""

    code = "wait_timed_out"

    def __init__(self, job: JobDetail, timeout: float) -> None:
        super().__init__(
            f"{job.id} was still {job.state} after {timeout:g} s",
            hint="It goes on: wait again, or cancel it.",
        )
        self.job = job


class CorruptDownload(GpuyardError):
    """What arrived is not what the service has; nothing of it was kept."""

    code = "corrupt_download"
