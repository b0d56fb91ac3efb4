"""What a rank holds at once, and with how much less it is tried after memory ran out. Pure arithmetic.

A global batch comes to the same update however it is cut into micro-batches, but for rounding, and for
dropout, which draws anew for another cut. So a training that ran out of memory goes on from its
checkpoint with smaller ones.
"""

from __future__ import annotations

from shared.specs import TrainSpec


def rows_at_once(spec: TrainSpec, micro_batch: int | None) -> int:
    """The micro-batch of an attempt; ``micro_batch`` is its own, where memory had run out before."""
    return micro_batch or spec.world_sizes.micro_batch


def smaller_micro_batch(spec: TrainSpec, micro_batch: int | None, held: int) -> int | None:
    """The micro-batch to go on with after memory ran out with ``held`` rows at once: half of them, or
    less where the batch would not divide. None: there is nothing smaller, or the micro-batch is part of
    what is trained, as in embeddings, which learn from its pairs.
    """
    if spec.task == "embeddings":
        return None
    now = rows_at_once(spec, micro_batch)
    # A divisor of what divides the batch divides it as well, on every number of ranks.
    return max((n for n in range(1, held // 2 + 1) if now % n == 0), default=None)
