"""Text that is written: T5 and GPT-2 from scratch, the latter then fine-tuned, and SmolLM2 with LoRA."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from gpuyard import Client
from tests.real import texts
from tests.real.scores import accuracy, error_rate, majority
from tests.real.sources import CMUDICT, KING_JAMES, Source
from tests.real.table import Line
from tests.real.texts import Row, Split, shuffled
from tests.real.trial import Answer, Trial, run_trial

pytestmark = [pytest.mark.slow, pytest.mark.real, pytest.mark.timeout(900)]

T5 = {"type": "t5", "hidden": 96, "layers": 2, "heads": 4, "positions": 32, "vocabulary": 320}
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
TOPICS = ("animal", "artifact", "food", "person", "plant")


def said(answers: list[Answer]) -> list[str]:
    return [answer["text"].strip() for answer in answers]


def test_spelling_is_written_as_sounds(
    client: Client, tmp_path: Path, need: Callable[[Source], None], tell: Callable[[Line], None]
) -> None:
    need(CMUDICT)
    data = texts.split(texts.pronunciations(6), 6000, 100, 200)
    options = {"epochs": 6, "batch_size": 64, "learning_rate": 5e-3, "warmup_ratio": 0.05}
    trial = run_trial(
        client, tmp_path, data,
        {"task": "text2text", "method": "pretrain", "architecture": T5,
         "hyperparameters": {**options, "eval_every_steps": 1000}},
        publish="sounds", asked=[{"text": row["text"]} for row in data.heldout],
        batch={"generation": {"max_new_tokens": 16}},
    )  # fmt: skip
    true = [row["target"] for row in data.heldout]
    wrong, chance = (error_rate(said(rows), true) for rows in (trial.answers, trial.blank))
    tell(
        Line(
            "text2text", "CMUdict, spelling → sounds; T5 from scratch", 6000, trial, "rougeL",
            "wrong sounds, share", chance, wrong,
        )
    )  # fmt: skip
    assert wrong < chance - 0.4
    assert trial.metrics["exact_match"] >= 0.05
    assert trial.before["exact_match"] == 0


@pytest.fixture(scope="module")
def chapters(need: Callable[[Source], None]) -> list[tuple[int, list[str]]]:
    """The number of the book and the verses of each chapter, in random order."""
    need(KING_JAMES)
    found = texts.chapters()
    return [(key[0], found[key]) for key in shuffled(found)]


@pytest.fixture(scope="module")
def scripture(
    client: Client, chapters: list[tuple[int, list[str]]], tmp_path_factory: pytest.TempPathFactory
) -> Trial:
    """A GPT-2 from scratch on half of the Bible's chapters, asked to go on with verses of others."""
    rows = [{"text": " ".join(verses)} for _, verses in chapters]
    options = {"epochs": 1, "batch_size": 32, "learning_rate": 3e-3, "warmup_ratio": 0.1}
    return run_trial(
        client, tmp_path_factory.mktemp("scripture"),
        Split(rows[:CHAPTERS], rows[CHAPTERS : CHAPTERS + 60], []),
        {"task": "text-generation", "method": "pretrain", "architecture": GPT2,
         "hyperparameters": {**options, "packing": True, "max_length": 64, "dropout": 0}},
        publish="scripture", asked=[{"prompt": text} for text in openings(chapters)],
        batch={"generation": {"max_new_tokens": WRITTEN}},
    )  # fmt: skip


def openings(chapters: list[tuple[int, list[str]]]) -> list[str]:
    verses = (verses[0].split() for _, verses in chapters[CHAPTERS + 60 : CHAPTERS + 110])
    return [" ".join(words[:OPENING]) for words in verses if len(words) > OPENING]


