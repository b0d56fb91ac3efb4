"""text-generation on the Bible: a GPT-2 from scratch, then what it learned turned to other ends."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest

from tests.real import texts
from tests.real.scores import Baseline, Judge, accuracy, majority
from tests.real.sources import KING_JAMES
from tests.real.texts import Row, Split, shuffled
from tests.real.trial import Answer, Trial, Trials, only, said

pytestmark = [pytest.mark.slow, pytest.mark.real, pytest.mark.timeout(1800)]

GPT2 = {
    "type": "gpt2",
    "hidden": 128,
    "layers": 3,
    "heads": 4,
    "positions": 128,
    "vocabulary": 2000,
}
CHAPTERS = 500
"""Of the Bible, to learn from; in random order, as are those that follow them, held out."""
OPENING, WRITTEN = 8, 16
"""Words of a verse that are given, and tokens that are written behind them."""
SHARED, ENDING, HELD = 3, 20, 120
"""Words with which verses of both Testaments begin, words of each behind them at most, and openings that
are held out."""

Chapter = tuple[int, list[str]]
"""The number of the book, and the verses."""


@pytest.fixture(scope="module")
def chapters(trials: Trials) -> list[Chapter]:
    """In random order."""
    trials.need(KING_JAMES)
    found = texts.chapters()
    return [(key[0], found[key]) for key in shuffled(found)]


@pytest.fixture(scope="module")
def scripture(trials: Trials, chapters: list[Chapter]) -> Trial:
    """A GPT-2 from scratch on half of the Bible's chapters, asked to go on with verses of others."""
    rows = [{"text": " ".join(verses)} for _, verses in chapters]
    options = {"epochs": 1, "batch_size": 32, "learning_rate": 3e-3, "warmup_ratio": 0.1}
    return trials.run(
        Split(rows[:CHAPTERS], rows[CHAPTERS : CHAPTERS + 60], []),
        {"task": "text-generation", "method": "pretrain", "architecture": GPT2,
         "hyperparameters": {**options, "packing": True, "max_length": 64, "dropout": 0}},
        publish="scripture", asked=[{"prompt": text} for text in openings(chapters)],
        batch={"generation": {"max_new_tokens": WRITTEN}},
    )  # fmt: skip


def openings(chapters: list[Chapter]) -> list[str]:
    verses = (verses[0].split() for _, verses in chapters[CHAPTERS + 60 : CHAPTERS + 110])
    return [" ".join(words[:OPENING]) for words in verses if len(words) > OPENING]


def fine_tune(scripture: Trial, **options: Any) -> dict[str, Any]:
    base = {"batch_size": 32, "learning_rate": 1e-3, "warmup_ratio": 0.1, "dropout": 0}
    return {
        "task": "text-generation", "model": f"job:{scripture.trained.id}",
        "hyperparameters": {**base, **options},
    }  # fmt: skip


def test_scripture_goes_on(trials: Trials, chapters: list[Chapter], scripture: Trial) -> None:
    """Two words that follow one another in what it writes do so somewhere in the Bible."""
    asked, known = openings(chapters), neighbours_of(chapters)
    score = scripture.score(
        "pairs of words that occur", lambda answers: share_known(asked, answers, known)
    )
    trials.tell(
        "text-generation", "King James Bible; GPT-2 from scratch", scripture, "perplexity", score
    )
    assert score.gain > 0.4
    assert scripture.metrics["perplexity"] < scripture.before["perplexity"] / 10


def share_known(prompts: list[str], answers: list[Answer], known: set[tuple[str, str]]) -> float:
    """Of the pairs of words in what is written, its first with the last of the prompt among them."""
    pairs = [
        pair
        for prompt, answer in zip(prompts, answers, strict=True)
        # The last word may have been cut off.
        for pair in list(neighbours(prompt + answer["text"]))[len(prompt.split()) - 1 : -1]
    ]
    return sum(pair in known for pair in pairs) / max(1, len(pairs))


def neighbours_of(chapters: list[Chapter]) -> set[tuple[str, str]]:
    return {pair for _, verses in chapters for pair in neighbours(" ".join(verses))}


