"""Which rows of a pool share a forward pass. Pure."""

from __future__ import annotations

from collections.abc import Sequence


def plan_batches(lengths: Sequence[int], *, max_rows: int, max_tokens: int) -> list[list[int]]:
    """Cut rows into batches of similar length, longest first.

    Every row is padded to the longest of its batch, so rows are sorted by length and a batch is
    closed when it has ``max_rows`` rows or one more would take it over ``max_tokens`` *padded*
    tokens. A row longer than the budget goes alone. Longest first: if memory is short, it shows
    at once.

    Returns:
        Batches of indices into ``lengths``; each index is in exactly one.
    """
    batches: list[list[int]] = []
    width = 0
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        fits = (
            batches and len(batches[-1]) < max_rows and (len(batches[-1]) + 1) * width <= max_tokens
        )
        if fits:
            batches[-1].append(index)
        else:
            batches.append([index])
            width = lengths[index]
    return batches
