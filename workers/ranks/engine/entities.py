"""From a tag a word to entities: runs of words that are one thing. Pure.

Tags are read as conlleval reads them: ``B-`` opens an entity, ``I-`` goes on with one of its label and
opens one where there is none. The forms that also mark the end (``E-``, ``L-``) and the entity of one
word (``S-``, ``U-``) are understood.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

OUTSIDE = "O"
_OPENS = frozenset("BSU")
_CLOSES = frozenset("ESLU")
_PREFIXES = frozenset("BIESLU")


@dataclass(frozen=True, slots=True)
class Entity:
    """Words ``first`` to ``last``, that one included. ``score`` is the mean of their tags' scores."""

    label: str
    score: float
    first: int
    last: int


def has_prefixes(labels: Iterable[str]) -> bool:
    """Whether a model's labels say where an entity begins; those of parts of speech do not."""
    return any(label.startswith(("B-", "I-")) and len(label) > 2 for label in labels)


def find_entities(
    tags: Sequence[str | None], scores: Sequence[float | None], *, prefixed: bool
) -> list[Entity]:
    """The entities of a row's words, in order.

    Args:
        tags: one a word; None, for a word that was not read, ends an entity.
        scores: the probability of each tag.
        prefixed: :func:`has_prefixes` of the model's labels. Without prefixes each word that is not
            ``O`` is an entity by itself: nothing says which of them belong together.
    """
    found: list[Entity] = []
    open_label: str | None = None
    start = 0

    def close(end: int) -> None:
        if open_label is not None:
            inside = [score for score in scores[start:end] if score is not None]
            found.append(Entity(open_label, sum(inside) / len(inside), start, end - 1))

    for at, tag in enumerate(tags):
        prefix, label = _split(tag) if prefixed else ("S", tag)
        if tag is None or tag == OUTSIDE:
            close(at)
            open_label = None
            continue
        if prefix in _OPENS or label != open_label:
            close(at)
            open_label, start = label, at
        if prefix in _CLOSES:
            close(at + 1)
            open_label = None
    close(len(tags))
    return found


def _split(tag: str | None) -> tuple[str, str | None]:
    """Prefix and label; a tag without prefix among others is an entity of one word."""
    if tag is not None and len(tag) > 2 and tag[1] == "-" and tag[0] in _PREFIXES:
        return tag[0], tag[2:]
    return "S", tag
