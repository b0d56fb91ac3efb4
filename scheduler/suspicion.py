"""Suspicion: is a device deaf? It is heard of, and takes nothing of what it is sent.

Its worker can be cut off from the broker, or its consumer be lost, while its heartbeats reach Postgres.
Such a device would draw work again and again, and a gang on it never starts. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass

from shared.store.rescue import Unclaimed

RINGS = 3
"""Hints that must have gone out before silence means anything."""


@dataclass(frozen=True, slots=True)
class Suspicion:
    suspect: bool
    reason: str


def judge(seen: Unclaimed) -> Suspicion:
    """Is it the device's fault that a rank reserved on it was not claimed in time?

    The reservation kept the device idle all the while, and it hears the queue that the hint went to,
    whether that is its own or its class's. What else could explain the silence is asked in turn.
    """
    if not seen.live:
        return Suspicion(
            False, "it was not heard of lately, or leaves: nothing is sent there anyway"
        )
    if not seen.served_since_dispatch:
        return Suspicion(False, "its worker was started meanwhile")
    if seen.rings < RINGS:
        return Suspicion(False, f"the broker took the hint {seen.rings} of {RINGS} times at least")
    if not seen.others_claimed:
        return Suspicion(False, "nobody else claimed anything meanwhile: it may be the broker")
    others = "a rank" if seen.others_claimed == 1 else f"{seen.others_claimed} ranks"
    return Suspicion(
        True, f"idle, it took no job in {seen.rings} hints while others claimed {others}"
    )
