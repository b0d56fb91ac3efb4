"""The device's warm engine process, kept between inference attempts."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from workers.attempt.folders import log_suffix
from workers.inventory import LocalDevice
from workers.launch import RankProcess, launch

log = logging.getLogger(__name__)

IDLE_SECONDS = 600.0
"""An engine that nobody used for so long is ended, and its memory is free."""
LEFT_ON_LOG = 8 * 1024**2
"""A log of more bytes begins anew with the next engine."""


class WarmEngine:
    """At most one process. Used by one attempt at a time; housekeeping keeps out of its way."""

    def __init__(self, device: LocalDevice, nursery: Path, folder: Path, end_grace: float) -> None:
        self.log_path = folder / f"engine{log_suffix(device.id)}"
        self._device = device
        self._nursery = nursery
        self._end_grace = end_grace
        self._lock = threading.Lock()
        self._process: RankProcess | None = None
        self._used_at = 0.0
        self._warm: list[str] = []
        self._labels: dict[str, str] = {}
        """Of models by their folders."""

    @property
    def warm(self) -> list[str]:
        """Labels of the models it holds, the one used last first."""
        return list(self._warm)

    @contextmanager
    def use(self) -> Iterator[RankProcess]:
        """The living engine, started where there is none.

        Whoever finds that it does not obey ends it with ``discard`` before leaving.

        Raises:
            LaunchFailed: no engine could be started.
        """
        with self._lock:
            if self._process is not None and self._process.poll() is not None:
                log.warning("the engine ended by itself while it was idle")
                self.discard()
            if self._process is None:
                self._process = self._start()
            try:
                yield self._process
            finally:
                self._used_at = time.monotonic()

    def holds(self, label: str, path: str, models: Sequence[str]) -> None:
        """The engine said that it has loaded the model ``label`` from the folder ``path``, and from
        which folders those that it holds now."""
        self._labels[path] = label
        self._labels = {held: self._labels[held] for held in models if held in self._labels}
        self._warm = list(self._labels.values())

    def discard(self, grace: float = 0.0) -> None:
        """End the engine with its whole tree. By the one who uses it."""
        process, self._process, self._warm = self._process, None, []
        if process is not None:
            process.end(grace)
            process.close()

    def replace(self) -> RankProcess:
        """End the engine and start another. By the one who uses it.

        Raises:
            LaunchFailed: no engine could be started.
        """
        self.discard()
        self._process = self._start()
        return self._process

    def end(self) -> None:
        """End the engine, once nobody uses it."""
        with self._lock:
            self.discard(min(self._end_grace, 2.0))

    def end_if_idle(self) -> None:
        """Housekeeping: ends an engine that is idle for long, or dead. Never waits for its user."""
        if not self._lock.acquire(blocking=False):
            return
        try:
            if self._process is None:
                return
            dead = self._process.poll() is not None
            if dead or time.monotonic() - self._used_at > IDLE_SECONDS:
                log.info("the engine %s", "died" if dead else "was idle for long and is ended")
                self.discard(min(self._end_grace, 2.0))
        finally:
            self._lock.release()

    def _start(self) -> RankProcess:
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        if self.log_path.exists() and self.log_path.stat().st_size > LEFT_ON_LOG:
            self.log_path.unlink()
        return launch(self._nursery, "engine", env=self._device.environment, log_path=self.log_path)
