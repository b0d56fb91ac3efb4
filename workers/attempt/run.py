"""The pipeline of one rank of one attempt: claim -> prepare -> run -> flush -> conclude."""

from __future__ import annotations

import logging
import threading
import time

from shared.lifecycle import FailureClass
from shared.messages import Hint
from shared.resolved import Resolved
from shared.store import Holder
from shared.store.claim import Claimed, Refusal, claim_rank
from shared.store.failures import device_mtbf
from shared.store.finish import (
    Failure,
    RowsLeft,
    fail_rank,
    finish_rank,
    leave_attempt,
    release_lease,
)
from shared.store.read import list_leases
from workers.attempt.folders import AttemptFolder
from workers.attempt.inbox import Inbox
from workers.attempt.inference import run_inference
from workers.attempt.insist import GivenUp, Insistent
from workers.attempt.keeper import LeaseKeeper
from workers.attempt.logs import LogTail
from workers.attempt.outcome import Cancelled, Failed, Finished, Outcome, Stale, failed
from workers.attempt.rendezvous import rank_host
from workers.attempt.reporter import Reporter
from workers.attempt.reports import ReportWriter
from workers.attempt.site import Site
from workers.attempt.training import run_training
from workers.launch import LaunchFailed

log = logging.getLogger(__name__)


def claim(site: Site, hint: Hint, give_up: threading.Event) -> Claimed | Refusal:
    """Take the rank that a hint is about, or learn why there is nothing to do.

    Raises:
        GivenUp: Postgres did not answer until this worker had to end.
    """
    store = Insistent(site.store, give_up)
    ttl = site.settings.lease_ttl
    answer = store.call(claim_rank, hint, site.device.id, site.worker_id, ttl)
    if answer is Refusal.CLAIMED and store.repeated:
        # The answer to our own claim may be what was lost: then this worker holds a rank that it
        # does not run. Given back, it is dispatched again at once; if it is another's, this is stale.
        holder = Holder(hint.job_id, hint.attempt_id, hint.token, hint.rank, site.worker_id)
        lost = Failure(
            FailureClass.PREEMPTED, "claim_unanswered", "Postgres was lost while it was claimed"
        )
        store.call(fail_rank, holder, lost)
    return answer


