"""The thread that writes a rank's reports and log to the store, in order and as long as it takes."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable

from shared.lifecycle import FailureClass
from shared.messages import Progress, Report, ShardComputed
from workers.attempt.inbox import Inbox
from workers.attempt.insist import GivenUp
from workers.attempt.logs import LogTail
from workers.attempt.outcome import Stale, failed
from workers.attempt.reports import ReportWriter

log = logging.getLogger(__name__)

MAX_PENDING = 64
"""Reports that may wait for Postgres. Then the rank's channel is no longer read: a rank that reports
more than fits into its socket waits, too, and loses nothing."""
PROGRESS_EVERY = 0.5
LOG_EVERY = 0.5


class Reporter:
    """Filled by the attempt's thread, which it wakes through the inbox when there is room again."""

    def __init__(
        self,
        writer: ReportWriter,
        tail: Callable[[Callable[[str], bool]], LogTail],
        inbox: Inbox,
    ) -> None:
        self._writer = writer
        self._inbox = inbox
        self._tail = tail(writer.append_log)
        self._pending: deque[Report] = deque()
        self._progress: Progress | None = None
        self._progress_at = self._logged_at = float("-inf")
        self._changed = threading.Condition()
        self._closing = False
        self._counts = True
        self._thread = threading.Thread(target=self._run, name="reports", daemon=True)
        self._thread.start()

    def put(self, report: Report) -> None:
        """Have it written after all that came before it. Of progress only the newest is kept."""
        with self._changed:
            if isinstance(report, Progress):
                self._progress = report
            else:
                self._pending.append(report)
            self._changed.notify_all()

    @property
    def full(self) -> bool:
        return len(self._pending) >= MAX_PENDING

    @property
    def idle(self) -> bool:
        """Everything but progress and log is written."""
        return not self._pending

    @property
    def shards(self) -> list[int]:
        """The indexes of computed shards that are not written yet."""
        with self._changed:
            return [each.index for each in self._pending if isinstance(each, ShardComputed)]

    def close(self, *, drop: bool = False) -> bool:
        """Write all that is left, unless told to ``drop`` it. True: everything counted."""
        with self._changed:
            self._closing = True
            if drop:
                self._counts = False
            self._changed.notify_all()
        self._thread.join()
        return self._counts

    def _run(self) -> None:
        try:
            while self._counts and self._wait():
                self._write_next()
            if self._counts:
                self._write_rest()
        except GivenUp as error:
            log.warning("reports are given up: %s", error)
            self._counts = False
        except ValueError as error:
            log.error("a report of the rank is refused: %s", error)
            self._counts = False
            self._inbox.end_with(failed(FailureClass.INFRASTRUCTURE, "report_refused", str(error)))
        except Exception as error:
            # A report that the store refuses is a defect of the rank or of ours. Without it the
            # rest must not count either.
            log.exception("a report could not be written")
            self._counts = False
            message = f"a report could not be written: {type(error).__name__}: {error}"[:500]
            self._inbox.end_with(failed(FailureClass.INFRASTRUCTURE, "report_refused", message))
        finally:
            with self._changed:
                self._pending.clear()
            self._inbox.ring()

    def _wait(self) -> bool:
        """Until there is something to do; False when the rest shall be written."""
        with self._changed:
            if not self._pending and not self._closing:
                self._changed.wait(LOG_EVERY)
            return not self._closing

    def _write_next(self) -> None:
        now = time.monotonic()
        if self._pending:
            report = self._pending[0]
            self._check(self._writer.write(report))
            with self._changed:
                # Only now: ``idle`` means written, not taken.
                if self._pending:
                    self._pending.popleft()
            self._inbox.ring()
        if self._counts and now - self._progress_at >= PROGRESS_EVERY:
            self._progress_at = now
            self._write_progress()
        if self._counts and now - self._logged_at >= LOG_EVERY:
            self._logged_at = now
            self._check(self._tail.ship())

    def _write_rest(self) -> None:
        while self._counts and self._pending:
            self._write_next()
        if self._counts:
            self._write_progress()
        if self._counts:
            self._check(self._tail.ship(all=True))

    def _write_progress(self) -> None:
        with self._changed:
            progress, self._progress = self._progress, None
        if progress is not None:
            self._check(self._writer.write(progress))

    def _check(self, counted: bool) -> None:
        if not counted:
            self._counts = False
            self._inbox.end_with(Stale())
