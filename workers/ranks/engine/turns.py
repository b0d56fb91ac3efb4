"""Whose row is next: rows that wait, by the attempt that they belong to. Pure.

The owner that has fewest rows in computation is served first, and of equals the one that was served
longest ago. So a job of one row does not stand behind the thousands of another job, each gets its share
as long as both have rows, and one that is alone gets everything.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

T = TypeVar("T")


class Turns(Generic[T]):
    """Waiting rows of any number of owners, each in the order in which they came."""

    def __init__(self, owner_of: Callable[[T], str]) -> None:
        self._owner_of = owner_of
        self._limits: dict[str, int] = {}
        """Owners in the order in which they were served: whose turn was longest ago is first."""
        self._waiting: dict[str, deque[T]] = {}
        self._inside: Counter[str] = Counter()

    def join(self, owner: str, most: int) -> None:
        """``most``: rows that it may have in computation."""
        self._limits = {owner: most, **self._limits}
        self._waiting[owner] = deque()

    def leave(self, owner: str) -> None:
        """Its rows that wait are gone; those in computation are the caller's to drop."""
        del self._limits[owner], self._waiting[owner]
        del self._inside[owner]

    @property
    def largest(self) -> int:
        """The most rows that any owner may have in computation."""
        return max(self._limits.values(), default=1)

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def waiting(self, owner: str) -> int:
        return len(self._waiting[owner])

    def inside(self, owner: str) -> int:
        return self._inside[owner]

    def add(self, rows: Iterable[T]) -> None:
        for row in rows:
            self._waiting[self._owner_of(row)].append(row)

    def peek(self) -> T | None:
        """The row whose turn it is; None: there is none, or all that wait have their fill."""
        owner = self._next()
        return None if owner is None else self._waiting[owner][0]

    def take(self) -> T:
        """Take the row of :meth:`peek` into computation."""
        owner = self._next()
        assert owner is not None, "nobody waits"  # noqa: S101
        self._inside[owner] += 1
        self._limits[owner] = self._limits.pop(owner)
        return self._waiting[owner].popleft()

    def done(self, row: T) -> None:
        """A row has left the computation."""
        owner = self._owner_of(row)
        if owner in self._limits:
            self._inside[owner] -= 1

    def give_back(self, rows: Iterable[T]) -> None:
        """Rows leave the computation unfinished, and are the first to be taken again."""
        for row in reversed(list(rows)):
            owner = self._owner_of(row)
            if owner in self._limits:
                self._inside[owner] -= 1
                self._waiting[owner].appendleft(row)

    def drop(self, unwanted: Callable[[T], bool]) -> None:
        """Forget waiting rows."""
        for owner, rows in self._waiting.items():
            self._waiting[owner] = deque(row for row in rows if not unwanted(row))

    def _next(self) -> str | None:
        ready = (
            owner
            for owner, rows in self._waiting.items()
            if rows and self._inside[owner] < self._limits[owner]
        )
        order = {owner: place for place, owner in enumerate(self._limits)}
        return min(ready, key=lambda owner: (self._inside[owner], order[owner]), default=None)
