"""How well each text finds the one that belongs to it among all of a pool. Pure."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]
CUTOFFS = (1, 5, 10)


def same_pairs(texts: list[bytes], others: list[bytes]) -> NDArray[np.bool_]:
    """[pairs, pairs]: whether pair j says nothing about pair i, as its second text also belongs to
    i: it is i's own second text again, or belongs to the same first text, or is that text itself."""
    numbers: dict[bytes, int] = {}
    first = np.array([numbers.setdefault(text, len(numbers)) for text in texts])
    second = np.array([numbers.setdefault(text, len(numbers)) for text in others])
    same: NDArray[np.bool_] = (
        (first[:, None] == first[None, :])
        | (second[:, None] == second[None, :])
        | (first[:, None] == second[None, :])
    )
    return same


def retrieval_scores(similarity: Matrix, same: NDArray[np.bool_]) -> dict[str, float]:
    """Recall at 1, 5 and 10, and the mean reciprocal rank (MRR).

    Args:
        similarity: [pairs, pairs], of first text i and second text j; j = i belongs to i.
        same: As ``same_pairs``: these compete with nobody.

    A tie counts as lost: a model that makes all texts alike finds nothing.
    """
    own = np.diagonal(similarity)[:, None]
    ranks = 1 + ((similarity >= own) & ~same).sum(axis=1)
    scores = {f"recall_at_{k}": float((ranks <= k).mean()) for k in CUTOFFS}
    return {**scores, "mrr": float((1.0 / ranks).mean())}


def contrastive_loss(similarity: Matrix, same: NDArray[np.bool_], temperature: float) -> float:
    """Mean cross entropy of finding the own second text among all that compete with it."""
    logits = similarity / temperature
    own = np.diagonal(logits).copy()
    logits[same] = -np.inf
    np.fill_diagonal(logits, own)
    top = logits.max(axis=1)
    return float((top + np.log(np.exp(logits - top[:, None]).sum(axis=1)) - own).mean())
