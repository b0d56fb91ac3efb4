"""Growth and shrinking of batch jobs: properties for any fleet, then the cases that the design names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from scheduler.growth import SHORTEST_REST, YOUNGEST, ask_back, free_devices, grow
from scheduler.matching import fits
from scheduler.placement import Plan, Waiting, place
from shared.capability import device_queue
from shared.resolved import Requirements
from shared.store.batches import BatchRank, BatchWork, RunningBatch
from shared.store.snapshot import DeviceState, Tenant, WaitingJob
from tests.scheduler.fleets import device, fleet, fleets, job, needs, queues

MUCH = BatchWork(unleased=1000, rows_left=64_000, rows_done=0)
NOBODY = Plan({})


def batch(id: str, *devices: str, **kw: Any) -> RunningBatch:
    """With a held rank on each of these devices; one of ``?cpu0@a`` is reserved, one of ``!cpu0@a`` is
    asked back."""
    ranks = tuple(
        BatchRank(i, name.strip("?!"), not name.startswith("?"), name.startswith("!"))
        for i, name in enumerate(devices)
    )
    defaults: dict[str, Any] = {
        "attempt_id": f"att_{id}", "token": 1, "priority": 0, "requirements": needs(),
        "model": "tiny", "seconds_running": 60.0,
    }  # fmt: skip
    return RunningBatch(id=id, ranks=ranks, **{**defaults, **kw})


def cpus(busy: int, free: int, **kw: Any) -> list[DeviceState]:
    return [device(f"cpu{i}@a", busy=i < busy, **kw) for i in range(busy + free)]


def given_to(
    devices: list[DeviceState], *batches: RunningBatch, **work: BatchWork
) -> list[tuple[str, str]]:
    known = {each.id: work.get(each.id, MUCH) for each in batches}
    free = free_devices(devices, NOBODY)
    return [(g.batch.id, g.device_id) for g in grow(devices, free, batches, known)]


def test_free_devices_go_to_a_running_batch() -> None:
    assert given_to(cpus(1, 2), batch("a", "cpu0@a")) == [("a", "cpu1@a"), ("a", "cpu2@a")]


def test_the_hint_goes_to_the_device_alone() -> None:
    devices = cpus(1, 1)
    [growth] = grow(devices, devices[1:], [batch("a", "cpu0@a")], {"a": MUCH})
    assert growth.queue == device_queue("cpu1@a")
    assert "2 ranks share the rows" in growth.reason


def test_fewest_ranks_first_and_priority_before_that() -> None:
    a, b = batch("a", "cpu0@a", "cpu1@a"), batch("b", "cpu2@a")
    assert given_to(cpus(3, 2), a, b) == [("b", "cpu3@a"), ("a", "cpu4@a")]
    urgent = replace(a, priority=1)
    assert given_to(cpus(3, 2), urgent, b) == [("a", "cpu3@a"), ("a", "cpu4@a")]


def test_no_more_than_the_spec_allows() -> None:
    two = batch("a", "cpu0@a", requirements=needs(most=2))
    assert given_to(cpus(1, 3), two) == [("a", "cpu1@a")]
    assert given_to(cpus(1, 3), replace(two, requirements=needs(most=1))) == []


def test_no_more_than_there_are_shards_for() -> None:
    few = BatchWork(unleased=2, rows_left=100, rows_done=0)
    assert len(given_to(cpus(1, 4), batch("a", "cpu0@a"), a=few)) == 2
    on_its_way = batch("a", "cpu0@a", "?cpu1@a")
    assert len(given_to(cpus(2, 4), on_its_way, a=few)) == 1
    assert given_to(cpus(1, 4), batch("a", "cpu0@a"), a=replace(few, unleased=0)) == []


def test_not_for_jobs_that_are_about_to_be_over() -> None:
    young = batch("a", "cpu0@a", seconds_running=YOUNGEST - 0.1)
    assert given_to(cpus(1, 1), young) == []
    # 100 rows in 10 s: what is left takes as many tenths of a second.
    ten = batch("a", "cpu0@a", seconds_running=10.0)
    for left, grows in [(SHORTEST_REST * 10 - 1, False), (SHORTEST_REST * 10 + 1, True)]:
        work = BatchWork(unleased=9, rows_left=int(left), rows_done=100)
        assert bool(given_to(cpus(1, 1), ten, a=work)) == grows


def test_a_warm_device_is_preferred() -> None:
    devices = [*cpus(1, 2), device("cpu9@a", warm=("tiny",))]
    assert given_to(devices, batch("a", "cpu0@a"))[0] == ("a", "cpu9@a")


def test_a_device_that_loses_rank_after_rank_is_given_no_more() -> None:
    unlucky = batch("a", "cpu0@a", lost=("cpu1@a",) * 2)
    assert given_to(cpus(1, 2), unlucky) == [("a", "cpu1@a"), ("a", "cpu2@a")]
    broken = batch("a", "cpu0@a", lost=("cpu1@a",) * 3)
    assert given_to(cpus(1, 2), broken) == [("a", "cpu2@a")]


def test_kinds_of_devices_are_not_mixed() -> None:
    real, simulated = fleet("2xT4-16GB"), fleet("2xT4-16GB", host="b", simulated=True)
    devices = [replace(real[0], busy=True), real[1], *simulated]
    assert given_to(devices, batch("a", real[0].id)) == [("a", real[1].id)]
    mixed = [replace(cpus(1, 0)[0]), real[1]]
    assert given_to(mixed, batch("a", "cpu0@a")) == [], "it began on a CPU when there was no GPU"


def test_what_is_kept_for_a_waiting_job_is_not_given() -> None:
    devices = cpus(1, 1)
    waiting = job("w", needs(devices=2))
    plan = place(devices, [waiting])
    assert free_devices(devices, plan) == []
    placed = place(devices, [job("w")])
    assert free_devices(devices, placed) == []


def asked(
    devices: list[DeviceState], jobs: list[WaitingJob], *batches: RunningBatch
) -> list[tuple[str, int]]:
    devices = with_tenants(devices, batches)
    return [(a.batch.id, a.rank) for a in ask_back(devices, jobs, place(devices, jobs), batches)]


def with_tenants(
    devices: Sequence[DeviceState], batches: Sequence[RunningBatch]
) -> list[DeviceState]:
    """The devices as a snapshot has them: with the jobs that compute on them."""
    return [
        replace(
            device,
            tenants=tuple(
                Tenant(each.id, each.priority, each.model, 0)
                for each in batches
                for rank in each.ranks
                if rank.device_id == device.id
            ),
        )
        for device in devices
    ]


def test_the_newest_rank_is_asked_back_for_a_waiting_job() -> None:
    wide = batch("a", "cpu0@a", "cpu1@a", "cpu2@a")
    assert asked(cpus(3, 0), [job("w")], wide) == [("a", 2)]
    assert asked(cpus(3, 0), [job("w", needs(devices=2))], wide) == [("a", 2), ("a", 1)]
    assert asked(cpus(3, 1), [job("w", needs(devices=2))], wide) == [("a", 2)]
    assert asked(cpus(3, 1), [job("w")], wide) == [], "it is placed"


def test_no_more_than_is_lacking_is_asked_back() -> None:
    leaving = batch("a", "cpu0@a", "cpu1@a", "!cpu2@a")
    assert asked(cpus(3, 0), [job("w")], leaving) == []
    assert asked(cpus(3, 0), [job("w"), job("x", age=1)], leaving) == [("a", 1)]


def test_the_last_rank_is_never_asked_back() -> None:
    assert asked(cpus(1, 0), [job("w")], batch("a", "cpu0@a")) == []
    alone = batch("a", "!cpu0@a", "cpu1@a")
    assert asked(cpus(2, 0), [job("w", needs(devices=2))], alone) == []
    nobody_else = batch("a", "!cpu0@a")
    assert asked(cpus(1, 0), [job("w")], nobody_else) == []


def test_nothing_is_asked_back_in_vain() -> None:
    wide = batch("a", "cpu0@a", "cpu1@a")
    busy_with_others = cpus(4, 0)
    assert asked(busy_with_others, [job("w", needs(devices=3))], wide) == []
    elsewhere = job("w", needs(accelerator="cuda"))
    assert asked(cpus(2, 0), [elsewhere], wide) == []


def test_of_a_shared_device_all_are_asked_or_none() -> None:
    first, second = batch("a", "cpu0@a", "cpu1@a"), batch("b", "cpu1@a", "cpu2@a")
    assert asked(cpus(3, 0), [job("w")], first, second) == [("b", 1)], (
        "one rank is in the way there"
    )
    both = [("a", 1), ("b", 0)]
    alone = batch("c", "cpu0@a"), batch("d", "cpu2@a")
    assert sorted(asked(cpus(3, 0), [job("w")], first, second, *alone)) == both
    last = batch("c", "cpu1@a")
    assert asked(cpus(2, 0), [job("w")], first, last) == [("a", 0)], "the other one may not leave"
    assert asked(cpus(2, 0), [job("w", needs(devices=2))], first, last) == []
    unknown = [replace(d, tenants=(Tenant("x", 0, "tiny", 0),)) for d in cpus(2, 0)]
    wide = batch("a", "cpu0@a", "cpu1@a")
    more = [replace(d, tenants=2 * t.tenants) for d, t in zip(unknown, unknown, strict=True)]
    assert ask_back(more, [job("w")], place(more, [job("w")]), [wide]) == [], "one only begins"


def test_less_urgent_jobs_have_to_wait() -> None:
    urgent = batch("a", "cpu0@a", "cpu1@a", priority=5)
    assert asked(cpus(2, 0), [job("w", priority=4)], urgent) == []
    assert asked(cpus(2, 0), [job("w", priority=5)], urgent) == [("a", 1)]
    idle = batch("b", "cpu2@a", "cpu3@a", priority=-5)
    assert asked(cpus(4, 0), [job("w", priority=5)], urgent, idle) == [("b", 1)]


@st.composite
def batches_on(draw: st.DrawFn, devices: list[DeviceState]) -> list[RunningBatch]:
    """Running batches on some of the busy devices."""
    found: list[RunningBatch] = []
    busy = [d.id for d in devices if d.busy and d.live and not d.simulated]
    while busy and draw(st.booleans()):
        mine = [busy.pop() for _ in range(draw(st.integers(1, len(busy))))]
        marks = [draw(st.sampled_from(["", "", "?", "!"])) for _ in mine[1:]]
        names = [mine[0], *(m + d for m, d in zip(marks, mine[1:], strict=True))]
        most = draw(st.sampled_from([None, 1, 2, 5]))
        found.append(
            batch(
                f"b{len(found)}", *names,
                priority=draw(st.integers(-2, 2)),
                requirements=needs(most=most),
            )
        )  # fmt: skip
    return found


@given(data=st.data(), devices=fleets(), jobs=queues())
def test_what_is_given_is_free_and_what_is_asked_back_is_there(
    data: st.DataObject, devices: list[DeviceState], jobs: list[WaitingJob]
) -> None:
    running = data.draw(batches_on(devices))
    plan = place(devices, jobs)
    free = free_devices(devices, plan)
    growths = grow(devices, free, running, {b.id: MUCH for b in running})
    by_id = {d.id: d for d in devices}
    chosen = [g.device_id for g in growths]
    assert len(chosen) == len(set(chosen))
    assert set(chosen) <= {d.id for d in free}
    for growth in growths:
        needed: Requirements = growth.batch.requirements
        assert fits(needed, by_id[growth.device_id].capability) is None
        mine = sum(g.batch is growth.batch for g in growths)
        assert needed.most is None or len(growth.batch.ranks) + mine <= needed.most
    asked_back = ask_back(with_tenants(devices, running), jobs, plan, running)
    assert len({(a.batch.id, a.rank) for a in asked_back}) == len(asked_back)
    for each in running:
        asked_of = {a.rank for a in asked_back if a.batch is each}
        staying = [r for r in each.ranks if r.rank not in asked_of and not r.asked_back]
        assert not asked_of or any(r.held for r in staying)
        assert all(not r.asked_back for r in each.ranks if r.rank in asked_of)
    lacking = sum(
        j.requirements.devices - len(d.withheld)
        for j in jobs
        if isinstance(d := plan.decisions[j.id], Waiting)
    )
    assert len(asked_back) <= lacking
