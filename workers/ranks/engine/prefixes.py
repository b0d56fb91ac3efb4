"""Beginnings that many prompts share, such as a system prompt: computed once, and copied from then on.

What a decoder computes for a token depends on the tokens before it alone, so the keys and values of a
prompt's beginning are those of any other prompt that begins alike. Nothing has to be said about what is
shared: a row that begins as a stored prefix does takes as much of it as fits, and a row that begins as
one in computation does has that one's beginning stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

import torch

LEAST = 64
"""Tokens from which a beginning is worth being kept."""
SHARE = 0.125
"""Of the memory for the rows' caches, at most."""
_MOST = 16


@dataclass(frozen=True, slots=True, eq=False)
class Prefix:
    """``states`` are keys and values of each layer, [heads, tokens, size]."""

    tokens: tuple[int, ...]
    states: list[torch.Tensor]


class Prefixes:
    """Those kept last, the one used last at the end.

    Args:
        budget: bytes that they may take together.
        bytes_per_position: what one token of one takes; 0: nothing is kept.
    """

    def __init__(self, budget: int, bytes_per_position: int) -> None:
        self._budget = budget
        self._bytes_per_position = bytes_per_position
        self._kept: list[Prefix] = []

    @property
    def bytes(self) -> int:
        return sum(len(prefix.tokens) for prefix in self._kept) * self._bytes_per_position

    def fits(self, tokens: int) -> bool:
        """Whether a prefix so long can be kept."""
        return 0 < tokens * self._bytes_per_position <= self._budget

    def longest(self, tokens: Sequence[int]) -> tuple[Prefix | None, int]:
        """The prefix that shares most with a prompt, and how many tokens that is. One token of the
        prompt is always left: what follows it is wanted."""
        best, most = None, 0
        for prefix in self._kept:
            if (shared := common(prefix.tokens, tokens)) > most:
                best, most = prefix, shared
        if best is not None:
            self._kept.remove(best)
            self._kept.append(best)
        return best, most

    def add(self, prefix: Prefix) -> None:
        """Keep a prefix that :meth:`fits`. Those that are its own beginning go, and those used longest ago
        as far as there is no room."""
        self._kept = [
            kept for kept in self._kept if prefix.tokens[: len(kept.tokens)] != kept.tokens
        ]
        self._kept.append(prefix)
        while len(self._kept) > _MOST or (self.bytes > self._budget and len(self._kept) > 1):
            self._kept.pop(0)

    def clear(self) -> None:
        self._kept = []


def common(kept: Sequence[int], tokens: Sequence[int], least: int = LEAST) -> int:
    """Tokens at the beginning of ``tokens``, but for its last one, that ``kept`` begins with as well; 0
    where they are fewer than ``least``."""
    most = min(len(kept), len(tokens) - 1)
    if most < least or tuple(kept[:least]) != tuple(tokens[:least]):
        return 0
    pairs = zip(kept[least:most], tokens[least:most], strict=True)
    return least + sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
