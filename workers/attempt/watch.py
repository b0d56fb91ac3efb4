"""Watching a process of ranks: reports, its end, the inbox and the clock, whichever comes first."""

from __future__ import annotations

import logging
import select
import time
from collections.abc import Callable

from shared.lifecycle import FailureClass
from shared.messages import Alive, Done, Failed, Report
from workers.attempt.hang import HangWatch, Hung
from workers.attempt.inbox import Inbox
from workers.attempt.outcome import Finished, Outcome, failed
from workers.attempt.reporter import Reporter
from workers.channel import ChannelClosed, ProtocolError
from workers.engine_host import EngineUse
from workers.engine_process import CLOSED_PATIENCE
from workers.launch import Exit, RankProcess

log = logging.getLogger(__name__)


class Watch:
    """One process on behalf of one attempt.

    ``on_report`` gets every report but ``Done`` and ``Failed``; ``on_change`` runs after every
    wake-up and may send orders; it returns after how many seconds it wants to run again at the latest,
    or None. Both run in the thread that calls ``until_end``.
    """

    def __init__(
        self,
        process: RankProcess | EngineUse,
        attempt_id: str,
        inbox: Inbox,
        reporter: Reporter,
        deadline: float | None,
        on_report: Callable[[Report], None],
        on_change: Callable[[], float | None],
        hang: HangWatch | None = None,
        expects: Callable[[], bool] = lambda: False,
    ) -> None:
        """``hang``: whether the process hangs is judged while ``expects`` says that something is wanted of
        it."""
        self._process = process
        self._attempt_id = attempt_id
        self._inbox = inbox
        self._reporter = reporter
        self._deadline = deadline
        self._on_report = on_report
        self._on_change = on_change
        self._hang = hang
        self._expects = expects
        self._closed_at: float | None = None
        self.hung = False
        """Whether the end is that the process hangs; it still has to be ended."""
        self.said_so = False
        """Whether the process itself said how its work ended."""

    def until_end(self) -> Outcome | Exit:
        """How the attempt shall end, or how the process ended without having said so."""
        while True:
            self._inbox.clear()
            if (end := self._inbox.end) is not None:
                return end
            said = self._read_reports()
            if said is not None:
                return said
            if (exit := self._process.poll()) is not None:
                return exit
            if self._deadline is not None and time.monotonic() >= self._deadline:
                return failed(
                    FailureClass.DEADLINE,
                    "deadline",
                    "the attempt reached its time limit (timeout_seconds)",
                    "Allow more time, or use smaller work.",
                )
            if self._closed_at is not None and time.monotonic() - self._closed_at > CLOSED_PATIENCE:
                return self._process.end(grace=0)
            if (hung := self._judge()) is not None:
                self.hung = True
                return hung.failure()
            self._wait(self._on_change())

    def read_rest(self) -> Outcome | None:
        """What the process had reported before it ended and nobody has read yet."""
        return self._read_reports(patiently=True)

    def _read_reports(self, *, patiently: bool = False) -> Outcome | None:
        # While too much waits for Postgres, it stays in the socket.
        while self._closed_at is None and (patiently or not self._reporter.full):
            try:
                report = self._process.channel.receive(0)
            except ChannelClosed:
                self._closed_at = time.monotonic()
                return None
            except ProtocolError as error:
                log.warning("a line that is no report is skipped: %s", error)
                continue
            if report is None:
                return None
            if self._hang is not None:
                self._hang.hear(report, time.monotonic())
            if isinstance(report, Alive):
                continue
            if (said := self._said(report)) is not None:
                return said
        return None

    def _judge(self) -> Hung | None:
        if self._hang is None:
            return None
        if not self._expects() or self._reporter.full or self._closed_at is not None:
            self._hang.excuse(time.monotonic())
            return None
        return self._hang.judge(time.monotonic())

    def _said(self, report: Report) -> Outcome | None:
        # An engine may still speak of the attempt before.
        if getattr(report, "attempt_id", "") not in ("", self._attempt_id):
            return None
        match report:
            case Done(summary=summary):
                self.said_so = True
                return Finished(summary)
            case Failed():
                self.said_so = True
                return failed(
                    report.failure_class,
                    report.code,
                    report.message,
                    report.hint,
                    report.rows_at_once,
                )
            case _:
                self._on_report(report)
                return None

    def _wait(self, again: float | None) -> None:
        poll = select.poll()
        poll.register(self._inbox.fileno(), select.POLLIN)
        poll.register(self._process.fileno(), select.POLLIN)
        if self._closed_at is None and not self._reporter.full:
            poll.register(self._process.channel.fileno(), select.POLLIN)
        now = time.monotonic()
        until = [now + (60.0 if again is None else again)]
        if self._deadline is not None:
            until.append(self._deadline)
        if self._hang is not None and (due := self._hang.due_in(now)) is not None:
            until.append(now + due)
        if self._closed_at is not None:
            until.append(self._closed_at + CLOSED_PATIENCE)
        poll.poll(max(0.0, min(until) - now) * 1000 + 1)
