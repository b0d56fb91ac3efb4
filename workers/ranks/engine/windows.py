"""Rows that are too long, cut into windows that fit (``too_long: split``). Pure.

Text is cut where it is least missed: in the neighbourhood of even lengths at the end of a paragraph, else of a
sentence, else between two words. Where each word has an answer of its own, see ``word_windows``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from shared.errors import UnsupportedModel
from workers.ranks.engine.inputs import RowProblem

MOST_WINDOWS = 20_000
"""Of one row."""
_PARAGRAPH, _SENTENCE, _SPACE, _NOTHING = 3, 2, 1, 0
_ENDS = frozenset(".!?…:;")
_ENDS_ALONE = frozenset("\u3002\uff01\uff1f")
"""The full stop and its kin of Chinese and Japanese, which no space follows."""
_REACH = 8
"""Characters of white space that are looked at."""


@dataclass(frozen=True, slots=True)
class Frame:
    """The special tokens that a tokenizer puts before and behind a text."""

    before: tuple[int, ...]
    behind: tuple[int, ...]

    def room(self, tokens: int) -> int:
        """What is left of so many tokens for the text.

        Raises:
            RowProblem: too_long: nothing.
        """
        room = tokens - len(self.before) - len(self.behind)
        if room < 1:
            raise RowProblem("too_long", f"{tokens} tokens leave no room for a piece of the text")
        return room

    def inside(self, ids: Sequence[int]) -> Sequence[int]:
        """The tokens of the text alone."""
        return ids[len(self.before) : len(ids) - len(self.behind)]

    def around(self, ids: Sequence[int]) -> tuple[int, ...]:
        return (*self.before, *ids, *self.behind)


def frame_of(tokenizer: PreTrainedTokenizerBase) -> Frame:
    """What the tokenizer puts around a text.

    Raises:
        UnsupportedModel: it does more to a text than that.
    """
    text = "one"
    bare: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    whole: list[int] = tokenizer(text)["input_ids"]
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return Frame(tuple(whole[:start]), tuple(whole[start + len(bare) :]))
    raise UnsupportedModel(
        f"the tokenizer ({type(tokenizer).__name__}) does not keep its special tokens around the text, "
        "so that a long one cannot be cut into windows",
        param="too_long",
        hint="Set too_long to truncate or error.",
    )


def cut(tokens: int, room: int, seam: Callable[[int], int]) -> list[tuple[int, int]]:
    """Windows of about even length, one behind the other: from and up to which token.

    Args:
        room: tokens that a window may have.
        seam: how well the text can be cut before a token; more is better.

    Raises:
        RowProblem: too_long: there would be too many.
    """
    windows: list[tuple[int, int]] = []
    start = 0
    while tokens - start > room:
        left = tokens - start
        even = math.ceil(left / math.ceil(left / room))
        lowest, highest = max(1, even - room // 8), min(room, even + room // 8)
        size = max(range(lowest, highest + 1), key=lambda n: (seam(start + n), -abs(n - even)))
        windows.append((start, start + size))
        start += size
        require_few(len(windows))
    windows.append((start, tokens))
    return windows


def seams(text: str, offsets: Sequence[tuple[int, int]]) -> Callable[[int], int]:
    """How well a text can be cut before each of its tokens; see :func:`cut`.

    Args:
        offsets: for each token the characters it stands for, with or without the space before it.
    """

    def strength(token: int) -> int:
        at = offsets[token][0]
        first, last = at, at
        while first > max(0, at - _REACH) and text[first - 1].isspace():
            first -= 1
        while last < min(len(text), at + _REACH) and text[last].isspace():
            last += 1
        before, gap = text[first - 1 : first], text[first:last]
        if gap.count("\n") > 1:
            return _PARAGRAPH
        if (gap and before in _ENDS) or before in _ENDS_ALONE or "\n" in gap:
            return _SENTENCE
        return _SPACE if gap else _NOTHING

    return strength


def no_seams(token: int) -> int:  # noqa: ARG001
    """Of a text of which nobody knows where its tokens are."""
    return _NOTHING


def require_few(windows: int) -> None:
    """Raises RowProblem: too_long: a row has so many windows, and one more is wanted."""
    if windows >= MOST_WINDOWS:
        message = f"the text would be cut into more than {MOST_WINDOWS} windows"
        raise RowProblem("too_long", message)
