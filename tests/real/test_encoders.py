"""fill-mask and embeddings on real text, in two linked jobs: an encoder that learns letters and sounds."""

from __future__ import annotations

import pytest

from tests.real import texts
from tests.real.scores import Baseline, accuracy, majority, recall_at_1
from tests.real.sources import CMUDICT
from tests.real.texts import Row, Split
from tests.real.trial import Answer, Trial, Trials

pytestmark = [pytest.mark.slow, pytest.mark.real, pytest.mark.timeout(1800)]

ROWS, LONGEST = 6000, 7
BERT = {"type": "bert", "hidden": 96, "layers": 2, "heads": 4, "positions": 32, "vocabulary": 128}


@pytest.fixture(scope="module")
def words(trials: Trials) -> Split:
    trials.need(CMUDICT)
    return texts.split(texts.pronunciations(LONGEST), ROWS, 300, 300)


def masked(rows: list[Row]) -> tuple[list[Row], list[str]]:
    """Each row as one line with a letter or a sound hidden, and what was there."""
    lines = [line(row).split(" ") for row in rows]
    places = [number % len(symbols) for number, symbols in enumerate(lines)]
    hidden = [symbols[place] for symbols, place in zip(lines, places, strict=True)]
    for symbols, place in zip(lines, places, strict=True):
        symbols[place] = "[MASK]"
    return [{"text": " ".join(symbols)} for symbols in lines], hidden


def line(row: Row) -> str:
    return f"{row['text']} {row['target']}"


@pytest.fixture(scope="module")
def pretrained(trials: Trials, words: Split) -> Trial:
    """A BERT from scratch that guesses hidden letters and sounds of words."""
    options = {"epochs": 4, "batch_size": 64, "learning_rate": 2e-3, "warmup_ratio": 0.1}
    return trials.run(
        words.each(lambda row: {"text": line(row)}),
        {"task": "fill-mask", "method": "pretrain", "architecture": BERT,
         "hyperparameters": {**options, "mask_probability": 0.2}},
        publish="spelling", asked=masked(words.heldout)[0], batch={"top_k_labels": 5},
    )  # fmt: skip


def test_hidden_letters_and_sounds(trials: Trials, words: Split, pretrained: Trial) -> None:
    true = masked(words.heldout)[1]
    score = pretrained.score(
        "accuracy", lambda said: accuracy(best(said), true), Baseline(majority(true), "commonest")
    )
    trials.tell(
        "fill-mask", "CMUdict, letters and sounds; BERT from scratch", pretrained,
        "perplexity", score,
    )  # fmt: skip
    assert score.gain > 0.3
    assert pretrained.metrics["perplexity"] < pretrained.before["perplexity"] / 8


def best(answers: list[Answer]) -> list[str]:
    return [answer["masks"][0]["tokens"][0]["token"] for answer in answers]


def test_words_find_their_sounds(trials: Trials, words: Split, pretrained: Trial) -> None:
    """Contrastive pairs on what was pretrained: spelling and pronunciation get vectors that are near."""
    pairs = words.each(lambda row: {"text": row["text"], "positive": row["target"]})
    options = {"epochs": 2, "batch_size": 128, "learning_rate": 2e-3, "warmup_ratio": 0.1}
    trial = trials.run(
        Split(pairs.train[:4000], pairs.validation, []),
        {"task": "embeddings", "model": f"job:{pretrained.trained.id}", "hyperparameters": options},
        publish="sounds-near",
        asked=[{"text": row[part]} for part in ("text", "target") for row in words.heldout],
    )  # fmt: skip
    score = trial.score("recall@1 of 300", found, Baseline(1 / 300, "chance"))
    trials.tell(
        "embeddings", "CMUdict, spelling ↔ sounds; on the BERT above", trial, "recall_at_1", score
    )
    assert score.gain > 0.4


def found(answers: list[Answer]) -> float:
    vectors = [answer["embedding"] for answer in answers]
    half = len(vectors) // 2
    return recall_at_1(vectors[:half], vectors[half:])
