"""token-classification on real text: sentences that people tagged, word by word."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
from seqeval.metrics import f1_score

from tests.real import texts
from tests.real.scores import Baseline, accuracy
from tests.real.sources import BROWN
from tests.real.texts import Row, split
from tests.real.trial import LOWER_HALF, Trials, only

pytestmark = [pytest.mark.slow, pytest.mark.real, pytest.mark.timeout(1800)]


def tag(model: str) -> dict[str, Any]:
    options = {"epochs": 2, "batch_size": 16, "learning_rate": 1e-3, "warmup_ratio": 0.1}
    return {
        "task": "token-classification", "model": model,
        "hyperparameters": {**options, "freeze": LOWER_HALF},
    }  # fmt: skip


def tags(rows: Sequence[Row]) -> list[list[str]]:
    """Of each row."""
    return [row["tags"] for row in rows]


def words(rows: Sequence[Row]) -> list[str]:
    """The tags of all words of all rows."""
    return [tag for row in rows for tag in row["tags"]]


def test_parts_of_speech(trials: Trials, encoder: str) -> None:
    trials.need(BROWN)
    data = split(texts.parts_of_speech(), 600, 100, 200)
    trial = trials.run(
        data, tag(encoder), publish="parts-of-speech", asked=only("tokens", data.heldout)
    )
    true = words(data.heldout)
    usual = accuracy(by_word(data.train, data.heldout), true)
    score = trial.score(
        "accuracy of words", lambda said: accuracy(words(said), true),
        Baseline(usual, "commonest tag of each word"),
    )  # fmt: skip
    trials.tell("token-classification", "Brown, 11 parts of speech", trial, "accuracy", score)
    assert score.gain > 0.05
    assert score.trained > score.untrained + 0.5


def by_word(train: list[Row], rows: list[Row]) -> list[str]:
    """What a dictionary would say: of each word the tag that it has most often, and else NOUN."""
    seen: dict[str, Counter[str]] = {}
    for row in train:
        for word, tag in zip(row["tokens"], row["tags"], strict=True):
            seen.setdefault(word.lower(), Counter())[tag] += 1
    usual = {word: tags.most_common(1)[0][0] for word, tags in seen.items()}
    return [usual.get(word.lower(), "NOUN") for row in rows for word in row["tokens"]]


def test_names(trials: Trials, encoder: str) -> None:
    """Spans in BIO. The model does not see capitals: its tokenizer makes all letters small."""
    trials.need(BROWN)
    data = split(texts.names(), 700, 100, 200)
    trial = trials.run(data, tag(encoder), publish="names", asked=only("tokens", data.heldout))
    true = tags(data.heldout)
    score = trial.score("F1 of whole names", lambda said: float(f1_score(true, tags(said))))
    trials.tell("… BIO", "Brown, proper names", trial, "f1", score)
    assert score.gain > 0.6
