"""The host manager: one nursery and one Celery worker process per device, kept running.

In the order of its life: refuse a second manager; sweep what an earlier one left; wait for Postgres;
start the nursery and the workers; restart what dies; on SIGTERM or SIGINT drain, on the second end
sooner; leave nothing.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from shared.errors import AlreadyRunning
from shared.settings import Settings
from shared.store import Store
from workers.inventory import LocalDevice
from workers.sweep import TREE_VARIABLE, reap_orphans, sweep
from workers.tree import SignalWatch, become_subreaper

log = logging.getLogger(__name__)

FIRST_PAUSE = 0.5
LONGEST_PAUSE = 30.0
SETTLED_AFTER = 60.0
"""A process that lived so long starts anew without a pause when it dies."""
MARGIN = 25.0
"""What a drain may take beyond its graces before workers are killed."""


@dataclass(slots=True)
class Child:
    """A process that is kept running."""

    name: str
    command: list[str]
    environment: dict[str, str]
    process: subprocess.Popen[bytes] | None = None
    started_at: float = 0.0
    start_after: float = 0.0
    pause: float = field(default=FIRST_PAUSE)

    @property
    def pid(self) -> int | None:
        return None if self.process is None else self.process.pid

    def start(self) -> None:
        self.started_at = time.monotonic()
        # A session of its own: Ctrl-C is for the manager, which drains.
        self.process = subprocess.Popen(
            self.command, env=self.environment, start_new_session=True, stdin=subprocess.DEVNULL
        )

    def has_ended(self) -> str | None:
        """How, if it has; then it is due to start again after a pause."""
        if self.process is None or (code := self.process.poll()) is None:
            return None
        self.process = None
        now = time.monotonic()
        if now - self.started_at > SETTLED_AFTER:
            self.pause = FIRST_PAUSE
        self.start_after = now + self.pause
        self.pause = min(2 * self.pause, LONGEST_PAUSE)
        return f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"

    def signal(self, number: signal.Signals) -> None:
        if self.process is not None:
            self.process.send_signal(number)


class HostManager:
    """Serves ``devices`` until SIGTERM or SIGINT. To be run in the main thread of its process."""

    def __init__(
        self,
        settings: Settings,
        host: str,
        devices: Sequence[LocalDevice],
        nursery_options: Sequence[str] = (),
    ) -> None:
        self._settings = settings
        self._host = host
        self._folder = settings.data / "hosts" / host
        self.tag = host_tag(settings.data, host)
        environment = {**os.environ, TREE_VARIABLE: self.tag}
        socket = self._folder / "nursery.sock"
        parent = ["--parent", str(os.getpid())]
        self._nursery = Child(
            "nursery",
            [
                *[sys.executable, "-m", "workers.ranks.nursery", "--socket", str(socket)],
                *["--tag", self.tag, *parent, *nursery_options],
            ],
            environment,
        )
        self._workers = [
            Child(
                device.id,
                [
                    *[sys.executable, "-m", "workers.serve", "--device", device.to_json()],
                    *["--nursery", str(socket), "--folder", str(self._folder), *parent],
                ],
                environment,
            )
            for device in devices
        ]

    def run(self) -> int:
        """Serve until told to end; the exit code.

        Raises:
            AlreadyRunning: a manager serves this host in this data folder.
        """
        with self._only_one(), SignalWatch(signal.SIGCHLD, signal.SIGTERM, signal.SIGINT) as watch:
            become_subreaper()
            if swept := sweep(self.tag):
                log.warning("ended %d processes that an earlier run left", swept)
            if not self._wait_for_postgres():
                return 0
            for child in self._children:
                child.start()
            names = ", ".join(worker.name for worker in self._workers)
            log.info("%s serves %s", self._host, names)
            try:
                self._serve(watch)
                self._drain(watch)
            finally:
                self._kill_rest()
        log.info("%s ended", self._host)
        return 0

    @property
    def _children(self) -> list[Child]:
        return [self._nursery, *self._workers]

    @contextlib.contextmanager
    def _only_one(self) -> Iterator[None]:
        """A lock that the kernel takes back when this process dies, however it dies."""
        self._folder.mkdir(parents=True, exist_ok=True)
        with (self._folder / "lock").open("a+") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.seek(0)
                raise AlreadyRunning(
                    f"a worker serves host '{self._host}' in {self._settings.data} already"
                    f" (process {lock.read().strip() or 'unknown'})",
                    hint="Stop it first, or give this one another --name.",
                ) from None
            lock.truncate(0)
            lock.write(str(os.getpid()))
            lock.flush()
            yield

    def _wait_for_postgres(self) -> bool:
        """False when told to end meanwhile."""
        store = Store(self._settings.database_url, pool_size=1)

        class Ended(BaseException):
            pass

        def leave(*_: object) -> None:
            raise Ended

        before = {n: signal.signal(n, leave) for n in (signal.SIGTERM, signal.SIGINT)}
        try:
            store.wait_until_ready(announce=log.warning)
        except Ended:
            return False
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            store.close()
        return True

    def _serve(self, watch: SignalWatch) -> None:
        """Restart what dies, until a signal to end."""
        while True:
            for child in self._children:
                if how := child.has_ended():
                    pause = child.start_after - time.monotonic()
                    log.warning("%s ended %s; starts again in %.1f s", child.name, how, pause)
                if child.process is None and time.monotonic() >= child.start_after:
                    child.start()
            reap_orphans(self._known())
            waiting = [c.start_after - time.monotonic() for c in self._children if not c.process]
            if _wait(watch, max(0.0, min(waiting, default=5.0))) & _ENDING:
                return

    def _drain(self, watch: SignalWatch) -> None:
        """The workers drain at once; the nursery goes last, as they need it to end what is lost."""
        grace = self._settings.drain_grace
        log.info("draining: running attempts get %g s (again to end them now)", grace)
        for worker in self._workers:
            worker.signal(signal.SIGTERM)
        deadline = time.monotonic() + grace + 3 * self._settings.end_grace + MARGIN
        while any(w.process for w in self._workers) and time.monotonic() < deadline:
            for worker in self._workers:
                worker.has_ended()
            reap_orphans(self._known())
            if any(w.process for w in self._workers) and _wait(watch, 1.0) & _ENDING:
                log.info("ending running attempts now")
                for worker in self._workers:
                    worker.signal(signal.SIGTERM)

    def _kill_rest(self) -> None:
        for child in reversed(self._children):
            if child is self._nursery:
                child.signal(signal.SIGTERM)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    if child.process is not None:
                        child.process.wait(5)
            if child.process is not None and child.process.poll() is None:
                log.warning("%s does not end: killed", child.name)
                child.process.kill()
            if child.process is not None:
                child.process.wait()
                child.process = None
        sweep(self.tag)
        reap_orphans(())

    def _known(self) -> list[int]:
        return [child.pid for child in self._children if child.pid is not None]


_ENDING = {signal.SIGTERM, signal.SIGINT}


def host_tag(data: Path, host: str) -> str:
    """What the processes of this host in this data folder carry in their environment."""
    return hashlib.sha256(f"{data.resolve()}\0{host}".encode()).hexdigest()[:24]


def _wait(watch: SignalWatch, seconds: float) -> set[int]:
    poll = select.poll()
    poll.register(watch.fileno(), select.POLLIN)
    poll.poll(seconds * 1000 + 1)
    return watch.take()