def test_scripture_goes_on(
    chapters: list[tuple[int, list[str]]], scripture: Trial, tell: Callable[[Line], None]
) -> None:
    """Two words that follow one another in what it writes do so somewhere in the Bible."""
    known = {pair for _, verses in chapters for pair in neighbours(" ".join(verses))}
    asked = openings(chapters)
    right, chance = (
        share_known(asked, rows, known) for rows in (scripture.answers, scripture.blank)
    )
    tell(
        Line(
            "text-generation", "King James Bible; GPT-2 from scratch", CHAPTERS, scripture,
            "perplexity", "pairs of words that occur", chance, right,
        )
    )  # fmt: skip
    assert scripture.metrics["perplexity"] < scripture.before["perplexity"] / 10
    assert right > chance + 0.4


def share_known(asked: list[str], answers: list[Answer], known: set[tuple[str, str]]) -> float:
    pairs = [
        pair
        for prompt, answer in zip(asked, answers, strict=True)
        # The last word may have been cut off.
        for pair in list(neighbours(prompt + answer["text"]))[OPENING - 1 : -1]
    ]
    return sum(pair in known for pair in pairs) / max(1, len(pairs))


def neighbours(text: str) -> Iterator[tuple[str, str]]:
    yield from pairwise(text.split())


def test_what_was_pretrained_is_fine_tuned_to_name_the_kind_of_book(
    client: Client,
    chapters: list[tuple[int, list[str]]],
    scripture: Trial,
    tmp_path: Path,
    tell: Callable[[Line], None],
) -> None:
    learned, held = (
        passages(chapters[:CHAPTERS]),
        passages(chapters[CHAPTERS + 60 : CHAPTERS + 160]),
    )
    data = Split(learned[:2000], held[200:300], held[:200])
    options = {"epochs": 3, "batch_size": 32, "learning_rate": 1e-3, "warmup_ratio": 0.1}
    trial = run_trial(
        client, tmp_path, data,
        {"task": "text-generation", "model": f"job:{scripture.trained.id}",
         "hyperparameters": {**options, "dropout": 0}},
        publish="genres", asked=[{"prompt": row["prompt"]} for row in data.heldout],
        batch={"generation": {"max_new_tokens": 4}},
    )  # fmt: skip
    true = [row["completion"].strip() for row in data.heldout]
    right, chance = (accuracy(said(rows), true) for rows in (trial.answers, trial.blank))
    most = majority(true)
    tell(
        Line(
            "… prompt, completion", "the same, 6 kinds of books; on the GPT-2 above", 2000, trial,
            "perplexity", "accuracy", chance, right, f"{most:.2f} commonest kind",
        )
    )  # fmt: skip
    assert right > max(chance, most) + 0.2


def passages(chapters: list[tuple[int, list[str]]]) -> list[Row]:
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


def test_a_chat_model_learns_to_answer_in_a_word(
    client: Client, generator: str, tmp_path: Path, tell: Callable[[Line], None]
) -> None:
    """SmolLM2 with LoRA. It is told what to choose from, so the untrained one could do it, too."""
    whole = texts.topics()
    data = Split(chosen(whole.train, 60), chosen(whole.validation, 6), chosen(whole.heldout, 12))
    spec = {
        "task": "text-generation",
        "method": "lora",
        "lora": {"r": 8, "alpha": 16},
        "model": generator,
        "hyperparameters": {
            "epochs": 1, "batch_size": 16, "learning_rate": 2e-3, "warmup_ratio": 0.1,
        },
    }  # fmt: skip
    trial = run_trial(
        client, tmp_path, data.each(chat), spec, publish="topic-chat",
        asked=[{"messages": question(row)} for row in data.heldout],
        batch={"generation": {"max_new_tokens": 6}},
    )  # fmt: skip
    true = [row["label"] for row in data.heldout]
    right, chance = (accuracy(words(rows), true) for rows in (trial.answers, trial.blank))
    tell(
        Line(
            "… chat, LoRA", "WordNet definitions, 5 topics; SmolLM2-135M", len(data.train), trial,
            "loss", "accuracy", chance, right, f"{majority(true):.2f} any topic",
        )
    )  # fmt: skip
    assert right > max(chance, majority(true)) + 0.3


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
