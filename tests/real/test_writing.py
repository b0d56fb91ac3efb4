"""Text that is written for a text: T5 and BART from scratch, and SmolLM2 with LoRA."""

from __future__ import annotations

import pytest

from tests.real import texts
from tests.real.scores import Baseline, accuracy, error_rate, majority, rouge_1
from tests.real.sources import CMUDICT, WORDNET
from tests.real.texts import Row, Split
from tests.real.trial import Answer, Trials, said

pytestmark = [pytest.mark.slow, pytest.mark.real, pytest.mark.timeout(1800)]

T5 = {"type": "t5", "hidden": 96, "layers": 2, "heads": 4, "positions": 32, "vocabulary": 320}
BART = {"type": "bart", "hidden": 96, "layers": 2, "heads": 4, "positions": 96, "vocabulary": 1000}
TOPICS = ("animal", "artifact", "food", "person", "plant")


def test_spelling_is_written_as_sounds(trials: Trials) -> None:
    trials.need(CMUDICT)
    data = texts.split(texts.pronunciations(6), 6000, 100, 200)
    options = {"epochs": 6, "batch_size": 64, "learning_rate": 5e-3, "warmup_ratio": 0.05}
    trial = trials.run(
        data,
        {"task": "text2text", "method": "pretrain", "architecture": T5,
         "hyperparameters": {**options, "eval_every_steps": 1000}},
        publish="sounds", asked=[{"text": row["text"]} for row in data.heldout],
        batch={"generation": {"max_new_tokens": 16}},
    )  # fmt: skip
    true = targets(data.heldout)
    score = trial.score("wrong sounds, share", lambda answers: error_rate(said(answers), true))
    trials.tell("text2text", "CMUdict, spelling → sounds; T5 from scratch", trial, "rougeL", score)
    assert score.trained < score.untrained - 0.4
    assert trial.metrics["exact_match"] >= 0.05
    assert trial.before["exact_match"] == 0


def targets(rows: list[Row]) -> list[str]:
    return [row["target"] for row in rows]


def test_a_definition_is_summed_up_in_the_kind_of_thing(trials: Trials) -> None:
    trials.need(WORDNET)
    data = texts.split(texts.kinds(150), 3500, 100, 300)
    options = {"epochs": 10, "batch_size": 64, "learning_rate": 5e-4, "warmup_ratio": 0.2}
    trial = trials.run(
        data,
        {"task": "summarization", "method": "pretrain", "architecture": BART,
         "hyperparameters": {**options, "dropout": 0, "eval_every_steps": 1000}},
        publish="kinds", asked=[{"text": row["text"]} for row in data.heldout],
        batch={"generation": {"max_new_tokens": 12}},
    )  # fmt: skip
    true = targets(data.heldout)
    commonest = max(set(true), key=true.count)
    score = trial.score(
        "ROUGE-1", lambda answers: rouge_1(said(answers), true),
        Baseline(rouge_1([commonest] * len(true), true), "commonest kind"),
    )  # fmt: skip
    trials.tell(
        "summarization", "WordNet definitions, kind of thing; BART from scratch", trial,
        "rouge1", score,
    )  # fmt: skip
    assert score.gain > 0.3
    assert trial.metrics["rouge1"] > trial.before["rouge1"] + 0.3


def test_a_chat_model_learns_to_answer_in_a_word(trials: Trials, generator: str) -> None:
    """SmolLM2 with LoRA. It is told what to choose from, so the untrained one could do it, too."""
    whole = texts.topics()
    data = Split(chosen(whole.train, 40), chosen(whole.validation, 6), chosen(whole.heldout, 12))
    options = {"epochs": 1, "batch_size": 16, "learning_rate": 2e-3, "warmup_ratio": 0.1}
    trial = trials.run(
        data.each(chat),
        {"task": "text-generation", "method": "lora", "lora": {"r": 8, "alpha": 16},
         "model": generator, "hyperparameters": options},
        publish="topic-chat", asked=[{"messages": question(row)} for row in data.heldout],
        batch={"generation": {"max_new_tokens": 6}},
    )  # fmt: skip
    true = [row["label"] for row in data.heldout]
    score = trial.score(
        "accuracy", lambda answers: accuracy(words(answers), true),
        Baseline(majority(true), "any topic"),
    )  # fmt: skip
    trials.tell("… chat, LoRA", "WordNet definitions, 5 topics; SmolLM2-135M", trial, "loss", score)
    assert score.gain > 0.3


def chosen(rows: list[Row], each: int) -> list[Row]:
    """As many of each topic, of short definitions, in the order of the rows."""
    short = [row for row in rows if len(row["text"].split()) <= 12]
    kept = {id(row) for topic in TOPICS for row in [r for r in short if r["label"] == topic][:each]}
    return [row for row in short if id(row) in kept]


def chat(row: Row) -> Row:
    return {"messages": [*question(row), {"role": "assistant", "content": row["label"]}]}


def question(row: Row) -> list[Row]:
    choice = f"Topic: {', '.join(TOPICS[:-1])} or {TOPICS[-1]}?"
    return [{"role": "system", "content": choice}, {"role": "user", "content": row["text"]}]


def words(answers: list[Answer]) -> list[str]:
    """The first word of each answer, whatever surrounds it."""
    return [(text.lower().split() or [""])[0].strip(".,:;!\"'") for text in said(answers)]