def neighbours(text: str) -> Iterator[tuple[str, str]]:
    yield from pairwise(text.split())


def test_what_was_pretrained_is_fine_tuned_to_name_the_kind_of_book(
    trials: Trials, chapters: list[Chapter], scripture: Trial
) -> None:
    learned = passages(chapters[:CHAPTERS])
    held = passages(chapters[CHAPTERS + 60 : CHAPTERS + 160])
    data = Split(learned[:2000], held[200:300], held[:200])
    trial = trials.run(
        data, fine_tune(scripture, epochs=3), publish="genres",
        asked=only("prompt", data.heldout), batch={"generation": {"max_new_tokens": 4}},
    )  # fmt: skip
    true = [row["completion"].strip() for row in data.heldout]
    score = trial.score(
        "accuracy", lambda answers: accuracy(said(answers), true),
        Baseline(majority(true), "commonest kind"),
    )  # fmt: skip
    trials.tell(
        "… prompt, completion", "the same, 6 kinds of books; on the GPT-2 above", trial,
        "perplexity", score,
    )  # fmt: skip
    assert score.gain > 0.2


def passages(chapters: list[Chapter]) -> list[Row]:
    """Three verses, 50 words at most, and which kind of book they are from."""
    rows = [
        {
            "prompt": " ".join(" ".join(verses[at : at + 3]).split()[:50]) + "\nBook:",
            "completion": f" {texts.genre(book)}",
        }
        for book, verses in chapters
        if texts.genre(book) not in ("acts", "revelation")  # one book each
        for at in range(0, len(verses) - 2, 3)
    ]
    return shuffled(rows)


def test_what_was_pretrained_learns_to_prefer_the_new_testament(
    trials: Trials, chapters: list[Chapter], scripture: Trial
) -> None:
    """DPO on pairs of real verses that begin alike: that of the New Testament is preferred. Behind openings
    of which no pair was seen, it then writes what a judge takes for the New Testament."""
    found = texts.continuations(SHARED, ENDING)
    in_order = shuffled(found)
    held, learned = in_order[:HELD], in_order[HELD:]
    data = Split(pairs(found, learned), pairs(found, held), [{"prompt": text} for text in held])
    trial = trials.run(
        data, {**fine_tune(scripture, epochs=2, learning_rate=3e-4), "preference": {}},
        publish="preferring", asked=data.heldout,
        batch={"generation": {"max_new_tokens": 24}},
    )  # fmt: skip
    judge = Judge(*(endings(found, learned, testament) for testament in (0, 1)))
    right, wrong = (judge.share(endings(found, held, testament)) for testament in (0, 1))
    assert right > 0.7 > 0.2 > wrong, "the judge tells real endings apart"
    score = trial.score(
        "judged New Testament", lambda answers: judge.share(said(answers)),
        Baseline(right, "real ones of it"),
    )  # fmt: skip
    trials.tell(
        "… preference (DPO)", "the same, verses that begin alike; on the GPT-2 above", trial,
        "reward_accuracy", score,
    )  # fmt: skip
    assert abs(trial.before["reward_margin"]) < 1e-4
    assert trial.metrics["reward_accuracy"] > 0.75
    assert trial.metrics["reward_margin"] > 0.5
    assert score.trained > score.untrained + 0.3
    # It has not forgotten how to write for that.
    assert share_known(held, trial.answers, neighbours_of(chapters)) > 0.6


def pairs(found: dict[str, tuple[list[str], list[str]]], openings: list[str]) -> list[Row]:
    """Of each opening as many pairs as the Testament with fewer verses has."""
    return [
        {"prompt": opening, "chosen": f" {chosen}", "rejected": f" {rejected}"}
        for opening in openings
        for chosen, rejected in zip(*found[opening], strict=False)
    ]


def endings(
    found: dict[str, tuple[list[str], list[str]]], openings: list[str], testament: int
) -> list[str]:
    return [text for opening in openings for text in found[opening][testament]]