class RunningAttempt:
    """A claimed rank. Made, run once, and gone; other threads may wake or end it meanwhile."""

    def __init__(self, site: Site, claimed: Claimed, give_up: threading.Event) -> None:
        self.site = site
        self.claimed = claimed
        self.holder = claimed.holder
        self.started = time.time()
        self.inbox = Inbox()
        self._folder = AttemptFolder(site.settings.data, self.holder.job_id, claimed.attempt_number)
        self._store = Insistent(site.store, give_up)
        self._keeper: LeaseKeeper | None = None
        limit = claimed.spec.get("timeout_seconds")
        self._deadline: float | None = None
        if limit is not None:
            self._deadline = time.monotonic() + float(limit) - claimed.seconds_running

    def renew_now(self) -> None:
        """Something changed about the attempt: hear of it now and not with the next renewal."""
        if self._keeper is not None:
            self._keeper.renew_now()

    def ask_back(self, reason: str, seconds: float) -> None:
        """The device is wanted back in so many seconds. A training makes a checkpoint and leaves. A rank of
        a batch job hears from its lease whether others go on and it may leave; what it has finished is
        committed already."""
        self.inbox.ask_back(reason, seconds)

    def describe(self) -> dict[str, object]:
        """For monitors."""
        label = Resolved.model_validate(self.claimed.resolved).model.label
        return {
            "job_id": self.holder.job_id,
            "attempt": self.claimed.attempt_number,
            "rank": self.holder.rank,
            "of": self.claimed.world_size,
            "label": f"{self.claimed.kind}:{label}",
            "seconds": round(time.time() - self.started, 1),
        }

    def run(self) -> Outcome:
        """Run the rank to its end; no process of it lives when this returns, and its lease is
        released, unless Postgres was away to the last."""
        log.info("%s: attempt %d, rank %d begins", *self._names())
        self._keeper = LeaseKeeper(self.site.store, self.site.settings, self.holder, self.inbox)
        try:
            outcome = self._run_to_the_end(self._keeper)
            self._sweep(outcome)
        finally:
            self._keeper.close()
            self.inbox.close()
        log.info("%s: attempt %d, rank %d: %s", *self._names(), say(outcome))
        return outcome

    def _run_to_the_end(self, keeper: LeaseKeeper) -> Outcome:
        while True:
            outcome = self._run_and_flush()
            keeper.conclude()
            try:
                return self._conclude(outcome)
            except RowsLeft as left:
                # Another rank of the batch job was lost just when this one had found nothing to do.
                log.info("%s, and no other rank goes on: this one does", left)
                self.inbox.leave(False)
                keeper.go_on()

    def _run_and_flush(self) -> Outcome:
        """Everything up to the last report in the store."""
        folder = self._folder
        try:
            folder.make()
            if self.holder.rank == 0:
                folder.sweep()
            host = rank_host(self.site.settings, self._store, self.claimed)
            reporter = self._start_reporter(folder, host)
        except OSError as error:
            return _own_failure(f"the attempt's folder cannot be used: {error}")
        except GivenUp as error:
            return Stale(f"Postgres did not answer: {error}")
        outcome: Outcome = Stale("the worker ended")
        try:
            outcome = self._run_process(folder, host, reporter)
        except LaunchFailed as error:
            outcome = failed(FailureClass.INFRASTRUCTURE, error.code, error.message, error.hint)
        except GivenUp as error:
            outcome = Stale(f"Postgres did not answer: {error}")
        except Exception as error:
            log.exception("the attempt failed in its worker")
            outcome = _own_failure(f"{type(error).__name__}: {error}"[:500])
        finally:
            all_counted = reporter.close(drop=isinstance(outcome, Stale))
        if isinstance(outcome, Finished) and not all_counted:
            # What it finished with never reached the store.
            return self.inbox.end or Stale()
        return outcome

    def _start_reporter(self, folder: AttemptFolder, host: str) -> Reporter:
        checkpoint = self.claimed.spec.get("checkpoint") or {}
        writer = ReportWriter(
            self._store,
            self.site.settings,
            self.holder,
            folder,
            rank_host=host,
            keep_checkpoints=int(checkpoint.get("keep", 1)),
        )
        alone = self.claimed.kind == "train"
        path = (
            folder.log(self.holder.rank, self.site.device.id)
            if alone
            else self.site.engine.log_path
        )
        limit = self.site.settings.max_log_bytes
        of = None if alone else self.holder.attempt_id
        return Reporter(writer, lambda write: LogTail(path, limit, write, of), self.inbox)

    def _run_process(self, folder: AttemptFolder, host: str, reporter: Reporter) -> Outcome:
        deadline = self._deadline
        site, claimed, inbox = self.site, self.claimed, self.inbox
        if claimed.kind == "train":
            mtbf = self._store.call(device_mtbf)
            return run_training(site, claimed, folder, host, inbox, reporter, deadline, mtbf)
        return run_inference(site, claimed, self._store, inbox, reporter, deadline)

    def _sweep(self, outcome: Outcome) -> None:
        """Give back the space of checkpoints that nobody will finish. Behind the report of the end: what
        another rank still writes must not fail before it is known why. A rank that finished leaves it
        to rank 0, which may be finishing the last checkpoint."""
        if self.holder.rank == 0 or not isinstance(outcome, Finished):
            self._folder.sweep()

    def _conclude(self, outcome: Outcome) -> Outcome:
        """Tell the store how it ended. An end that counts no more only frees the device.

        Raises:
            RowsLeft: it has not ended: rows of the batch job are open, and nobody else computes.
        """
        try:
            before = self._store.repeated
            if self._report_end(outcome):
                return outcome
            if self._store.repeated > before and self._was_counted(outcome):
                return outcome  # the first call counted and its answer was lost
            self._store.call(release_lease, self.holder)
            return outcome if isinstance(outcome, Stale) else Stale()
        except GivenUp as error:
            return Stale(f"Postgres did not answer: {error}")

    def _report_end(self, outcome: Outcome) -> bool:
        match outcome:
            case Finished(summary=summary):
                return self._store.call(finish_rank, self.holder, summary)
            case Failed(failure=failure):
                return self._store.call(fail_rank, self.holder, failure)
            case Cancelled():
                return self._store.call(leave_attempt, self.holder)
            case Stale():
                return False

    def _was_counted(self, outcome: Outcome) -> bool:
        leases = self._store.call(list_leases, [self.holder.attempt_id])
        mine = [lease for lease in leases if lease.rank == self.holder.rank]
        return isinstance(outcome, Finished) and bool(mine) and mine[0].succeeded

    def _names(self) -> tuple[str, int, int]:
        return self.holder.job_id, self.claimed.attempt_number, self.holder.rank


def say(outcome: Outcome) -> str:
    """One line for logs and monitors."""
    match outcome:
        case Finished():
            return "finished"
        case Failed(failure=failure):
            return f"{failure.failure_class}: {failure.message} ({failure.code})"
        case Cancelled():
            return "cancelled"
        case Stale(why=why):
            return f"stale: {why}"


def _own_failure(message: str) -> Failed:
    return failed(
        FailureClass.INFRASTRUCTURE,
        "worker_error",
        message,
        "The log of `gpuyard worker` has the details.",
    )
