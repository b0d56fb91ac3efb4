"""The order of examples: a pure function of the seed and the place, that leaves nobody out."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.training.harness import in_another_process
from workers.ranks.train.order import (
    BatchPlan,
    derive,
    epoch_order,
    micro_batches,
    plan_batches,
)

SEEDS = st.integers(0, 2**63 - 1)
LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=400)


@st.composite
def plans(draw: st.DrawFn) -> BatchPlan:
    ranks, micro = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    return plan_batches(
        examples=draw(st.integers(1, 300)),
        ranks=ranks,
        global_batch=ranks * micro * draw(st.integers(1, 4)),
        micro_batch=micro,
        epochs=draw(st.integers(1, 3)),
        max_steps=None,
    )


@given(LENGTHS, st.integers(1, 40), SEEDS, st.integers(0, 1000))
def test_an_epoch_is_a_permutation(
    lengths: list[int], global_batch: int, seed: int, epoch: int
) -> None:
    order = epoch_order(np.array(lengths, np.int32), global_batch, seed, epoch)
    assert sorted(order.tolist()) == list(range(len(lengths)))


@settings(deadline=None)
@given(plans(), SEEDS)
def test_each_example_is_computed_once_an_epoch_over_all_ranks(plan: BatchPlan, seed: int) -> None:
    lengths = np.random.default_rng(0).integers(1, 60, plan.examples).astype(np.int32)
    order = epoch_order(lengths, plan.global_batch, seed, 0)
    seen: list[int] = []
    for place in range(plan.steps_per_epoch):
        start = place * plan.global_batch
        batch = order[start : start + plan.global_batch]
        assert len(batch) == (
            plan.last_batch if place + 1 == plan.steps_per_epoch else plan.global_batch
        )
        parts = [micro_batches(batch, plan, rank) for rank in range(plan.ranks)]
        # None computes for longer than it must: a partial batch is cut for all of them.
        computed = [len(of_rank) for of_rank in parts]
        assert max(computed) - min(computed) <= 1
        assert max(computed) == -(-len(batch) // (plan.ranks * plan.micro_batch))
        assert all(
            0 < len(part.indices) <= plan.micro_batch for of_rank in parts for part in of_rank
        )
        seen += [int(i) for of_rank in parts for part in of_rank for i in part.indices]
    assert sorted(seen) == list(range(plan.examples))


def test_order_does_not_depend_on_the_process() -> None:
    np.random.seed(5)
    arguments = (np.arange(100, dtype=np.int32) % 7, 8, 42, 3)
    elsewhere = in_another_process(epoch_order, *arguments)
    assert elsewhere.tolist() == epoch_order(*arguments).tolist()


def test_epochs_and_seeds_differ() -> None:
    lengths = np.full(200, 9, np.int32)
    orders = {
        tuple(epoch_order(lengths, 8, seed, epoch)) for seed in range(3) for epoch in range(3)
    }
    assert len(orders) == 9


def test_batches_hold_texts_of_about_one_length() -> None:
    lengths = np.random.default_rng(1).integers(4, 200, 2000).astype(np.int32)
    order = epoch_order(lengths, 16, 1, 0)

    def padded(indices: np.ndarray) -> int:
        batches = [indices[i : i + 16] for i in range(0, len(indices), 16)]
        return sum(int(lengths[batch].max()) * len(batch) for batch in batches)

    assert padded(order) < 1.15 * lengths.sum()
    assert padded(np.arange(2000)) > 1.5 * lengths.sum()
    # And yet the order of batches is not the order of lengths.
    longest = [int(lengths[order[i : i + 16]].max()) for i in range(0, 2000, 16)]
    assert longest != sorted(longest, reverse=True)


@given(st.lists(st.tuples(SEEDS, st.text(max_size=5), st.integers(0, 9)), min_size=2, unique=True))
def test_derived_seeds_are_small_enough_and_differ(parts: list[tuple[int, str, int]]) -> None:
    seeds = [derive(*part) for part in parts]
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert len(set(seeds)) == len(seeds)


def test_the_batch_arithmetic() -> None:
    plan = plan_batches(
        examples=1000, ranks=2, global_batch=32, micro_batch=4, epochs=3, max_steps=None
    )
    assert (plan.micro_batch, plan.accumulation, plan.global_batch) == (4, 4, 32)
    assert (plan.steps_per_epoch, plan.last_batch, plan.total_steps) == (32, 8, 96)
    assert plan.place(70) == (2, 6)
    share = plan_batches(examples=10, ranks=4, global_batch=8, micro_batch=8, epochs=9, max_steps=3)
    assert (share.micro_batch, share.accumulation, share.total_steps) == (2, 1, 3)


@pytest.mark.parametrize(
    ("ranks", "global_batch", "micro", "says"),
    [(3, 32, None, "3 ranks"), (2, 32, 5, "micro_batch_size 5")],
)
def test_a_batch_that_does_not_divide(
    ranks: int, global_batch: int, micro: int | None, says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        plan_batches(
            examples=10,
            ranks=ranks,
            global_batch=global_batch,
            micro_batch=micro,
            epochs=1,
            max_steps=None,
        )
