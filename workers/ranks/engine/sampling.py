"""The next token of each row: greedy, or sampled with randomness that belongs to the row.

The random number of a row's n-th token is a function of (seed, row, n) alone. So a row gets the
same text whatever it is computed with, in whatever order, after any restart (at fp32; in bf16 the
logits themselves depend on the batch).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch

from shared.specs import Generation


def uniform(seed: int, row: int, step: int) -> float:
    """A number in [0, 1), fixed for (seed, row, step) on every machine."""
    digest = hashlib.blake2b(f"{seed}/{row}/{step}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2**53


def next_tokens(
    logits: torch.Tensor, sampling: Generation, rows: Sequence[tuple[int, int]]
) -> list[int]:
    """Choose one token for each row.

    Args:
        logits: [rows, vocabulary].
        sampling: temperature 0 is greedy; otherwise top-k first, then top-p, as in Transformers.
        rows: for each row its number in the input and how many tokens it has so far.
    """
    if sampling.temperature == 0:
        greedy: list[int] = logits.argmax(dim=-1).tolist()
        return greedy
    scores = logits.float() / sampling.temperature
    tokens: torch.Tensor | None = None  # None: column c is token c
    if sampling.top_k is not None and sampling.top_k < scores.shape[-1]:
        scores, tokens = scores.topk(sampling.top_k, dim=-1)
    elif sampling.top_p < 1:
        scores, tokens = scores.sort(dim=-1, descending=True, stable=True)
    # float64: the running sum over a large vocabulary would drift in float32.
    mass = scores.double().softmax(dim=-1).cumsum(dim=-1)
    total = mass[:, -1:].clone()
    if sampling.top_p < 1:
        # The smallest set whose mass reaches top_p; columns are sorted here.
        kept = (mass < sampling.top_p * total).sum(dim=-1, keepdim=True)
        total = mass.gather(-1, kept.clamp(max=mass.shape[-1] - 1))
    chance = torch.tensor(
        [[uniform(sampling.seed, row, step)] for row, step in rows],
        dtype=torch.float64,
        device=mass.device,
    )
    column = torch.searchsorted(mass, chance * total, right=True)
    column.clamp_(max=mass.shape[-1] - 1)
    chosen = column if tokens is None else tokens.gather(-1, column)
    result: list[int] = chosen[:, 0].tolist()
    return result
