"""Signs of life: what the engine does and since when, told by a thread of its own.

The worker takes an engine that does one thing for too long for hung (``workers/attempt/hang.py``). A step of
minutes is none as long as it ends; a thread that cannot even say so, since the process is stopped or
something in it holds the interpreter, is none the less.
"""

from __future__ import annotations

import threading
import time
from typing import Any

from shared.messages import Alive, EngineWork
from workers.channel import Channel, ChannelClosed

INTERVAL = 2.0
"""Seconds between two signs."""


class Signs:
    """``begin`` and ``rest`` are of the thread that computes; each costs a reading of the clock."""

    def __init__(self, channel: Channel[Any]) -> None:
        self._channel = channel
        # One tuple put in place of the other: nothing is locked.
        self._work: tuple[EngineWork, float] | None = None
        threading.Thread(target=self._tell, name="signs", daemon=True).start()

    def begin(self, work: EngineWork) -> None:
        """What comes now is one step, the end of which is progress."""
        self._work = (work, time.monotonic())

    def rest(self) -> None:
        """There is nothing to do."""
        self._work = None

    def _tell(self) -> None:
        while True:
            time.sleep(INTERVAL)
            if (now := self._work) is None:
                continue
            work, since = now
            try:
                self._channel.send(Alive(work=work, seconds=time.monotonic() - since))
            except ChannelClosed:
                return
