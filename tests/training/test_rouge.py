"""ROUGE: cases worked by hand, and the same as Google's rouge-score where that one can read the text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from workers.ranks.train.tasks.rouge import Rouge, rouge

SCORER = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=False)
texts = st.lists(
    st.sampled_from(["a", "b", "The", "the", "dog-cat", "x,", "9", "--", "e_f"]), max_size=70
).map(" ".join)


@pytest.mark.parametrize(
    ("reference", "text", "expected"),
    [
        ("the cat sat", "The cat sat.", Rouge(1, 1, 1)),
        ("the cat sat", "a dog", Rouge(0, 0, 0)),
        ("", "a dog", Rouge(0, 0, 0)),
        ("a dog", "", Rouge(0, 0, 0)),
        # Words: 3 of 4 and 3. Pairs: 1 of 3 and 2. In order: "the cat", or "sat the": 2 of 4 and 3.
        ("the cat sat down", "sat the cat", Rouge(6 / 7, 2 / 5, 4 / 7)),
        # Twice the same word is right twice only where it is there twice.
        ("the the cat", "the the the", Rouge(4 / 6, 2 / 4, 4 / 6)),
        ("Der Bär schläft", "der bär schläft", Rouge(1, 1, 1)),
        ("Der Bär schläft", "der Zoo schläft", Rouge(4 / 6, 0, 4 / 6)),
    ],
)
def test_scores_worked_by_hand(reference: str, text: str, expected: Rouge) -> None:
    found = rouge(reference, text)
    assert (found.one, found.two, found.longest) == pytest.approx(
        (expected.one, expected.two, expected.longest)
    )


@given(texts, texts)
def test_the_scores_are_googles(reference: str, text: str) -> None:
    theirs = {name: entry.fmeasure for name, entry in SCORER.score(reference, text).items()}
    found = rouge(reference, text)
    assert [found.one, found.two, found.longest] == pytest.approx(
        [theirs["rouge1"], theirs["rouge2"], theirs["rougeL"]]
    )
