"""A device's engine process and those who use it: one thread reads, every attempt has a mailbox."""

from __future__ import annotations

import contextlib
import logging
import os
import select
import threading
import time
from collections import deque
from dataclasses import dataclass

from pydantic import BaseModel

from shared.messages import Alive, Progress, Report
from workers.channel import ChannelClosed, ProtocolError
from workers.launch import Exit, RankProcess

log = logging.getLogger(__name__)

CLOSED_PATIENCE = 5.0
"""Seconds that a process may live on after it has closed its channel."""


class Mailbox:
    """What the engine says of one attempt. Filled by the engine's thread, read by the attempt's."""

    def __init__(self) -> None:
        self._fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._lock = threading.Lock()
        self._mail: deque[Report] = deque()
        self._ended = self._closed = False

    def fileno(self) -> int:
        """Readable when ``receive`` has something to say."""
        return self._fd

    def receive(self, timeout: float | None = None) -> Report | None:
        """The next report; None when ``timeout`` seconds pass without one (0: do not wait).

        Raises:
            ChannelClosed: the engine says nothing any more, and everything it said was received.
        """
        while True:
            with self._lock:
                if self._mail:
                    return self._mail.popleft()
                if self._ended:
                    raise ChannelClosed("the engine says nothing any more")
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(self._fd)
            if not select.select([self._fd], [], [], timeout)[0]:
                return None

    def put(self, report: Report) -> None:
        with self._lock:
            # Of progress and signs of life only the newest matters: whoever cannot read for an hour finds one,
            # not thousands.
            for place in (-1, -2):
                if len(self._mail) < -place or not isinstance(self._mail[place], Progress | Alive):
                    break
                if type(self._mail[place]) is type(report):
                    del self._mail[place]
                    break
            self._mail.append(report)
            self._ring()

    def end(self) -> None:
        """Nothing more will come."""
        with self._lock:
            self._ended = True
            self._ring()

    def close(self) -> None:
        with self._lock:
            self._closed = True
            os.close(self._fd)

    def _ring(self) -> None:
        if not self._closed:
            os.eventfd_write(self._fd, 1)


@dataclass(frozen=True, slots=True)
class Ended:
    """How an engine ended."""

    exit: Exit
    on_purpose: bool
    """One of its users or its host ended it: what it computed is not why."""
    crowded: bool
    """More than one attempt had something in it to compute or to load."""


class EngineProcess:
    """A running engine. Its thread alone speaks with its supervisor and reads from it; anybody may send."""

    def __init__(self, process: RankProcess) -> None:
        self.pid = process.pid
        self._process = process
        self._lock = threading.Lock()
        self._mailboxes: dict[str, Mailbox] = {}
        self._busy: set[str] = set()
        self._grace: float | None = None
        self._on_purpose = False
        self._asked = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._over = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._finished = threading.Event()
        self.ended: Ended | None = None
        threading.Thread(target=self._run, name="engine", daemon=True).start()

    def __del__(self) -> None:
        os.close(self._asked)
        os.close(self._over)

    def attach(self, attempt_id: str) -> Mailbox:
        """A mailbox for what the engine says of this attempt from now on."""
        mailbox = Mailbox()
        with self._lock:
            self._mailboxes[attempt_id] = mailbox
            if self.ended is not None:
                mailbox.end()
        return mailbox

    def detach(self, attempt_id: str) -> None:
        """What the engine still says of this attempt is nobody's."""
        with self._lock:
            mailbox = self._mailboxes.pop(attempt_id, None)
            self._busy.discard(attempt_id)
        if mailbox is not None:
            mailbox.close()

    def mark(self, attempt_id: str, *, busy: bool) -> None:
        """Whether the engine has something to do for this attempt."""
        with self._lock:
            (self._busy.add if busy else self._busy.discard)(attempt_id)

    def send(self, message: BaseModel) -> None:
        """Raises: ChannelClosed: the engine is gone."""
        self._process.channel.send(message)

    def fileno(self) -> int:
        """Readable once the engine has ended."""
        return self._over

    def end(self, grace: float, *, on_purpose: bool = True) -> Ended:
        """End the engine with its whole tree; returns once no process of it lives."""
        with self._lock:
            if self._grace is None:
                self._grace, self._on_purpose = grace, on_purpose
        os.eventfd_write(self._asked, 1)
        self._finished.wait()
        assert self.ended is not None  # noqa: S101 - finished
        return self.ended

    def _run(self) -> None:
        exit = None
        try:
            exit = self._watch()
        except Exception:
            log.exception("the thread of the engine failed: it is ended")
        exit = self._process.end(self._grace or 0) if exit is None else self._process.end(0)
        with contextlib.suppress(ChannelClosed):
            while self._read():
                pass
        with self._lock:
            self.ended = Ended(exit, self._on_purpose, len(self._busy) > 1)
            for mailbox in self._mailboxes.values():
                mailbox.end()
        self._process.close()
        os.eventfd_write(self._over, 1)
        self._finished.set()

    def _watch(self) -> Exit | None:
        """Pass on what it says until it ends: how; None: it is to be ended."""
        poll = select.poll()
        channel = self._process.channel.fileno()
        for fd in (channel, self._process.fileno(), self._asked):
            poll.register(fd, select.POLLIN)
        closed_at: float | None = None
        while self._grace is None:
            poll.poll(None if closed_at is None else CLOSED_PATIENCE * 1000)
            if closed_at is None:
                try:
                    while self._read():
                        pass
                except ChannelClosed:
                    closed_at = time.monotonic()
                    poll.unregister(channel)
            if (exit := self._process.poll()) is not None:
                return exit
            if closed_at is not None and time.monotonic() - closed_at > CLOSED_PATIENCE:
                return self._process.end(grace=0)
        return None

    def _read(self) -> bool:
        """Pass on one report; False: there is none.

        Raises:
            ChannelClosed: nothing more will come.
        """
        try:
            report = self._process.channel.receive(0)
        except ProtocolError as error:
            log.warning("a line that is no report is skipped: %s", error)
            return True
        if report is None:
            return False
        attempt_id = getattr(report, "attempt_id", "")
        with self._lock:
            # Of an attempt that is gone it may still say something.
            for mailbox in (
                filter(None, [self._mailboxes.get(attempt_id)])
                if attempt_id
                else self._mailboxes.values()
            ):
                mailbox.put(report)
        return True
