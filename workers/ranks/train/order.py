"""Which examples make up which batch, as a pure function of the seed and the place in the training.

Nothing here has state. That is what makes resuming exact: a step that is computed again, in another
process, sees the same examples in the same order under the same dropout masks.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]

_BATCHES_SORTED_TOGETHER = 16
"""Batches drawn from one window of shuffled examples that is sorted by length: more means less
padding and less random batches."""


def derive(*parts: object) -> int:
    """A seed below 2**63 for one purpose, from what identifies it. Stable across processes."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """The batch arithmetic: global batch = ranks x micro-batch x accumulation.

    The last batch of an epoch may be partial: it is used, and normalised by what it holds.
    """

    examples: int
    ranks: int
    micro_batch: int
    accumulation: int
    epochs: int
    total_steps: int

    @property
    def global_batch(self) -> int:
        return self.ranks * self.micro_batch * self.accumulation

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.examples // self.global_batch)

    @property
    def last_batch(self) -> int:
        """Examples in the last batch of an epoch."""
        return self.examples - (self.steps_per_epoch - 1) * self.global_batch

    def place(self, step: int) -> tuple[int, int]:
        """(epoch, batch of the epoch) of a step, all counted from 0."""
        return divmod(step, self.steps_per_epoch)


def plan_batches(
    *,
    examples: int,
    ranks: int,
    global_batch: int,
    micro_batch: int | None,
    epochs: int,
    max_steps: int | None,
) -> BatchPlan:
    """Do the batch arithmetic. A ``micro_batch`` above a rank's share is cut to it.

    Raises:
        ValueError: the batch does not divide; the message is for the user.
    """
    if global_batch % ranks:
        raise ValueError(f"batch_size {global_batch} does not divide evenly over {ranks} ranks")
    share = global_batch // ranks
    micro = share if micro_batch is None else min(micro_batch, share)
    if share % micro:
        raise ValueError(
            f"batch_size {global_batch} over {ranks} rank(s) is {share} for each, which is no "
            f"multiple of micro_batch_size {micro}"
        )
    steps = epochs * -(-examples // global_batch)
    plan = BatchPlan(
        examples=examples,
        ranks=ranks,
        micro_batch=micro,
        accumulation=share // micro,
        epochs=epochs,
        total_steps=steps if max_steps is None else min(steps, max_steps),
    )
    assert plan.global_batch == global_batch  # noqa: S101  the arithmetic the log states
    return plan


def epoch_order(lengths: NDArray[np.int32], global_batch: int, seed: int, epoch: int) -> Indices:
    """The order of all examples in an epoch: each exactly once; a batch is ``global_batch`` in a row.

    Shuffled, then sorted by length within windows of several batches, longest first, and the
    batches shuffled again, so that a batch holds texts of about one length. A partial batch stays
    last: it holds the shortest of its window.
    """
    generator = np.random.Generator(np.random.Philox(key=derive(seed, "order", epoch)))
    order = generator.permutation(len(lengths)).astype(np.int64)
    window = global_batch * _BATCHES_SORTED_TOGETHER
    for start in range(0, len(order), window):
        part = order[start : start + window]
        order[start : start + window] = part[np.argsort(-lengths[part], kind="stable")]
    whole = len(order) // global_batch
    batches = order[: whole * global_batch].reshape(whole, global_batch)
    shuffled = batches[generator.permutation(whole)]
    return np.concatenate([shuffled.reshape(-1), order[whole * global_batch :]])


def micro_batches(batch: Indices, plan: BatchPlan, rank: int) -> list[Indices]:
    """A rank's micro-batches of one global batch, sorted by length as ``epoch_order`` leaves it.

    Neighbours in length are computed at the same moment on all ranks, so that none waits for
    another. Every rank gets the same number of micro-batches, because each is a step of DDP that
    all take part in: of a partial batch, some may be empty.
    """
    together = plan.ranks * plan.micro_batch
    starts = range(0, len(batch), together)
    return [batch[start : start + together][rank :: plan.ranks] for start in starts]
