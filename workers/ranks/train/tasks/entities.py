"""Entities in BIO tags, found as conlleval and seqeval's default mode find them. Pure.

A prefix says where in an entity a word stands: B- begins one, I- is inside, and where a data set
has them E- ends one and S- is one of a single word. Whatever else is outside of every entity. An
I- after O or after another type opens an entity, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from workers.ranks.train.tasks.scores import Counts

_OUTSIDE = ""
_NAMELESS = "_"
"""The type of a bare ``B`` or ``I``."""


class Entity(NamedTuple):
    """The words ``start`` to ``end`` (exclusive), and the type they have together."""

    kind: str
    start: int
    end: int


def entity_kinds(tags: Sequence[str]) -> tuple[str, ...]:
    """The types of entity that a set of tags tells apart, sorted; none where no tag begins with
    ``B-`` or ``I-``, as with parts of speech."""
    if not any(tag.startswith(("B-", "I-")) for tag in tags):
        return ()
    return tuple(sorted({kind for prefix, kind in map(_parts, tags) if prefix != _OUTSIDE}))


def find_entities(tags: Sequence[str]) -> list[Entity]:
    """The entities of one sequence of tags, in order."""
    found: list[Entity] = []
    kind, start, before = "", 0, _OUTSIDE
    for place, tag in enumerate((*tags, "O")):
        prefix, named = _parts(tag)
        goes_on = before in ("B", "I") and prefix in ("I", "E") and named == kind
        if before != _OUTSIDE and not goes_on:
            found.append(Entity(kind, start, place))
        if prefix != _OUTSIDE and not goes_on:
            kind, start = named, place
        before = prefix
    return found


def count_entities(truth: Sequence[str], guess: Sequence[str], kinds: Sequence[str]) -> Counts:
    """[3, kinds]: entities that were found with type and both ends right, that were guessed, and that
    there are."""
    right, guessed = set(find_entities(truth)), set(find_entities(guess))
    column = {kind: index for index, kind in enumerate(kinds)}
    counts = np.zeros((3, len(kinds)), np.float64)
    for row, entities in enumerate((right & guessed, guessed, right)):
        for entity in entities:
            counts[row, column[entity.kind]] += 1
    return counts


def _parts(tag: str) -> tuple[str, str]:
    """(prefix, type) of a tag; the prefix is empty outside of entities."""
    prefix, _, kind = tag.partition("-")
    return (prefix, kind or _NAMELESS) if prefix in ("B", "I", "E", "S") else (_OUTSIDE, "")
