"""The device's warm engine process, kept between inference attempts and used by several at once."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from pydantic import BaseModel

from workers.attempt.folders import log_suffix
from workers.engine_process import Ended, EngineProcess, Mailbox
from workers.inventory import LocalDevice
from workers.launch import Exit, launch

log = logging.getLogger(__name__)

IDLE_SECONDS = 600.0
"""An engine that nobody used for so long is ended, and its memory is free."""
LEFT_ON_LOG = 8 * 1024**2
"""A log of more bytes begins anew with the next engine."""


class WarmEngine:
    """At most one process. Housekeeping keeps out of the way of those who use it."""

    def __init__(self, device: LocalDevice, nursery: Path, folder: Path, end_grace: float) -> None:
        self.log_path = folder / f"engine{log_suffix(device.id)}"
        self.crowd = Crowd()
        self._device = device
        self._nursery = nursery
        self._end_grace = end_grace
        self._changed = threading.Condition()
        self._process: EngineProcess | None = None
        self._users = 0
        self._used_at = 0.0
        self._warm: list[str] = []
        self._labels: dict[str, str] = {}
        """Of models by their folders."""

    @property
    def warm(self) -> list[str]:
        """Labels of the models it holds, the one used last first."""
        return list(self._warm)

    @contextmanager
    def use(self, attempt_id: str, ring: Callable[[], None]) -> Iterator[EngineUse]:
        """The living engine for one attempt more, started where there is none.

        ``ring`` is called, from any thread, when the attempt may have orders to give again.

        Raises:
            LaunchFailed: no engine could be started.
        """
        with self._changed:
            self._users += 1
        use = None
        try:
            use = EngineUse(self, attempt_id, ring, self.process())
            yield use
        finally:
            if use is not None:
                use.close()
            with self._changed:
                self._users -= 1
                self._used_at = time.monotonic()
                self._changed.notify_all()

    def holds(self, label: str, path: str, models: Sequence[str]) -> None:
        """The engine said that it has loaded the model ``label`` from the folder ``path``, and from
        which folders those that it holds now."""
        with self._changed:
            self._labels[path] = label
            self._labels = {held: self._labels[held] for held in models if held in self._labels}
            self._warm = list(self._labels.values())

    def process(self) -> EngineProcess:
        """The living engine, started where there is none. For those who use it.

        Raises:
            LaunchFailed: no engine could be started.
        """
        with self._changed:
            if self._process is not None and self._process.ended is not None:
                self._forget()
            if self._process is None:
                self._process = self._start()
            return self._process

    @property
    def users(self) -> int:
        return self._users

    def end(self) -> None:
        """End the engine, once nobody uses it."""
        with self._changed:
            self._changed.wait_for(lambda: not self._users)
            self._end()

    def end_if_idle(self) -> None:
        """Housekeeping: ends an engine that is idle for long, or dead. Never waits for its users."""
        if not self._changed.acquire(blocking=False):
            return
        try:
            if self._process is None or self._users:
                return
            dead = self._process.ended is not None
            if dead or time.monotonic() - self._used_at > IDLE_SECONDS:
                log.info("the engine %s", "died" if dead else "was idle for long and is ended")
                self._end()
        finally:
            self._changed.release()

    def _end(self) -> None:
        if self._process is not None:
            self._process.end(min(self._end_grace, 2.0))
            self._forget()

    def _forget(self) -> None:
        self._process, self._warm, self._labels = None, [], {}

    def _start(self) -> EngineProcess:
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        if self.log_path.exists() and self.log_path.stat().st_size > LEFT_ON_LOG:
            self.log_path.unlink()
        return EngineProcess(
            launch(self._nursery, "engine", env=self._device.environment, log_path=self.log_path)
        )


class EngineUse:
    """One attempt's use of the engine. For the attempt's thread alone.

    It outlives an engine that dies: ``renew`` gives it the next one.
    """

    def __init__(
        self, host: WarmEngine, attempt_id: str, ring: Callable[[], None], process: EngineProcess
    ) -> None:
        self._host = host
        self._attempt_id = attempt_id
        self._ring = ring
        self._process = process
        self.channel: Mailbox = process.attach(attempt_id)
        host.crowd.join(attempt_id, ring)

    @property
    def ended(self) -> Ended | None:
        """How the engine ended, if it has."""
        return self._process.ended

    def fileno(self) -> int:
        """Readable once the engine has ended."""
        return self._process.fileno()

    def poll(self) -> Exit | None:
        ended = self._process.ended
        return None if ended is None else ended.exit

    def end(self, grace: float, *, on_purpose: bool = True) -> Exit:
        """End the engine, for all who use it. Not ``on_purpose``: it hangs, and what it computes may be why."""
        return self._process.end(grace, on_purpose=on_purpose).exit

    @property
    def shared(self) -> bool:
        """Others use the engine as well."""
        return self._host.users > 1

    def send(self, message: BaseModel) -> None:
        """Raises: ChannelClosed: the engine is gone."""
        self._process.send(message)

    def renew(self) -> None:
        """The next engine, now that this one has ended.

        Raises:
            LaunchFailed: no engine could be started.
        """
        self._process.detach(self._attempt_id)
        self._process = self._host.process()
        self.channel = self._process.attach(self._attempt_id)

    def enter(self) -> bool:
        """The engine is about to get something to do for this attempt. False: it may not now, as another
        attempt has to be alone in it; ``ring`` says when to ask again."""
        may = self._host.crowd.enter(self._attempt_id)
        if may:
            self._process.mark(self._attempt_id, busy=True)
        return may

    def leave(self) -> None:
        """The engine has nothing to do for this attempt."""
        self._process.mark(self._attempt_id, busy=False)
        self._host.crowd.leave(self._attempt_id)

    def alone(self) -> bool:
        """Whether this attempt, which has entered, is the only one; then nobody enters until it leaves or
        calls ``let_in``."""
        return self._host.crowd.alone(self._attempt_id)

    def want_alone(self) -> None:
        """Let nobody enter any more; ``ring`` says when the others have left."""
        self._host.crowd.want_alone(self._attempt_id)

    def let_in(self) -> None:
        """Others may enter."""
        self._host.crowd.let_in(self._attempt_id)

    def close(self) -> None:
        self._process.detach(self._attempt_id)
        self._host.crowd.quit(self._attempt_id)


class Crowd:
    """Who has something in the engine, and who has to be alone in it: rows that an engine died over are
    computed with nothing beside them, so that what kills it the next time is certain."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._rings: dict[str, Callable[[], None]] = {}
        self._inside: set[str] = set()
        self._alone: str | None = None
        """Who is alone, or waits for it: nobody else may enter."""

    def join(self, attempt_id: str, ring: Callable[[], None]) -> None:
        with self._lock:
            self._rings[attempt_id] = ring

    def quit(self, attempt_id: str) -> None:
        self.leave(attempt_id)
        with self._lock:
            del self._rings[attempt_id]

    def enter(self, attempt_id: str) -> bool:
        with self._lock:
            if self._alone not in (None, attempt_id):
                return False
            self._inside.add(attempt_id)
            return True

    def leave(self, attempt_id: str) -> None:
        with self._lock:
            self._inside.discard(attempt_id)
            if self._alone == attempt_id:
                self._alone = None
            self._ring_others(attempt_id)

    def alone(self, attempt_id: str) -> bool:
        with self._lock:
            if self._inside - {attempt_id} or self._alone not in (None, attempt_id):
                return False
            self._alone = attempt_id
            return True

    def want_alone(self, attempt_id: str) -> None:
        with self._lock:
            if self._alone is None:
                self._alone = attempt_id
            self._inside.discard(attempt_id)
            # Whoever wanted it first may have waited for this one.
            self._ring_others(attempt_id)

    def let_in(self, attempt_id: str) -> None:
        with self._lock:
            if self._alone == attempt_id:
                self._alone = None
                self._ring_others(attempt_id)

    def _ring_others(self, attempt_id: str) -> None:
        for other, ring in self._rings.items():
            if other != attempt_id:
                ring()
