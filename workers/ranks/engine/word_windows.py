"""Rows too long, cut into windows where each word has an answer of its own (``too_long: split``). Pure.

Windows begin and end with words and overlap by a quarter. A word is answered in that window of the two in
which it has more text around it: never at an edge where the text went on, with an eighth of a window
beside it at the least. The answers are put together in the order of the text, as if it had been read at
once.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace

from workers.ranks.engine.prompts import Word
from workers.ranks.engine.windows import require_few

OVERLAP = 4
"""One in so many tokens of a window is also in the next one."""


@dataclass(frozen=True, slots=True)
class WordWindow:
    """Tokens of a row from ``first`` up to ``last``, and the words that it answers for: their tokens are
    counted from the window's first one."""

    first: int
    last: int
    words: tuple[Word, ...]


def cut_words(words: Sequence[Word], room: int) -> list[WordWindow]:
    """Overlapping windows that begin and end with words; each word is in exactly one of them to be
    answered. Of a word longer than a window its beginning is read.

    Args:
        words: their tokens counted from the row's first one. Those without tokens go with the word
            before them.
        room: tokens that a window may have.

    Raises:
        RowProblem: too_long: there would be too many.
    """
    having = [at for at, word in enumerate(words) if word.token is not None]
    begins, ends = _tokens(words)
    spans = _overlapping(begins, ends, room)
    found: list[WordWindow] = []
    kept = 0
    for place, (i, j) in enumerate(spans):
        if place + 1 < len(spans):
            following = spans[place + 1][0]
            middle = (begins[following] + ends[j - 1]) / 2
            up_to = min(max(bisect_left(begins, middle), following), j)
            stop = having[up_to]
        else:
            stop = len(words)
        first = begins[i]
        last = min(ends[j - 1], first + room)
        of_window = tuple(_moved(word, first, last) for word in words[kept:stop])
        found.append(WordWindow(first, last, of_window))
        kept = stop
    return found


def _tokens(words: Sequence[Word]) -> tuple[list[int], list[int]]:
    """Where the tokens of each word that has some begin, and up to where they go."""
    begins: list[int] = []
    ends: list[int] = []
    for word in words:
        if word.token is not None:
            begins.append(word.token)
            ends.append(1 + (word.token if word.last is None else word.last))
    return begins, ends


def _overlapping(begins: list[int], ends: list[int], room: int) -> list[tuple[int, int]]:
    """From and up to which word each window goes."""
    spans: list[tuple[int, int]] = []
    first = 0
    while True:
        require_few(len(spans))
        up_to = max(bisect_right(ends, begins[first] + room), first + 1)
        spans.append((first, up_to))
        if up_to == len(begins):
            return spans
        overlapped = bisect_left(begins, begins[up_to] - room // OVERLAP)
        # The last one goes back as far as it can: more text around its words costs little.
        as_last = bisect_left(begins, ends[-1] - room)
        first = max(first + 1, min(overlapped, as_last))


def _moved(word: Word, first: int, last: int) -> Word:
    if word.token is None:
        return word
    end = word.token if word.last is None else word.last
    return replace(word, token=word.token - first, last=min(end, last - 1) - first)
