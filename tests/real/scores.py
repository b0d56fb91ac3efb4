"""How answers fare against what is true. Each is written once more here, apart from the service's own."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Baseline:
    """What needs no model, such as always the commonest answer."""

    value: float
    what: str


@dataclass(frozen=True, slots=True)
class Score:
    """One measure of the batch jobs' answers."""

    name: str
    trained: float
    untrained: float
    baseline: Baseline | None = None

    @property
    def gain(self) -> float:
        """Of the trained model over the better of the untrained one and the baseline; more is better."""
        others = [self.untrained, *([self.baseline.value] if self.baseline is not None else [])]
        return self.trained - max(others)


def accuracy(said: Sequence[Hashable], true: Sequence[Hashable]) -> float:
    return sum(a == b for a, b in zip(said, true, strict=True)) / len(true)


def majority(true: Sequence[Hashable]) -> float:
    """Accuracy of always saying what is true most often."""
    return Counter(true).most_common(1)[0][1] / len(true)


def micro_f1(said: Sequence[set[str]], true: Sequence[set[str]]) -> float:
    """Of all labels of all rows together."""
    hits = sum(len(a & b) for a, b in zip(said, true, strict=True))
    return 2 * hits / max(1, sum(map(len, said)) + sum(map(len, true)))


def correlation(said: Sequence[float], true: Sequence[float]) -> float:
    """Pearson's."""
    return float(np.corrcoef(said, true)[0, 1])


def error_rate(said: Sequence[str], true: Sequence[str]) -> float:
    """Edits that make the one of the other (Levenshtein), per word that is true; over all rows."""
    edits = sum(_edits(a.split(), b.split()) for a, b in zip(said, true, strict=True))
    return edits / sum(len(text.split()) for text in true)


def rouge_1(said: Sequence[str], true: Sequence[str]) -> float:
    """F1 of the words of each text, whatever their order; the mean over all."""
    return sum(
        _f1(a.lower().split(), b.lower().split()) for a, b in zip(said, true, strict=True)
    ) / len(true)


def recall_at_1(texts: Sequence[Sequence[float]], others: Sequence[Sequence[float]]) -> float:
    """Share of texts that are nearer to their own other than to those of all the rest."""
    near = np.asarray(texts) @ np.asarray(others).T
    return float((near.argmax(axis=1) == np.arange(len(near))).mean())


class Judge:
    """Of two kinds of texts, which one a text is like: naive Bayes over its words, each kind as likely."""

    def __init__(self, ones: Iterable[str], others: Iterable[str]) -> None:
        counts = [
            Counter(word for text in texts for word in _words(text)) for texts in (ones, others)
        ]
        # One more of every word, so that none is impossible (Laplace).
        totals = [sum(count.values()) + len(counts[0] | counts[1]) for count in counts]
        self._weights = {
            word: math.log((counts[0][word] + 1) / totals[0] * totals[1] / (counts[1][word] + 1))
            for word in counts[0] | counts[1]
        }

    def says_one(self, text: str) -> bool:
        return sum(self._weights.get(word, 0.0) for word in _words(text)) > 0

    def share(self, texts: Sequence[str]) -> float:
        """Of texts that are like the ones."""
        return sum(map(self.says_one, texts)) / len(texts)


def _f1(said: list[str], true: list[str]) -> float:
    hits = (Counter(said) & Counter(true)).total()
    return 2 * hits / max(1, len(said) + len(true))


def _words(text: str) -> list[str]:
    return [word.strip(".,:;!?()'").lower() for word in text.split()]


def _edits(a: list[str], b: list[str]) -> int:
    row = list(range(len(b) + 1))
    for i, left in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, right in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (left != right))
    return row[-1]
