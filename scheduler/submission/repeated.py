"""Ids that a batch job's rows have in common, found in memory that is bounded.

Ids are the user's own and are passed through whatever they are; that one stands twice is told and
refused nowhere. What is kept of an id are 64 bits of its hash: of a million different ids two look
alike with a probability of 3 in 10⁸.
"""

from __future__ import annotations

import json
from array import array

from shared.resolved import RepeatedIds

MOST_IDS = 1 << 20
"""Ids that are compared; with them the table has 16 MiB."""
_FEWEST_SLOTS = 1 << 10
_SHOWN = 60


class IdCheck:
    """Is shown the rows of a job one after another."""

    def __init__(self) -> None:
        self._slots = array("Q", bytes(8 * _FEWEST_SLOTS))
        self._compared = 0
        self._left_out = False
        self._repeated = 0
        self._first: tuple[int, str] | None = None

    def look(self, row: int, line: bytes) -> None:
        """Compare the id of a row; a line without one, or that is no JSON, has none."""
        # Most rows without an id are never parsed. The second is a key written with escapes.
        if b'"id"' not in line and b"\\u006" not in line:
            return
        try:
            fields = json.loads(line)
            id = fields.get("id") if isinstance(fields, dict) else None
        except (ValueError, RecursionError):
            return
        if id is None:
            return
        if self._compared == MOST_IDS:
            self._left_out = True
            return
        self._compared += 1
        text = json.dumps(id, sort_keys=True)
        if not self._add(hash(text) & (2**64 - 1) or 1):
            self._repeated += 1
            self._first = self._first or (row, text)

    def found(self) -> RepeatedIds | None:
        """None: every id is another, or there is none."""
        if self._first is None:
            return None
        row, id = self._first
        return RepeatedIds(
            rows=self._repeated,
            first_row=row,
            first_id=id if len(id) <= _SHOWN else id[:_SHOWN] + "…",
            compared=self._compared,
            all=not self._left_out,
        )

    def _add(self, key: int) -> bool:
        """False if ``key`` is there."""
        place = self._place_of(key)
        if self._slots[place]:
            return False
        self._slots[place] = key
        if 2 * (self._compared - self._repeated) >= len(self._slots):
            self._grow()
        return True

    def _place_of(self, key: int) -> int:
        """Where ``key`` is, or the free slot (0) where it belongs. Half of them are free at least."""
        mask = len(self._slots) - 1
        place = key & mask
        while self._slots[place] not in (0, key):
            place = (place + 1) & mask
        return place

    def _grow(self) -> None:
        before = self._slots
        self._slots = array("Q", bytes(16 * len(before)))
        for key in before:
            if key:
                self._slots[self._place_of(key)] = key
