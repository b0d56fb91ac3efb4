"""What a global batch is cut into, and how gradients are added up: on any number of ranks the same."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from shared.specs.world_sizes import waiting_sums
from workers.ranks.train.accumulate import GradientSums
from workers.ranks.train.order import (
    BatchPlan,
    Indices,
    MicroBatch,
    micro_batches,
    plan_batches,
    virtual_shards,
)

Plans = Callable[[int], BatchPlan]
"""A plan for so many ranks."""
Sum = int | tuple["Sum", "Sum"] | None
"""A shard, or what was added up of two; None: nothing."""


@st.composite
def elastic(draw: st.DrawFn) -> tuple[Plans, list[int], Indices]:
    """Plans of one training on several world sizes, the world sizes, and a batch, maybe partial."""
    shards, micro = draw(st.integers(1, 24)), draw(st.integers(1, 5))
    sizes = [size for size in range(1, shards + 1) if shards % size == 0]
    widest = draw(st.sampled_from(sizes))
    epochs, limit = draw(st.integers(1, 4)), draw(st.none() | st.integers(1, 9))
    examples = draw(st.integers(1, 300))

    def plan(ranks: int) -> BatchPlan:
        return plan_batches(
            examples=examples,
            ranks=ranks,
            global_batch=shards * micro,
            micro_batch=micro,
            epochs=epochs,
            max_steps=limit,
            widest=widest,
        )

    size = draw(st.integers(1, shards * micro))
    batch = np.random.default_rng(size).permutation(size).astype(np.int64)
    return plan, [size for size in sizes if size <= widest], batch


def summed(parts: list[MicroBatch]) -> Sum:
    """What a rank comes to, by the book: which sums it adds up, in which order."""
    waiting: list[Sum] = []
    current: Sum = None
    for part in parts:
        if part.apart:
            waiting.append(current)
            current = None
        current = part.shard if current is None else (current, part.shard)
        for _ in range(part.joins):
            current = (waiting.pop(), current)
    assert not waiting
    return current


def both(one: Sum, other: Sum) -> Sum:
    return (
        (one, other) if one is not None and other is not None else one if other is None else other
    )


@given(elastic())
def test_what_is_computed_does_not_depend_on_the_ranks(
    case: tuple[Plans, list[int], Indices],
) -> None:
    plans, sizes, batch = case
    cut = [part.tolist() for part in virtual_shards(batch, plans(1)) if len(part)]
    assert [index for part in cut for index in part] == batch.tolist()
    for size in sizes:
        plan = plans(size)
        parts = [part for rank in range(size) for part in micro_batches(batch, plan, rank)]
        found = {part.shard: part.indices.tolist() for part in parts}
        assert found == dict(enumerate(cut)) and len(parts) == len(cut)


@given(elastic())
def test_the_arithmetic_does_not_depend_on_the_ranks(
    case: tuple[Plans, list[int], Indices],
) -> None:
    plans, sizes, _ = case
    one = plans(1)
    for plan in map(plans, sizes):
        assert plan.micro_batch * plan.shards == plan.global_batch == one.global_batch
        assert (plan.steps_per_epoch, plan.total_steps) == (one.steps_per_epoch, one.total_steps)
        assert (plan.last_batch, plan.shards) == (one.last_batch, one.shards)
        assert [plan.place(step) for step in range(30)] == [one.place(step) for step in range(30)]


@given(elastic())
def test_two_ranks_add_up_what_one_does(case: tuple[Plans, list[int], Indices]) -> None:
    plans, sizes, batch = case
    if 2 not in sizes:
        return
    ranks = [summed(micro_batches(batch, plans(2), rank)) for rank in (0, 1)]
    assert summed(micro_batches(batch, plans(1), 0)) == both(*ranks)


@given(elastic())
def test_a_power_of_two_is_one_tree(case: tuple[Plans, list[int], Indices]) -> None:
    """As far as the ranks add up on their own: how a backend goes on from there is not ours."""
    plans, sizes, batch = case
    if not {2, 4} <= set(sizes):
        return
    four = [summed(micro_batches(batch, plans(4), rank)) for rank in range(4)]
    halves = [summed(micro_batches(batch, plans(2), rank)) for rank in (0, 1)]
    assert halves == [both(four[0], four[2]), both(four[1], four[3])]


@given(st.integers(1, 6), st.integers(0, 6))
def test_no_more_sums_wait_than_is_said(odd: int, doublings: int) -> None:
    shards = odd * 2**doublings
    plan = plan_batches(
        examples=shards,
        ranks=1,
        global_batch=shards,
        micro_batch=1,
        epochs=1,
        max_steps=None,
        widest=1,
    )
    waiting = most = 0
    for part in micro_batches(np.arange(shards), plan, 0):
        waiting += part.apart
        most = max(most, waiting)
        waiting -= part.joins
    assert (waiting, most) == (0, waiting_sums(shards))


def test_neighbours_in_length_are_computed_at_the_same_moment() -> None:
    plan = plan_batches(
        examples=64, ranks=4, global_batch=64, micro_batch=4, epochs=1, max_steps=None, widest=8
    )
    moments = zip(*(micro_batches(np.arange(64), plan, rank) for rank in range(4)), strict=True)
    for moment in moments:
        shards = sorted(part.shard for part in moment)
        assert shards == list(range(shards[0], shards[0] + 4))


@pytest.mark.parametrize("shards", [1, 2, 3, 4, 6, 8, 12])
def test_gradients_are_added_up_as_is_said(shards: int) -> None:
    """Numbers of which a sum depends on the order it is made in, in every bit."""
    plan = plan_batches(
        examples=shards,
        ranks=1,
        global_batch=shards,
        micro_batch=1,
        epochs=1,
        max_steps=None,
        widest=1,
    )
    numbers = torch.randn(shards, 50, generator=torch.Generator().manual_seed(shards)).exp()
    weight = nn.Parameter(torch.zeros(50))
    parts = micro_batches(np.arange(shards), plan, 0)
    sums = GradientSums([weight], nn.Identity(), plan)
    for part in parts:
        sums.before(part)
        (weight * numbers[part.shard]).sum().backward()  # type: ignore[no-untyped-call]
        sums.after(part, last=part is parts[-1])

    def by_the_book(total: Sum) -> torch.Tensor:
        if isinstance(total, tuple):
            return by_the_book(total[0]) + by_the_book(total[1])
        assert total is not None
        return numbers[total]

    assert weight.grad is not None
    assert torch.equal(weight.grad, by_the_book(summed(parts)))
    if shards > 4:
        assert not torch.equal(weight.grad, torch.stack(list(numbers)).cumsum(0)[-1])
