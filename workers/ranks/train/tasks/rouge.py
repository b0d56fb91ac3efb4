"""ROUGE (Lin, 2004): how much of a reference's words a text has, as F1. Pure.

As in Google's ``rouge-score`` without its stemmer, but with the letters of every script, where that
one knows a to z alone. A script that puts no space between its words counts each run as one.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

_WORD = re.compile(r"[^\W_]+")


@dataclass(frozen=True, slots=True)
class Rouge:
    """F1 over words, over pairs of neighbours, and of the longest common subsequence of words."""

    one: float
    two: float
    longest: float


def rouge(reference: str, text: str) -> Rouge:
    """Compare a text with what it should be; case and punctuation do not count."""
    right, guess = _WORD.findall(reference.lower()), _WORD.findall(text.lower())
    common = _longest_common(right, guess)
    return Rouge(
        one=_overlap(right, guess, 1),
        two=_overlap(right, guess, 2),
        longest=_f1(common, len(right), len(guess)),
    )


def _overlap(right: Sequence[str], guess: Sequence[str], size: int) -> float:
    ours, theirs = (
        Counter(tuple(words[i : i + size]) for i in range(len(words) - size + 1))
        for words in (right, guess)
    )
    return _f1((ours & theirs).total(), ours.total(), theirs.total())


def _longest_common(right: Sequence[str], guess: Sequence[str]) -> int:
    """Length of the longest common subsequence, a row of the table at a time in the bits of one number
    (Hyyrö, 2004: bit-parallel LCS-length computation revisited)."""
    places: dict[str, int] = {}
    for index, word in enumerate(right):
        places[word] = places.get(word, 0) | 1 << index
    every = (1 << len(right)) - 1
    row = every
    for word in guess:
        matches = row & places.get(word, 0)
        row = ((row + matches) | (row - matches)) & every
    return len(right) - row.bit_count()


def _f1(common: int, right: int, guess: int) -> float:
    return 2 * common / (right + guess) if common else 0.0
