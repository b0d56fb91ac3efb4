"""Which examples make up which batch, as a pure function of the seed and the place in the training.

Nothing here has state. That is what makes resuming exact: a step that is computed again, in another
process, sees the same examples in the same order under the same dropout masks.

A global batch is cut into virtual shards, which do not depend on how many ranks there are: each rank
computes some of them, one after another, as its micro-batches.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

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
    widest: int
    """The most ranks that the training may have: a partial batch is cut for so many."""
    tree: bool
    """Whether gradients are added up in one tree, whatever the ranks: see ``micro_batches``."""
    micro_batch: int
    accumulation: int
    epochs: int
    total_steps: int

    @property
    def global_batch(self) -> int:
        return self.ranks * self.micro_batch * self.accumulation

    @property
    def shards(self) -> int:
        """Virtual shards of a whole batch."""
        return self.ranks * self.accumulation

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
    widest: int | None = None,
) -> BatchPlan:
    """Do the batch arithmetic.

    Where the number of ranks is fixed, ``widest`` is None, and a ``micro_batch`` above a rank's share
    is cut to it. Where attempts may have up to ``widest`` ranks, ``micro_batch`` says what a virtual
    shard is, and all attempts add up gradients in the same tree.

    Raises:
        ValueError: the batch does not divide; the message is for the user.
    """
    if global_batch % ranks:
        raise ValueError(f"batch_size {global_batch} does not divide evenly over {ranks} ranks")
    share = global_batch // ranks
    micro = share if micro_batch is None else micro_batch
    if widest is None:
        micro = min(micro, share)
    if share % micro:
        raise ValueError(
            f"batch_size {global_batch} over {ranks} rank(s) is {share} for each, which is no "
            f"multiple of micro_batch_size {micro}"
        )
    steps = epochs * -(-examples // global_batch)
    plan = BatchPlan(
        examples=examples,
        ranks=ranks,
        widest=ranks if widest is None else widest,
        tree=widest is not None,
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


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """A virtual shard, as a rank comes to compute it. A plain sum leaves the last two fields alone."""

    shard: int
    indices: Indices
    apart: bool = False
    """Its gradient begins a sum of its own: what was added up so far is set aside."""
    joins: int = 0
    """So many of the sums that were set aside are added to that of this one, the latest first."""


def virtual_shards(batch: Indices, plan: BatchPlan) -> list[Indices]:
    """A global batch, sorted by length as ``epoch_order`` leaves it, cut into neighbours.

    Of a partial batch the shards are smaller, or fewer, but enough for ``plan.widest`` ranks.
    """
    used = -(-len(batch) // plan.micro_batch)
    used = min(plan.shards, -(-used // plan.widest) * plan.widest)
    return np.array_split(batch, used)


def micro_batches(batch: Indices, plan: BatchPlan, rank: int) -> list[MicroBatch]:
    """A rank's virtual shards of one global batch, in the order in which it computes them.

    Shards are dealt out like cards, so neighbours in length are computed at about the same moment on
    all ranks and none waits long for another. Of a partial batch a rank may get nothing.

    With ``plan.tree`` the order and the sums are those of a fixed binary tree: the sum over a list of
    shards is that of its even places plus that of its odd ones, down to lists of odd length, which
    are added up in turn. The sums of two ranks are the two halves of the tree, and what is the same
    sum on one rank is the same in every bit. The price is a copy of the gradients for each sum that
    waits for another (``shared.specs.world_sizes.waiting_sums``).
    """
    shards = list(enumerate(virtual_shards(batch, plan)))
    if not plan.tree:
        own = shards[rank :: plan.ranks]
        return [MicroBatch(number, part) for number, part in own if len(part)]
    # The places of a tree that is cut short stay where they are in the whole one.
    empty = [(number, batch[:0]) for number in range(len(shards), plan.shards)]
    return _tree((shards + empty)[rank :: plan.ranks])


def _tree(shards: Sequence[tuple[int, Indices]]) -> list[MicroBatch]:
    if len(shards) % 2 or len(shards) == 2:
        return [MicroBatch(number, part) for number, part in shards if len(part)]
    even, odd = _tree(shards[::2]), _tree(shards[1::2])
    if even and odd:
        odd[0] = replace(odd[0], apart=True)
        odd[-1] = replace(odd[-1], joins=odd[-1].joins + 1)
    return even + odd


def same_bits(one: int, other: int) -> bool:
    """Whether a training in a tree comes to the same weights in every bit on two world sizes: sums of
    two are the same in either order, and how a backend adds up those of more ranks is its own affair."""
    return one == other or max(one, other) <= 2
