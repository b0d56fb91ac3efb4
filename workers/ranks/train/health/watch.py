"""The watch of a rank: two threads beside the training, which see that another rank does not arrive.

A rank that is stopped can say nothing, and one that waits for it in a collective cannot either: its
watch speaks for it. Signs of life lie in the store of rank 0. If that does not answer, it is rank 0
that hangs; so one thread talks to the store, and may wait there for ever, and the other one judges.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch.distributed import Store  # type: ignore[attr-defined]

from workers.ranks.train.health.pulse import Pulse, State
from workers.ranks.train.health.verdict import Hung, Limits, Seen, find_hung, limits

_BEATS = 12
"""In the shortest time after which a rank is taken to hang."""
_LONGEST_BEAT = 5.0


@dataclass(slots=True)
class _Sign:
    """The last sign of life of another rank, and when it was new to us."""

    text: bytes
    changed: float


class Watch:
    """Begins with ``start`` and ends with ``close``; calls ``on_hung`` once at most, in its own thread."""

    def __init__(
        self,
        *,
        rank: int,
        world_size: int,
        device: str,
        pulse: Pulse,
        store: Store | None,
        leader_device: str,
        hung_after: float,
        on_hung: Callable[[Hung], None],
    ) -> None:
        """``store``: a connection of its own to that of rank 0; None for a gang of one.
        ``leader_device``: rank 0's."""
        self._rank = rank
        self._others = [other for other in range(world_size) if other != rank]
        self._device = device
        self._pulse = pulse
        self._store = store
        self._leader_device = leader_device
        self._hung_after = hung_after
        self._on_hung = on_hung
        self._pause = min(_LONGEST_BEAT, hung_after / _BEATS)
        self._closed = threading.Event()
        self._signs: dict[int, _Sign] = {}
        self._read_at = self._awake_since = time.monotonic()

    def start(self) -> None:
        jobs = [self._judge_again_and_again]
        if self._store is not None:
            jobs.append(self._exchange_again_and_again)
        for job in jobs:
            threading.Thread(target=job, name="health", daemon=True).start()

    def close(self) -> None:
        """No verdict is reached any more. A thread that waits for the store is left to the end of the
        process."""
        self._closed.set()

    # --- signs of life -------------------------------------------------------------------------

    def _exchange_again_and_again(self) -> None:
        assert self._store is not None  # noqa: S101  or this thread was not started
        beat = 0
        while not self._closed.wait(self._pause if beat else 0):
            beat += 1
            try:
                self._exchange(self._store, beat)
            except Exception:  # noqa: S112  rank 0 is gone: read_at tells of it
                continue

    def _exchange(self, store: Store, beat: int) -> None:
        now, state = time.monotonic(), self._pulse.state
        store.set(_key(self._rank), json.dumps(self._sign(beat, state, now)))
        # Others are looked at by those who do not get on, so that no store has to serve the square.
        if now - state.since > 2 * self._pause:
            there = [other for other in self._others if store.check([_key(other)])]
            texts = store.multi_get([_key(other) for other in there]) if there else []
            self._read_at = time.monotonic()
            for other, text in zip(there, texts, strict=True):
                known = self._signs.get(other)
                if known is None:
                    # It took part in whatever all did last.
                    self._signs[other] = _Sign(text, state.since)
                elif known.text != text:
                    self._signs[other] = _Sign(text, self._read_at)

    def _sign(self, beat: int, state: State, now: float) -> dict[str, object]:
        return {
            "beat": beat,
            "device": self._device,
            "in_step": state.in_step,
            "waiting": _waits(state),
            "seconds": now - state.since,
        }

    # --- judgement -----------------------------------------------------------------------------

    def _judge_again_and_again(self) -> None:
        before = time.monotonic()
        while not self._closed.wait(self._pause):
            now = time.monotonic()
            if now - before > self._pause + self._hung_after / 4:
                # We were stopped or asleep ourselves, with the others perhaps: nobody is late by that.
                self._awake_since = now
            before = now
            hung = self._judge(now)
            if hung is not None and not self._closed.is_set():
                self._closed.set()
                self._on_hung(hung)

    def _judge(self, now: float) -> Hung | None:
        state, limit = self._pulse.state, limits(self._hung_after, self._pulse.median_step)
        here = now - max(state.since, self._awake_since)
        if not self._others:
            return self._alone(here, state, limit)
        if here <= limit.silent:
            return None
        unanswered = now - max(self._read_at, state.since, self._awake_since)
        if self._rank != 0 and unanswered > limit.silent:
            why = f"has not answered for {unanswered:.0f} s: its process is stopped, or its host is gone"
            return Hung(0, self._leader_device, why)
        return find_hung(here, _waits(state), self._seen(now, state), limit)

    def _alone(self, here: float, state: State, limit: Limits) -> Hung | None:
        if state.in_step and here > limit.alone:
            return Hung(self._rank, self._device, f"has been in a step for {here:.0f} s")
        return None

    def _seen(self, now: float, state: State) -> Sequence[Seen]:
        seen = []
        for other in self._others:
            sign = self._signs.get(other)
            if sign is None:
                silent = now - max(state.since, self._awake_since)
                seen.append(Seen(other, "", silent))
                continue
            told = json.loads(sign.text)
            silent = now - max(sign.changed, state.since, self._awake_since)
            seen.append(
                Seen(
                    other,
                    told["device"],
                    silent,
                    told["in_step"],
                    told["waiting"],
                    min(told["seconds"] + now - sign.changed, now - self._awake_since),
                )
            )
        return seen


def _waits(state: State) -> bool:
    """Not while its own device has not come to the end of what it was given."""
    return state.waiting and (state.own_work is None or state.own_work.reached())


def _key(rank: int) -> str:
    return f"pulse/{rank}"
