"""The watch itself: real threads and a real store, and a training that is only its notes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from datetime import timedelta

import pytest
from torch.distributed import TCPStore

from workers.ranks.train.health.pulse import Pulse
from workers.ranks.train.health.verdict import Hung
from workers.ranks.train.health.watch import Watch

PATIENCE = 1.0


class Rank:
    """One that has done a few steps, watched with little patience."""

    def __init__(self, rank: int, world_size: int, store: TCPStore | None) -> None:
        self.pulse = Pulse()
        for step in range(3):
            self.pulse.begin_step(step)
            self.pulse.end_step()
        self.found: list[Hung] = []
        self.told = threading.Event()
        self.watch = Watch(
            rank=rank,
            world_size=world_size,
            device=f"cpu{rank}@test",
            pulse=self.pulse,
            store=store,
            leader_device="cpu0@test",
            hung_after=PATIENCE,
            on_hung=self._tell,
        )

    def _tell(self, hung: Hung) -> None:
        self.found.append(hung)
        self.told.set()


@pytest.fixture
def ranks() -> Iterator[list[Rank]]:
    store = TCPStore(
        "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60)
    )
    found = [Rank(rank, 3, store.clone()) for rank in range(3)]  # type: ignore[attr-defined]
    for rank in found:
        rank.watch.start()
    yield found
    for rank in found:
        rank.watch.close()


def test_a_rank_that_is_alive_and_does_not_arrive_is_named(ranks: list[Rank]) -> None:
    for rank in ranks:
        rank.pulse.begin_step(3)
    ranks[0].pulse.wait()
    ranks[1].pulse.wait()
    for rank in ranks[:2]:
        assert rank.told.wait(60)
        assert (rank.found[0].rank, rank.found[0].device) == (2, "cpu2@test")
        assert "in its part of a step" in rank.found[0].why
    assert not ranks[2].found, "it waits for nobody"


class Device:
    """One that has not come to the end of what it was given."""

    def reached(self) -> bool:
        return False


def test_a_device_that_hangs_is_named_though_its_process_waits(ranks: list[Rank]) -> None:
    for rank in ranks:
        rank.pulse.begin_step(3)
        rank.pulse.wait(Device() if rank is ranks[1] else None)
    assert ranks[0].told.wait(60)
    assert ranks[2].told.wait(60)
    assert {hung.rank for rank in ranks for hung in rank.found} == {1}
    assert not ranks[1].found


def test_nobody_is_named_between_two_steps_or_where_all_wait(ranks: list[Rank]) -> None:
    """An evaluation takes ten times the patience of this test and more."""
    ranks[0].pulse.wait()
    assert not ranks[0].told.wait(PATIENCE * 3)
    for rank in ranks[1:]:
        rank.pulse.wait()
    assert not ranks[0].told.wait(PATIENCE * 2)
    assert not any(rank.found for rank in ranks)


def test_a_rank_without_others_says_it_of_itself() -> None:
    alone = Rank(0, 1, None)
    alone.watch.start()
    alone.pulse.begin_step(3)
    assert not alone.told.wait(PATIENCE * 2), "with nobody waiting there is more patience"
    assert alone.told.wait(60)
    assert alone.found[0].rank == 0
