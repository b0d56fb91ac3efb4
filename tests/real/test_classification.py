"""text-classification on real text: MiniLM under a new head, its lower half as it was; and a student."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from torch import nn
from transformers import AutoModel, AutoTokenizer

from tests.e2e.stack_process import StackProcess
from tests.real import texts
from tests.real.scores import Baseline, accuracy, correlation, majority, micro_f1
from tests.real.sources import BROWN, ROTTEN_TOMATOES, WORDNET
from tests.real.texts import Row, Split, split
from tests.real.trial import LOWER_HALF, Answer, Trial, Trials, only

pytestmark = [pytest.mark.slow, pytest.mark.real, pytest.mark.timeout(1800)]

KEPT = (0, 2)
"""Layers of MiniLM that make the student."""


def classify(model: str, learning_rate: float, **more: Any) -> dict[str, Any]:
    options = {"epochs": 2, "batch_size": 32, "warmup_ratio": 0.1, "max_length": 48}
    return {
        "task": "text-classification", "model": model,
        "hyperparameters": {**options, "learning_rate": learning_rate, "freeze": LOWER_HALF},
        **more,
    }  # fmt: skip


def labels(rows: Sequence[Row]) -> list[Any]:
    return [row["label"] for row in rows]


@pytest.fixture(scope="module")
def topics() -> Split:
    whole = texts.topics()
    return Split(whole.train, whole.validation, whole.heldout[:300])


@pytest.fixture(scope="module")
def by_topic(trials: Trials, encoder: str, topics: Split) -> Trial:
    return trials.run(
        Split(topics.train[:1000], topics.validation, []), classify(encoder, 5e-4),
        publish="topics", asked=only("text", topics.heldout),
    )  # fmt: skip


def test_definitions_by_topic(trials: Trials, topics: Split, by_topic: Trial) -> None:
    true = labels(topics.heldout)
    score = by_topic.score(
        "accuracy", lambda said: accuracy(labels(said), true),
        Baseline(majority(true), "commonest topic"),
    )  # fmt: skip
    trials.tell(
        "text-classification", "WordNet definitions, 10 topics", by_topic, "accuracy", score
    )
    assert score.gain > 0.6


def test_a_student_of_two_layers_learns_from_its_teacher(
    trials: Trials, stack: StackProcess, encoder: str, topics: Split, by_topic: Trial
) -> None:
    """Distillation as for DistilBERT: some of the teacher's layers, taught by the whole of it."""
    models = stack.data / "models"
    student = AutoModel.from_pretrained(models / encoder)
    student.encoder.layer = nn.ModuleList(student.encoder.layer[number] for number in KEPT)
    student.config.num_hidden_layers = len(KEPT)
    student.save_pretrained(models / "student")
    AutoTokenizer.from_pretrained(models / encoder).save_pretrained(models / "student")
    spec = classify("student", 5e-4, method="distillation", teacher=f"job:{by_topic.trained.id}")
    spec["hyperparameters"]["freeze"] = ["*embeddings*"]
    trial = trials.run(topics, spec, publish="student", asked=only("text", topics.heldout))
    true, taught = labels(topics.heldout), labels(by_topic.answers)
    score = trial.score(
        "accuracy", lambda said: accuracy(labels(said), true),
        Baseline(majority(true), f"commonest topic; {accuracy(taught, true):.2f} the teacher"),
    )  # fmt: skip
    trials.tell(
        "… distillation", "the same; 2 layers of 6, taught by the model above", trial,
        "accuracy", score,
    )  # fmt: skip
    assert score.gain > 0.4
    assert accuracy(labels(trial.answers), taught) > accuracy(labels(trial.blank), taught) + 0.4


def test_reviews_of_films_that_were_never_seen(trials: Trials, encoder: str) -> None:
    trials.need(ROTTEN_TOMATOES)
    seen, unseen = texts.reviews()
    data = Split(seen[:1500], unseen[:200], unseen[200:600])
    trial = trials.run(
        data, classify(encoder, 3e-4), publish="verdicts", asked=only("text", data.heldout)
    )
    true = labels(data.heldout)
    score = trial.score(
        "accuracy", lambda said: accuracy(labels(said), true),
        Baseline(majority(true), "commonest verdict"),
    )  # fmt: skip
    trials.tell("text-classification", "Rotten Tomatoes, other films", trial, "accuracy", score)
    assert score.gain > 0.12


def test_what_a_sentence_has(trials: Trials, encoder: str) -> None:
    """Several labels a sentence, or none: those whose score is above one half."""
    trials.need(BROWN)
    data = split(texts.traits(), 700, 200, 200)
    trial = trials.run(
        data, classify(encoder, 5e-4, problem="multi-label"), publish="traits",
        asked=only("text", data.heldout), batch={"top_k_labels": len(texts.TRAITS)},
    )  # fmt: skip
    true = [set(row["label"]) for row in data.heldout]
    most = max(micro_f1([{trait}] * len(true), true) for trait in texts.TRAITS)
    score = trial.score(
        "micro F1", lambda said: micro_f1([likely(row) for row in said], true),
        Baseline(most, "commonest label"),
    )  # fmt: skip
    trials.tell("… multi-label", "Brown sentences, 5 kinds of words", trial, "micro_f1", score)
    assert score.gain > 0.15


def likely(answer: Answer) -> set[str]:
    return {one["label"] for one in answer["labels"] if one["score"] > 0.5}


def test_how_special_a_thing_is(trials: Trials, encoder: str) -> None:
    """Regression: from a definition to how far below ``entity`` the noun stands."""
    trials.need(WORDNET)
    data = split(texts.depths(), 1500, 200, 300)
    trial = trials.run(
        data, classify(encoder, 5e-4, problem="regression"), publish="depths",
        asked=only("text", data.heldout),
    )  # fmt: skip
    true = labels(data.heldout)
    score = trial.score(
        "Pearson's correlation", lambda said: correlation([row["score"] for row in said], true),
        Baseline(0.0, "any constant"),
    )  # fmt: skip
    trials.tell("… regression", "WordNet definitions, depth of the noun", trial, "pearson", score)
    assert score.gain > 0.2
