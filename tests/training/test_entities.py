"""Entities found in tags: cases worked by hand, and the same as seqeval on any tags."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from seqeval.metrics import f1_score, precision_score, recall_score
from seqeval.metrics.sequence_labeling import get_entities

from workers.ranks.train.tasks.entities import (
    Entity,
    count_entities,
    entity_kinds,
    find_entities,
)
from workers.ranks.train.tasks.scores import score

KINDS = ("LOC", "ORG-X", "PER")
TAGS = ("O", *(f"{prefix}-{kind}" for prefix in "BIES" for kind in KINDS))
sentences = st.lists(
    st.lists(st.tuples(st.sampled_from(TAGS), st.sampled_from(TAGS)), max_size=12),
    min_size=1,
    max_size=6,
)


@pytest.mark.parametrize(
    ("tags", "entities"),
    [
        ("O O", []),
        ("", []),
        ("B-PER I-PER O B-LOC", [("PER", 0, 2), ("LOC", 3, 4)]),
        ("B-PER B-PER", [("PER", 0, 1), ("PER", 1, 2)]),
        ("O I-PER I-PER", [("PER", 1, 3)]),
        ("B-PER I-LOC I-LOC", [("PER", 0, 1), ("LOC", 1, 3)]),
        ("I-PER B-PER I-PER", [("PER", 0, 1), ("PER", 1, 3)]),
        ("S-PER B-LOC E-LOC I-LOC", [("PER", 0, 1), ("LOC", 1, 3), ("LOC", 3, 4)]),
        ("B I O I", [("_", 0, 2), ("_", 3, 4)]),
    ],
)
def test_entities_worked_by_hand(tags: str, entities: list[tuple[str, int, int]]) -> None:
    assert find_entities(tags.split()) == [Entity(*entity) for entity in entities]


def test_an_entity_counts_only_with_its_type_and_both_ends() -> None:
    truth = ["B-PER", "I-PER", "O", "B-LOC", "I-LOC", "B-PER", "O"]
    guess = ["B-PER", "I-PER", "O", "B-LOC", "O", "B-LOC", "B-PER"]
    # Found: the first. Guessed besides: two places and a person, of which none is one.
    counts = count_entities(truth, guess, ("LOC", "PER"))
    assert counts.tolist() == [[0, 1], [2, 2], [1, 2]]


@pytest.mark.parametrize(
    ("tags", "kinds"),
    [
        (("O", "B-PER", "I-PER", "I-LOC"), ("LOC", "PER")),
        (("O", "I-PER"), ("PER",)),
        (("DET", "NOUN", "I"), ()),
        (("B", "I", "O"), ()),
    ],
)
def test_tags_are_of_entities_where_one_has_a_prefix(
    tags: tuple[str, ...], kinds: tuple[str, ...]
) -> None:
    assert entity_kinds(tags) == kinds


@given(st.lists(st.sampled_from(TAGS), max_size=20))
def test_the_entities_are_seqevals(tags: list[str]) -> None:
    theirs = [(kind, start, last + 1) for kind, start, last in get_entities(tags)]
    assert [tuple(entity) for entity in find_entities(tags)] == theirs


@given(sentences)
def test_the_scores_are_seqevals(pairs: list[list[tuple[str, str]]]) -> None:
    truth = [[true for true, _ in sentence] for sentence in pairs]
    guess = [[guessed for _, guessed in sentence] for sentence in pairs]
    counts = sum(
        (count_entities(t, g, KINDS) for t, g in zip(truth, guess, strict=True)),
        start=count_entities([], [], KINDS),
    )
    scores = score(*counts)
    assert scores.micro_precision == pytest.approx(precision_score(truth, guess, zero_division=0))
    assert scores.micro_recall == pytest.approx(recall_score(truth, guess, zero_division=0))
    assert scores.micro_f1 == pytest.approx(f1_score(truth, guess, zero_division=0))
    # seqeval lists the types that occur, as truth or as guess, sorted.
    occurring = [
        entry for entry, n in zip(scores.classes, counts[1:].sum(axis=0), strict=True) if n
    ]
    per_kind = f1_score(truth, guess, average=None, zero_division=0)
    assert [entry.f1 for entry in occurring] == pytest.approx(list(per_kind))
