"""How answers fare against what is true. Each is written once more here, apart from the service's own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence

import numpy as np


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


def recall_at_1(texts: Sequence[Sequence[float]], others: Sequence[Sequence[float]]) -> float:
    """Share of texts that are nearer to their own other than to those of all the rest."""
    near = np.asarray(texts) @ np.asarray(others).T
    return float((near.argmax(axis=1) == np.arange(len(near))).mean())


def _edits(a: list[str], b: list[str]) -> int:
    row = list(range(len(b) + 1))
    for i, left in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, right in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (left != right))
    return row[-1]
