"""token-classification on real text: sentences that people tagged, word by word."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from seqeval.metrics import f1_score

from gpuyard import Client
from tests.real import texts
from tests.real.scores import accuracy
from tests.real.sources import BROWN, Source
from tests.real.table import Line
from tests.real.texts import Row, Split, split
from tests.real.trial import LOWER_HALF, Trial, run_trial

pytestmark = [pytest.mark.slow, pytest.mark.real, pytest.mark.timeout(900)]


def run(client: Client, folder: Path, encoder: str, data: Split, publish: str) -> Trial:
    options = {"epochs": 2, "batch_size": 16, "learning_rate": 1e-3, "warmup_ratio": 0.1}
    return run_trial(
        client, folder, data,
        {"task": "token-classification", "model": encoder,
         "hyperparameters": {**options, "freeze": LOWER_HALF}},
        publish=publish, asked=[{"tokens": row["tokens"]} for row in data.heldout],
    )  # fmt: skip


def test_parts_of_speech(
    client: Client,
    encoder: str,
    tmp_path: Path,
    need: Callable[[Source], None],
    tell: Callable[[Line], None],
) -> None:
    need(BROWN)
    data = split(texts.parts_of_speech(), 600, 100, 200)
    trial = run(client, tmp_path, encoder, data, "parts-of-speech")
    true = [tag for row in data.heldout for tag in row["tags"]]
    said, guessed = (
        [tag for row in rows for tag in row["tags"]] for rows in (trial.answers, trial.blank)
    )
    right, chance = accuracy(said, true), accuracy(guessed, true)
    usual = accuracy(by_word(data.train, data.heldout), true)
    tell(
        Line(
            "token-classification", "Brown, 11 parts of speech", 600, trial, "accuracy",
            "accuracy of words", chance, right, f"{usual:.2f} commonest tag of each word",
        )
    )  # fmt: skip
    assert right > usual + 0.05
    assert right > chance + 0.5


def by_word(train: list[Row], rows: list[Row]) -> list[str]:
    """What a dictionary would say: of each word the tag that it has most often, and else NOUN."""
    seen: dict[str, Counter[str]] = {}
    for row in train:
        for word, tag in zip(row["tokens"], row["tags"], strict=True):
            seen.setdefault(word.lower(), Counter())[tag] += 1
    usual = {word: tags.most_common(1)[0][0] for word, tags in seen.items()}
    return [usual.get(word.lower(), "NOUN") for row in rows for word in row["tokens"]]


def test_names(
    client: Client,
    encoder: str,
    tmp_path: Path,
    need: Callable[[Source], None],
    tell: Callable[[Line], None],
) -> None:
    """Spans in BIO. The model does not see capitals: its tokenizer makes all letters small."""
    need(BROWN)
    data = split(texts.names(), 1000, 100, 200)
    trial = run(client, tmp_path, encoder, data, "names")
    true = [row["tags"] for row in data.heldout]
    said, guessed = ([row["tags"] for row in rows] for rows in (trial.answers, trial.blank))
    right, chance = float(f1_score(true, said)), float(f1_score(true, guessed))
    tell(
        Line("… BIO", "Brown, proper names", 1000, trial, "f1", "F1 of whole names", chance, right)
    )
    assert right > chance + 0.6
