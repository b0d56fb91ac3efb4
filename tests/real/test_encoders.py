"""fill-mask and embeddings on real text, in two linked jobs: an encoder that learns letters and sounds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from gpuyard import Client
from tests.real import texts
from tests.real.scores import accuracy, majority, recall_at_1
from tests.real.sources import CMUDICT, Source
from tests.real.table import Line
from tests.real.texts import Row, Split
from tests.real.trial import Answer, Trial, run_trial

pytestmark = [pytest.mark.slow, pytest.mark.real, pytest.mark.timeout(900)]

ROWS, LONGEST = 6000, 7
BERT = {"type": "bert", "hidden": 96, "layers": 2, "heads": 4, "positions": 32, "vocabulary": 128}


@pytest.fixture(scope="module")
def words(need: Callable[[Source], None]) -> Split:
    need(CMUDICT)
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
def pretrained(client: Client, words: Split, tmp_path_factory: pytest.TempPathFactory) -> Trial:
    """A BERT from scratch that guesses hidden letters and sounds of words."""
    options = {"epochs": 6, "batch_size": 64, "learning_rate": 2e-3, "warmup_ratio": 0.1}
    return run_trial(
        client, tmp_path_factory.mktemp("spelling"), words.each(lambda row: {"text": line(row)}),
        {"task": "fill-mask", "method": "pretrain", "architecture": BERT,
         "hyperparameters": {**options, "mask_probability": 0.2}},
        publish="spelling", asked=masked(words.heldout)[0], batch={"top_k_labels": 5},
    )  # fmt: skip


def test_hidden_letters_and_sounds(
    words: Split, pretrained: Trial, tell: Callable[[Line], None]
) -> None:
    true = masked(words.heldout)[1]
    right, chance = (accuracy(best(rows), true) for rows in (pretrained.answers, pretrained.blank))
    most = majority(true)
    tell(
        Line(
            "fill-mask", "CMUdict, letters and sounds; BERT from scratch", ROWS, pretrained,
            "perplexity", "accuracy", chance, right, f"{most:.2f} commonest",
        )
    )  # fmt: skip
    assert right > max(chance, most) + 0.3
    assert pretrained.metrics["perplexity"] < pretrained.before["perplexity"] / 8


def best(answers: list[Answer]) -> list[str]:
    return [answer["masks"][0]["tokens"][0]["token"] for answer in answers]


def test_words_find_their_sounds(
    client: Client, words: Split, pretrained: Trial, tmp_path: Path, tell: Callable[[Line], None]
) -> None:
    """Contrastive pairs on what was pretrained: spelling and pronunciation get vectors that are near."""
    pairs = words.each(lambda row: {"text": row["text"], "positive": row["target"]})
    data = Split(pairs.train[:4000], pairs.validation, [])
    options = {"epochs": 2, "batch_size": 128, "learning_rate": 2e-3, "warmup_ratio": 0.1}
    asked = [{"text": row[part]} for part in ("text", "target") for row in words.heldout]
    trial = run_trial(
        client, tmp_path, data,
        {"task": "embeddings", "model": f"job:{pretrained.trained.id}", "hyperparameters": options},
        publish="sounds-near", asked=asked,
    )  # fmt: skip
    right, chance = (found(rows) for rows in (trial.answers, trial.blank))
    tell(
        Line(
            "embeddings", "CMUdict, spelling ↔ sounds; on the BERT above", 4000, trial,
            "recall_at_1", "recall@1 of 300", chance, right, f"{1 / 300:.2f} chance",
        )
    )  # fmt: skip
    assert right > chance + 0.4


def found(answers: list[Answer]) -> float:
    vectors = [answer["embedding"] for answer in answers]
    half = len(vectors) // 2
    return recall_at_1(vectors[:half], vectors[half:])
