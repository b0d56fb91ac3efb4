"""Placement: properties that hold for any fleet and queue, then the cases that the design names."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from scheduler.admission import order
from scheduler.matching import eligible_devices, fits, unsatisfiable
from scheduler.placement import Placement, Waiting, place
from shared.capability import GIB, device_queue
from shared.store.snapshot import DeviceState, WaitingJob
from tests.scheduler.fleets import device, fleet, fleets, job, needs, queues

worlds = {"devices": fleets(), "jobs": queues().map(order)}


@given(**worlds)
def test_no_overbooking_and_all_or_nothing(
    devices: list[DeviceState], jobs: list[WaitingJob]
) -> None:
    by_id = {d.id: d for d in devices}
    plan = place(devices, jobs)
    assert list(plan.decisions) == [j.id for j in jobs]
    given_out = [d for p in plan.placements.values() for d in p.devices]
    assert len(given_out) == len(set(given_out))
    for waiting_job in jobs:
        decision = plan.decisions[waiting_job.id]
        if isinstance(decision, Waiting):
            assert decision.reason
            continue
        asked = waiting_job.requirements
        chosen = [by_id[id] for id in decision.devices]
        assert len(chosen) == len(decision.queues)
        assert len(chosen) in (asked.world_sizes or (asked.devices,))
        assert all(d.live and d.known and not d.busy for d in chosen)
        assert all(fits(asked, d.capability) is None for d in chosen)
        assert len({(d.capability.accelerator, d.simulated) for d in chosen}) == 1
        assert decision.reason


@given(**worlds)
def test_withheld_devices_are_free_and_left_to_those_before(
    devices: list[DeviceState], jobs: list[WaitingJob]
) -> None:
    by_id = {d.id: d for d in devices}
    withheld: set[str] = set()
    for waiting_job, decision in zip(jobs, place(devices, jobs).decisions.values(), strict=True):
        if isinstance(decision, Placement):
            assert withheld.isdisjoint(decision.devices)
            continue
        assert withheld.isdisjoint(decision.withheld)
        assert all(by_id[id].live and not by_id[id].busy for id in decision.withheld)
        assert len(decision.withheld) < waiting_job.requirements.devices
        if unsatisfiable(waiting_job.requirements, devices):
            assert not decision.withheld
        withheld.update(decision.withheld)


@given(**worlds)
def test_a_job_is_not_moved_by_those_after_it(
    devices: list[DeviceState], jobs: list[WaitingJob]
) -> None:
    """Strict priority: what stands in front is decided as if nothing stood behind."""
    whole = list(place(devices, jobs).decisions.items())
    for n in range(len(jobs)):
        assert list(place(devices, jobs[:n]).decisions.items()) == whole[:n]


@given(**worlds, shuffle=st.randoms(use_true_random=False))
def test_same_input_same_plan(
    devices: list[DeviceState], jobs: list[WaitingJob], shuffle: st.DataObject
) -> None:
    shuffled = list(devices)
    shuffle.shuffle(shuffled)  # type: ignore[attr-defined]
    assert place(shuffled, jobs) == place(devices, jobs)


@given(**worlds)
def test_the_least_capable_class_that_is_free_and_fits(
    devices: list[DeviceState], jobs: list[WaitingJob]
) -> None:
    """Of the first job, to which the whole fleet is open."""
    if not jobs:
        return
    asked = jobs[0].requirements
    free = [d for d in eligible_devices(asked, devices) if d.live and not d.busy]
    decision = place(devices, jobs[:1]).decisions[jobs[0].id]
    if asked.devices > 1 or asked.world_sizes:
        return
    assert isinstance(decision, Placement) == bool(free)
    if isinstance(decision, Placement):
        chosen = next(d for d in free if d.id == decision.devices[0])
        assert chosen.capability.rank == min(d.capability.rank for d in free)


@given(**worlds)
def test_a_gang_that_may_have_different_sizes_is_as_large_as_can_be(
    devices: list[DeviceState], jobs: list[WaitingJob]
) -> None:
    """Of the first job, as one of each fixed size would be placed."""
    for first in jobs[:1]:
        asked = first.requirements
        found = place(devices, [first]).decisions[first.id]
        fixed = {
            size: place(devices, [job("fixed", replaced)]).placements
            for size in asked.world_sizes or (asked.devices,)
            for replaced in [asked.model_copy(update={"devices": size, "world_sizes": ()})]
        }
        runs = [size for size, placements in fixed.items() if placements]
        if not isinstance(found, Placement):
            assert asked.devices not in runs
        elif runs and runs[-1] <= len(found.devices):
            assert len(found.devices) == runs[-1]
        else:  # a fixed one of that size mixes classes, which one that can be smaller does not
            classes = {d.capability.rank for d in devices if d.id in found.devices}
            assert len(classes) == 1


@given(devices=fleets(), jobs=queues(), small=st.integers(1, 3))
def test_nobody_is_starved(devices: list[DeviceState], jobs: list[WaitingJob], small: int) -> None:
    """Small jobs of lower rank keep coming, and of what runs only the oldest ends in each round: every
    job that the live fleet can run gets its turn."""
    live = [d for d in devices if d.live]
    waiting = order(jobs)
    hopeless = {j.id for j in jobs if unsatisfiable(j.requirements, live)}
    running = [[d.id] for d in live if d.busy]
    for n in range((len(live) + 1) * (len(jobs) + 1)):
        newcomers = [job(f"small_{n}_{i}", priority=-9, age=n) for i in range(small)]
        busy = {id for ids in running for id in ids}
        now = [replace(d, busy=d.id in busy) for d in live]
        placements = place(now, [*waiting, *newcomers]).placements
        running += [list(p.devices) for p in placements.values()]
        waiting = [j for j in waiting if j.id not in placements]
        running = running[1:]
    assert {j.id for j in waiting} <= hopeless


@given(**worlds)
def test_hints_reach_only_devices_that_fit(
    devices: list[DeviceState], jobs: list[WaitingJob]
) -> None:
    """Any known device of a class may take a hint from the queue of the class."""
    asked = {j.id: j.requirements for j in jobs}
    for job_id, placement in place(devices, jobs).placements.items():
        for id, queue in zip(placement.devices, placement.queues, strict=True):
            if queue == device_queue(id):
                continue
            assert len(placement.devices) == 1, "ranks of a gang go to their devices"
            readers = [d for d in devices if d.known and d.capability.queue == queue]
            assert all(fits(asked[job_id], d.capability) is None for d in readers)


MIXED = fleet("2xT4-16GB,1xA100-80GB,1xH100-80GB")


def placed(devices: list[DeviceState], *jobs: WaitingJob) -> dict[str, tuple[str, ...]]:
    return {id: p.devices for id, p in place(devices, jobs).placements.items()}


def reason(devices: list[DeviceState], *jobs: WaitingJob) -> str:
    """Why the last of the jobs waits."""
    return place(devices, jobs).waiting[jobs[-1].id]


def test_rare_devices_stay_for_those_who_need_them() -> None:
    bf16, big = needs(features=("bf16",)), needs(memory_bytes=40 * GIB)
    found = placed(MIXED, job("any"), job("bf16", bf16), job("big", big))
    assert found == {"any": ("t4-0@a",), "bf16": ("a100-0@a",), "big": ("h100-0@a",)}
    assert place(MIXED, [job("any")]).placements["any"].queues == ("cuda.sm75.16g",)
    hopper = needs(compute_capability=90)
    assert placed(MIXED, job("hopper", hopper)) == {"hopper": ("h100-0@a",)}


def test_bf16_and_40_gb_never_go_to_the_t4() -> None:
    busy = [replace(d, busy=not d.id.startswith("t4")) for d in MIXED]
    for asked in (needs(features=("bf16",)), needs(memory_bytes=40 * GIB)):
        assert reason(busy, job("a", asked)) == (
            "waits for a device of class cuda.sm80.80g or better: 0 free, 2 busy"
        )


def test_single_ranks_fill_the_fullest_host() -> None:
    devices = [*fleet("3xT4", host="a"), *fleet("2xT4", host="b"), *fleet("4xT4", host="c")]
    devices[3] = replace(devices[3], busy=True)
    assert placed(devices, job("x")) == {"x": ("t4-1@b",)}


def test_a_gang_takes_the_host_with_the_least_left_over() -> None:
    devices = [*fleet("4xT4", host="a"), *fleet("2xT4", host="b"), *fleet("3xT4", host="c")]
    plan = place(devices, [job("x", needs(devices=2))])
    assert plan.placements["x"].devices == ("t4-0@b", "t4-1@b")
    assert plan.placements["x"].queues == ("device.t4-0@b", "device.t4-1@b")


def test_a_gang_spans_as_few_hosts_as_can_be() -> None:
    hosts = {"a": 2, "b": 3, "c": 2, "d": 1}
    devices = [d for host, n in hosts.items() for d in fleet(f"{n}xT4", host=host)]
    found = placed(devices, job("x", needs(devices=5)))["x"]
    assert found == ("t4-0@b", "t4-1@b", "t4-2@b", "t4-0@a", "t4-1@a")
    found = placed(devices, job("x", needs(devices=4)))["x"]
    assert found == ("t4-0@b", "t4-1@b", "t4-2@b", "t4-0@d")


def test_a_gang_is_of_one_class_where_the_fleet_has_one() -> None:
    devices = [*fleet("2xA100,1xT4"), device("t4-9@b", fleet("1xT4")[0].capability, busy=True)]
    gang = job("x", needs(devices=2))
    assert placed(devices, gang) == {"x": ("a100-0@a", "a100-1@a")}
    busy = [replace(d, busy=d.busy or d.id == "a100-1@a") for d in devices]
    assert placed(busy, gang) == {}, "it waits for two alike rather than to mix"
    assert set(placed(fleet("1xA100,1xT4"), gang)["x"]) == {"a100-0@a", "t4-0@a"}


def test_a_large_job_keeps_the_free_devices_it_will_use() -> None:
    devices = fleet("2xA100")
    devices[1] = replace(devices[1], busy=True)
    gang, small = job("gang", needs(devices=2)), job("small", age=1)
    plan = place(devices, [gang, small])
    assert plan.waiting == {
        "gang": "waits for 1 of 2 devices of class cuda.sm80.80g: 1 free, 1 busy",
        "small": "waits for a device of class cuda.sm80.80g: 0 free, 1 busy, "
        "1 kept for jobs ahead; 1 job is ahead",
    }
    assert placed(devices, replace(small, priority=1), gang) == {"small": ("a100-0@a",)}


def test_a_job_beyond_the_fleet_keeps_nothing() -> None:
    devices = fleet("2xA100")
    plan = place(devices, [job("huge", needs(devices=4)), job("small", age=1)])
    assert plan.waiting == {"huge": "needs 4 devices, the fleet has 2"}
    assert plan.placements["small"].devices == ("a100-0@a",)


def test_a_job_that_would_need_silent_devices_keeps_nothing() -> None:
    devices = [*fleet("1xA100"), *fleet("1xA100", host="dead", live=False)]
    plan = place(devices, [job("gang", needs(devices=2)), job("small", age=1)])
    assert plan.waiting == {
        "gang": "waits for 1 of 2 devices of class cuda.sm80.80g: "
        "1 free, 0 busy, 1 silent, draining or suspect"
    }
    assert plan.placements["small"].devices == ("a100-0@a",)


def test_how_many_are_ahead() -> None:
    devices = fleet("1xA100,1xT4", busy=True)
    jobs = [job(f"j{i}", age=i) for i in range(3)]
    cpu = job("cpu", needs(accelerator="cpu"), age=9)
    assert reason(devices, *jobs) == (
        "waits for a device of class cuda.sm75.16g or better: 0 free, 2 busy; 2 jobs are ahead"
    )
    assert "ahead" not in reason([*devices, device("cpu0@a", busy=True)], *jobs, cpu)


def test_cpu_slots_of_unlike_memory_get_their_own_hints() -> None:
    """The class ``cpu`` promises nothing about memory."""
    small, large = fleet("1xT4")[0].capability, device("cpu9@b").capability
    devices = [
        device("cpu0@a", replace(large, memory_bytes=4 * GIB)),
        device("cpu1@a", replace(large, memory_bytes=16 * GIB)),
    ]
    plan = place(devices, [job("big", needs(memory_bytes=10 * GIB)), job("tiny")])
    assert plan.placements["big"].queues == ("device.cpu1@a",)
    assert plan.placements["tiny"].queues == ("cpu",)
    assert small.queue != "cpu"


def test_devices_are_numbered_as_people_count() -> None:
    devices = [device(f"gpu{i}@a") for i in (10, 2, 1)]
    assert placed(devices, job("x", needs(devices=3)))["x"] == ("gpu1@a", "gpu2@a", "gpu10@a")


ELASTIC = needs(devices=2, world_sizes=(2, 4))


def test_a_range_starts_with_what_is_free() -> None:
    devices = fleet("4xA100")
    plan = place(devices, [job("x", ELASTIC)])
    assert len(plan.placements["x"].devices) == 4
    assert plan.placements["x"].reason.startswith(
        "4 of 2 to 4 devices, 4 being free; cuda.sm80.80g"
    )
    devices[0] = replace(devices[0], busy=True)
    plan = place(devices, [job("x", ELASTIC), job("small", age=1)])
    assert plan.placements["x"].devices == ("a100-1@a", "a100-2@a"), "three do not divide the batch"
    assert plan.placements["x"].reason.startswith("2 of 2 to 4 devices, 3 being free; ")
    assert plan.placements["small"].devices == ("a100-3@a",)


def test_a_range_waits_for_its_fewest_and_withholds_no_more() -> None:
    devices = [*fleet("1xA100"), *fleet("3xA100", host="b", busy=True)]
    plan = place(devices, [job("x", ELASTIC), job("small", age=1)])
    assert plan.waiting["x"] == ("waits for 1 of 2 devices of class cuda.sm80.80g: 1 free, 3 busy")
    assert plan.decisions["x"].withheld == ("a100-0@a",)  # type: ignore[union-attr]
    assert "small" in plan.waiting
    two_free = [*devices, *fleet("1xA100", host="c")]
    assert len(place(two_free, [job("x", ELASTIC)]).placements["x"].devices) == 2


def test_a_range_prefers_many_devices_to_weak_ones() -> None:
    devices = [*fleet("2xT4"), *fleet("4xA100")]
    found = placed(devices, job("x", ELASTIC), job("rest", ELASTIC, age=1))
    assert {id.partition("-")[0] for id in found["x"]} == {"a100"} and len(found["x"]) == 4
    assert found["rest"] == ("t4-0@a", "t4-1@a")


def test_a_range_beyond_the_fleet_is_beyond_it_by_its_fewest() -> None:
    assert "needs 2 devices, the fleet has 1" in reason(fleet("1xA100"), job("x", ELASTIC))
