"""text-classification on real text: MiniLM under a new head, its lower half as it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from gpuyard import Client
from tests.real import texts
from tests.real.scores import accuracy, correlation, majority, micro_f1
from tests.real.sources import BROWN, ROTTEN_TOMATOES, WORDNET, Source
from tests.real.table import Line
from tests.real.texts import Row, Split, split
from tests.real.trial import LOWER_HALF, run_trial

pytestmark = [pytest.mark.slow, pytest.mark.real, pytest.mark.timeout(900)]

OPTIONS = {"batch_size": 32, "warmup_ratio": 0.1, "max_length": 48, "freeze": LOWER_HALF}


def asked(rows: list[Row]) -> list[Row]:
    return [{"text": row["text"]} for row in rows]


def test_definitions_by_topic(
    client: Client, encoder: str, tmp_path: Path, tell: Callable[[Line], None]
) -> None:
    whole = texts.topics()
    data = Split(whole.train[:1000], whole.validation, whole.heldout[:300])
    trial = run_trial(
        client, tmp_path, data,
        {"task": "text-classification", "model": encoder,
         "hyperparameters": {**OPTIONS, "epochs": 2, "learning_rate": 5e-4}},
        publish="topics", asked=asked(data.heldout),
    )  # fmt: skip
    true = [row["label"] for row in data.heldout]
    said, guessed = ([row["label"] for row in rows] for rows in (trial.answers, trial.blank))
    right, chance, most = accuracy(said, true), accuracy(guessed, true), majority(true)
    tell(
        Line(
            "text-classification", "WordNet definitions, 10 topics", 1000, trial, "accuracy",
            "accuracy", chance, right, f"{most:.2f} commonest topic",
        )
    )  # fmt: skip
    assert right > max(chance, most) + 0.6


def test_reviews_of_films_that_were_never_seen(
    client: Client,
    encoder: str,
    tmp_path: Path,
    need: Callable[[Source], None],
    tell: Callable[[Line], None],
) -> None:
    need(ROTTEN_TOMATOES)
    seen, unseen = texts.reviews()
    data = Split(seen[:2000], unseen[:200], unseen[200:600])
    trial = run_trial(
        client, tmp_path, data,
        {"task": "text-classification", "model": encoder,
         "hyperparameters": {**OPTIONS, "epochs": 2, "learning_rate": 3e-4}},
        publish="verdicts", asked=asked(data.heldout),
    )  # fmt: skip
    true = [row["label"] for row in data.heldout]
    said, guessed = ([row["label"] for row in rows] for rows in (trial.answers, trial.blank))
    right, chance, most = accuracy(said, true), accuracy(guessed, true), majority(true)
    tell(
        Line(
            "text-classification", "Rotten Tomatoes, other films", 2000, trial, "accuracy",
            "accuracy", chance, right, f"{most:.2f} commonest verdict",
        )
    )  # fmt: skip
    assert right > max(chance, most) + 0.12


def test_what_a_sentence_has(
    client: Client,
    encoder: str,
    tmp_path: Path,
    need: Callable[[Source], None],
    tell: Callable[[Line], None],
) -> None:
    """Several labels a sentence, or none: those whose score is above one half."""
    need(BROWN)
    data = split(texts.traits(), 1000, 200, 200)
    trial = run_trial(
        client, tmp_path, data,
        {"task": "text-classification", "problem": "multi-label", "model": encoder,
         "hyperparameters": {**OPTIONS, "epochs": 2, "learning_rate": 5e-4}},
        publish="traits", asked=asked(data.heldout), batch={"top_k_labels": len(texts.TRAITS)},
    )  # fmt: skip
    true = [set(row["label"]) for row in data.heldout]
    said, guessed = (
        [{one["label"] for one in row["labels"] if one["score"] > 0.5} for row in rows]
        for rows in (trial.answers, trial.blank)
    )
    most = max(micro_f1([{trait}] * len(true), true) for trait in texts.TRAITS)
    right, chance = micro_f1(said, true), micro_f1(guessed, true)
    tell(
        Line(
            "… multi-label", "Brown sentences, 5 kinds of words", 1000, trial, "micro_f1",
            "micro F1", chance, right, f"{most:.2f} commonest label",
        )
    )  # fmt: skip
    assert right > max(chance, most) + 0.15


def test_how_special_a_thing_is(
    client: Client,
    encoder: str,
    tmp_path: Path,
    need: Callable[[Source], None],
    tell: Callable[[Line], None],
) -> None:
    """Regression: from a definition to how far below ``entity`` the noun stands."""
    need(WORDNET)
    data = split(texts.depths(), 1500, 200, 300)
    trial = run_trial(
        client, tmp_path, data,
        {"task": "text-classification", "problem": "regression", "model": encoder,
         "hyperparameters": {**OPTIONS, "epochs": 2, "learning_rate": 5e-4}},
        publish="depths", asked=asked(data.heldout),
    )  # fmt: skip
    true = [row["label"] for row in data.heldout]
    said, guessed = ([row["score"] for row in rows] for rows in (trial.answers, trial.blank))
    right, chance = correlation(said, true), correlation(guessed, true)
    tell(
        Line(
            "… regression", "WordNet definitions, depth of the noun", 1500, trial, "pearson",
            "Pearson's correlation", chance, right, "0 any constant",
        )
    )  # fmt: skip
    assert right > max(chance, 0.0) + 0.2
