"""Calls that submit jobs, look at them, wait for them and run them again."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gpuyard.addresses import at
from gpuyard.calls.files import FileCalls
from gpuyard.errors import JobFailed, WaitTimedOut
from gpuyard.references import with_uploads
from gpuyard.transfer import OnBytes
from gpuyard.waiting import looks
from shared.lifecycle import JobState
from shared.specs import InferSpec, TrainSpec, parse_spec
from shared.views import JobDetail, JobView


class JobCalls(FileCalls):
    def submit(
        self,
        spec: Mapping[str, Any] | TrainSpec | InferSpec,
        *,
        idempotency_key: str | None = None,
        upload: bool = False,
        bases: Sequence[Path] = (),
        on_bytes: OnBytes | None = None,
    ) -> JobDetail:
        """Submit a job, once: the request carries an idempotency key, one of its own if none is given,
        so it is safely repeated until an answer arrives.

        With ``upload``, files that the spec names and that exist here (from the current folder, else
        from one of ``bases``) are uploaded first; what the service has already is not sent again.

        Raises:
            InvalidSpec: before anything is sent.
            IdempotencyMismatch: the key was used for another spec.
        """
        data = (
            spec.model_dump(mode="json", exclude_unset=True) | {"kind": spec.kind}
            if isinstance(spec, TrainSpec | InferSpec)
            else dict(spec)
        )
        parse_spec(data)
        if upload:
            data = with_uploads(data, lambda path: self._uploaded_id(path, on_bytes), bases)
        answer = self._transport.request(
            "POST",
            "/v1/jobs",
            json=data,
            headers={"Idempotency-Key": idempotency_key or secrets.token_hex(16)},
        )
        return self._transport.read(answer, JobDetail)

    def job(self, id: str) -> JobDetail:
        """A job with its spec, its attempts, and why it waits or failed."""
        return self._transport.get(at("jobs", id), JobDetail)

    def jobs(
        self,
        *,
        state: JobState | str | Iterable[JobState | str] | None = None,
        kind: str | None = None,
        name: str | None = None,
    ) -> Iterator[JobView]:
        """All jobs, newest first, fetched page by page as they are asked for."""
        states = [state] if isinstance(state, str) else list(state or ())
        return self._pages(
            "/v1/jobs", JobView, state=[str(s) for s in states] or None, kind=kind, name=name
        )

    def cancel(self, id: str, reason: str = "by the user") -> JobDetail:
        """Cancel a job; of one that is over or being cancelled already, nothing changes.

        The answer's state tells: ``cancelled`` at once, or ``cancelling`` until its ranks are gone.
        """
        answer = self._transport.request("POST", at("jobs", id, "cancel"), json={"reason": reason})
        return self._transport.read(answer, JobDetail)

    def wait(
        self,
        id: str,
        timeout: float | None = None,
        on_progress: Callable[[JobDetail], None] | None = None,
        *,
        raise_on_failure: bool = True,
        poll_seconds: float = 0.5,
    ) -> JobDetail:
        """Wait until the job is over, also through minutes in which the API is away.

        ``on_progress`` is called whenever the job looks different from before, and with its end.

        Raises:
            JobFailed: it failed or was cancelled (unless ``raise_on_failure`` is false).
            WaitTimedOut: it was not over after ``timeout`` seconds; it goes on.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        seen: JobDetail | None = None
        for job in looks(lambda: self.job(id), every=poll_seconds):
            if isinstance(job, JobDetail) and job != seen:
                seen = job
                if on_progress is not None:
                    on_progress(job)
            over = seen is not None and seen.state.terminal
            if (
                seen is not None
                and not over
                and deadline is not None
                and deadline < time.monotonic()
            ):
                raise WaitTimedOut(seen, timeout or 0.0)
        assert seen is not None  # noqa: S101 - the last look was the terminal job
        if raise_on_failure and seen.state is not JobState.SUCCEEDED:
            raise JobFailed(seen)
        return seen

    def retry(
        self,
        id: str,
        *,
        failed: bool = False,
        changes: Mapping[str, Any] | None = None,
        idempotency_key: str | None = None,
    ) -> JobDetail:
        """Submit a job that is over once more; ``failed``: only its rows that have an error, whose
        results carry the numbers that they had in the first input.

        ``changes`` are laid over the spec as a JSON merge patch (None takes a field away).

        Raises:
            Conflict: the job is not over, or no row of it failed.
            InvalidRequest: a training has no rows, or the spec is wrong with the changes.
        """
        answer = self._transport.request(
            "POST",
            at("jobs", id, "retry"),
            json={"failed": failed, "changes": dict(changes or {})},
            headers={"Idempotency-Key": idempotency_key or secrets.token_hex(16)},
        )
        return self._transport.read(answer, JobDetail)
