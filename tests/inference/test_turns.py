"""Whose row is next."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from workers.ranks.engine.turns import Turns

Row = tuple[str, int]


def make(**limits: int) -> Turns[Row]:
    turns: Turns[Row] = Turns(lambda row: row[0])
    for owner, most in limits.items():
        turns.join(owner, most)
    return turns


def rows(owner: str, count: int) -> list[Row]:
    return [(owner, number) for number in range(count)]


def test_one_alone_gets_everything_in_its_order() -> None:
    turns = make(a=10)
    turns.add(rows("a", 4))
    assert [turns.take() for _ in range(4)] == rows("a", 4)
    assert turns.peek() is None and len(turns) == 0 and turns.inside("a") == 4


def test_a_job_of_one_row_does_not_stand_behind_thousands() -> None:
    turns = make(large=100, small=100)
    turns.add(rows("large", 1000))
    taken = [turns.take() for _ in range(20)]
    turns.add(rows("small", 1))
    assert turns.take() == ("small", 0)
    turns.done(taken[0])
    assert turns.take() == ("large", 20)


def test_no_more_than_its_limit() -> None:
    turns = make(a=2, b=1)
    turns.add(rows("a", 5))
    turns.add(rows("b", 5))
    assert Counter(owner for owner, _ in (turns.take(), turns.take(), turns.take())) == {
        "a": 2,
        "b": 1,
    }
    assert turns.peek() is None and len(turns) == 7
    turns.done(("b", 0))
    assert turns.take() == ("b", 1)


def test_what_is_given_back_is_taken_first() -> None:
    turns = make(a=4)
    turns.add(rows("a", 6))
    taken = [turns.take() for _ in range(3)]
    turns.give_back(taken[1:])
    assert turns.inside("a") == 1
    assert [turns.take() for _ in range(3)] == [("a", 1), ("a", 2), ("a", 3)]


def test_rows_of_one_that_left_are_gone() -> None:
    turns = make(a=4, b=4)
    turns.add(rows("a", 3))
    turns.add(rows("b", 1))
    row = turns.take()
    assert row == ("b", 0), "who came last is served first"
    turns.leave("b")
    turns.done(row)
    turns.give_back([row])
    assert [turns.take() for _ in range(3)] == rows("a", 3) and turns.peek() is None


@given(
    counts=st.lists(st.integers(0, 40), min_size=1, max_size=5),
    seats=st.integers(1, 6),
)
def test_each_gets_its_share_as_long_as_it_has_rows(counts: list[int], seats: int) -> None:
    """Rows that take equally long: whoever still waits was never served less than another."""
    turns = make(**{f"o{i}": 50 for i in range(len(counts))})
    for i, count in enumerate(counts):
        turns.add(rows(f"o{i}", count))
    served: Counter[str] = Counter()
    inside: list[Row] = []
    while turns.peek() is not None or inside:
        while len(inside) < seats and turns.peek() is not None:
            inside.append(turns.take())
            served[inside[-1][0]] += 1
            waiting = [f"o{i}" for i in range(len(counts)) if turns.waiting(f"o{i}")]
            if waiting:
                least = min(served[owner] for owner in waiting)
                assert max(served[owner] for owner in waiting) - least <= seats
        turns.done(inside.pop(0))
    assert served == Counter({f"o{i}": count for i, count in enumerate(counts) if count})
