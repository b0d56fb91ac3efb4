"""The next token of each row: greedy, or sampled with randomness that belongs to the row.

The random number of a row's n-th token is a function of (seed, row, n) alone. So a row gets the
same text whatever it is computed with, in whatever order, after any restart (at fp32; in bf16 the
logits themselves depend on the batch).
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from shared.specs import Generation


@dataclass(frozen=True, slots=True)
class Draw:
    """Whose next token is chosen, and how."""

    options: Generation
    row: int | str
    """Its number in the input, or another name that is its alone."""
    step: int
    """Tokens that it has so far."""


def uniform(seed: int, row: int | str, step: int) -> float:
    """A number in [0, 1), fixed for (seed, row, step) on every machine."""
    digest = hashlib.blake2b(f"{seed}/{row}/{step}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2**53


def next_tokens(logits: torch.Tensor, draws: Sequence[Draw]) -> list[int]:
    """Choose one token for each row; rows that share a pass may have options of their own.

    Args:
        logits: [rows, vocabulary].
    """
    alike: dict[tuple[float, int | None, float], list[int]] = defaultdict(list)
    for place, draw in enumerate(draws):
        options = draw.options
        alike[options.temperature, options.top_k, options.top_p].append(place)
    if len(alike) == 1:
        return _choose(logits, draws)
    chosen = [0] * len(draws)
    for places in alike.values():
        some = _choose(logits[places], [draws[place] for place in places])
        for place, token in zip(places, some, strict=True):
            chosen[place] = token
    return chosen


def _choose(logits: torch.Tensor, draws: Sequence[Draw]) -> list[int]:
    """For rows with the same options. Temperature 0 is greedy; otherwise top-k first, then top-p, as
    in Transformers."""
    options = draws[0].options
    if options.temperature == 0:
        greedy: list[int] = logits.argmax(dim=-1).tolist()
        return greedy
    scores = logits.float() / options.temperature
    tokens: torch.Tensor | None = None  # None: column c is token c
    if options.top_k is not None and options.top_k < scores.shape[-1]:
        scores, tokens = scores.topk(options.top_k, dim=-1)
    elif options.top_p < 1:
        scores, tokens = scores.sort(dim=-1, descending=True, stable=True)
    # float64: the running sum over a large vocabulary would drift in float32.
    mass = scores.double().softmax(dim=-1).cumsum(dim=-1)
    total = mass[:, -1:].clone()
    if options.top_p < 1:
        # The smallest set whose mass reaches top_p; columns are sorted here.
        kept = (mass < options.top_p * total).sum(dim=-1, keepdim=True)
        total = mass.gather(-1, kept.clamp(max=mass.shape[-1] - 1))
    chance = torch.tensor(
        [[uniform(draw.options.seed, draw.row, draw.step)] for draw in draws],
        dtype=torch.float64,
        device=mass.device,
    )
    column = torch.searchsorted(mass, chance * total, right=True)
    column.clamp_(max=mass.shape[-1] - 1)
    chosen = column if tokens is None else tokens.gather(-1, column)
    result: list[int] = chosen[:, 0].tolist()
    return result
