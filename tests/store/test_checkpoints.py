"""Which checkpoints stay, and what a claim is given of them: the newest, and what they build on."""

from __future__ import annotations

from dataclasses import replace

import pytest
from sqlalchemy.exc import IntegrityError

from shared.messages import FileDigest
from shared.store import Holder, Store, read
from shared.store.finish import fail_rank
from shared.store.report import commit_checkpoint, forget_checkpoints
from tests.store import world

MANIFEST = {"state": FileDigest(size=1, sha256="0" * 64)}


class Work:
    """A job on one device, attempt after attempt."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.worker = world.register(store, "cpu0@a")
        self.job = world.submit(store)
        self.attempt()

    def attempt(self) -> None:
        """The next attempt takes over."""
        if hasattr(self, "claimed"):
            assert self.store.call(fail_rank, self.holder, world.failure())
        attempt = world.send(self.store, self.job, ("cpu0@a", "cpu"))
        hint = world.hints(self.store, attempt.id)[0]
        self.claimed = world.claim(self.store, hint, "cpu0@a", self.worker)

    @property
    def holder(self) -> Holder:
        return self.claimed.holder

    def commit(self, step: int, best_step: int | None = None) -> None:
        path = f"{self.claimed.attempt_number}/{step}"
        assert self.store.call(commit_checkpoint, self.holder, step, path, MANIFEST, best_step)

    def forget(self, keep: int) -> list[str]:
        """The paths that are to be deleted, oldest first."""
        forgotten = self.store.call(forget_checkpoints, self.holder, keep)
        assert forgotten is not None
        return sorted(forgotten, key=lambda path: int(path.split("/")[1]))

    def kept(self) -> list[str]:
        return [row.path for row in self.store.call(read.list_checkpoints, self.job)]


def test_the_best_stays_beside_the_newest(store: Store) -> None:
    work = Work(store)
    for step, best in [(5, None), (10, 10), (15, 10), (20, 10), (25, 10)]:
        work.commit(step, best)
    assert work.forget(2) == ["1/5", "1/15"]
    assert work.kept() == ["1/25", "1/20", "1/10"]
    work.attempt()
    assert [each.path for each in work.claimed.checkpoints] == ["1/25", "1/20", "1/10"]
    assert [each.path for each in work.claimed.best] == ["1/10"]


def test_a_best_goes_with_the_last_checkpoint_that_builds_on_it(store: Store) -> None:
    work = Work(store)
    for step, best in [(10, 10), (15, 10), (20, 20)]:
        work.commit(step, best)
    assert work.forget(2) == [], "15 can only be gone on from with the best model of its time"
    work.commit(25, 20)
    assert work.forget(2) == ["1/10", "1/15"]
    assert work.kept() == ["1/25", "1/20"]
    work.commit(30, 20)
    assert work.forget(1) == ["1/25"]
    assert work.kept() == ["1/30", "1/20"]


def test_the_best_of_an_earlier_attempt_stays_for_the_next(store: Store) -> None:
    work = Work(store)
    work.commit(10, 10)
    work.attempt()
    for step in (15, 20, 25):
        work.commit(step, 10)
    assert work.forget(1) == ["2/15", "2/20"]
    assert work.kept() == ["2/25", "1/10"]


def test_an_attempt_that_began_further_back_keeps_what_it_needs(store: Store) -> None:
    """The newest were damaged: they still stand there when an attempt writes older ones anew."""
    work = Work(store)
    for step in (20, 30, 40):
        work.commit(step, 20)
    assert work.forget(2) == []
    work.attempt()
    work.commit(5, 5)
    work.commit(8, 5)
    assert work.forget(2) == []
    assert work.kept() == ["1/40", "1/30", "1/20", "2/8", "2/5"]
    work.commit(9, 9)
    assert work.forget(2) == ["2/5", "2/8"]


def test_without_early_stopping_none_is_best(store: Store) -> None:
    work = Work(store)
    for step in (1, 2, 3):
        work.commit(step)
    assert work.forget(1) == ["1/1", "1/2"]
    work.attempt()
    assert work.claimed.best == ()


def test_more_than_a_claim_lists_still_has_its_best(store: Store) -> None:
    work = Work(store)
    work.commit(1, 1)
    for step in range(2, 20):
        work.commit(step, 1)
    work.attempt()
    assert [each.step for each in work.claimed.checkpoints] == list(range(19, 9, -1))
    assert [each.step for each in work.claimed.best] == [1]


def test_no_checkpoint_builds_on_what_comes_after_it(store: Store) -> None:
    work = Work(store)
    with pytest.raises(IntegrityError, match="best_step"):
        work.commit(5, 6)


def test_a_stale_holder_forgets_nothing(store: Store) -> None:
    work = Work(store)
    work.commit(1, 1)
    assert store.call(forget_checkpoints, replace(work.holder, token=9), 1) is None
