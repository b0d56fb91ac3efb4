"""Batch jobs that share a device: who joins whom, and who may not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from scheduler.admission import order
from scheduler.matching import fits
from scheduler.placement import Placement, Waiting, place
from shared.capability import GIB, SEATS, device_queue
from shared.store.snapshot import DeviceState, Tenant, WaitingJob
from tests.scheduler.fleets import device, fleet, fleets, job, needs, queues


def batch(id: str, model: str = "tiny", memory: int = 1, **kw: Any) -> WaitingJob:
    requirements = kw.pop("requirements", needs(memory_bytes=memory * GIB))
    return job(id, requirements, model=model, shares=True, **kw)


def tenant(id: str = "t", model: str = "tiny", memory: int = 1, priority: int = 0) -> Tenant:
    return Tenant(id, priority, model, memory * GIB)


def taken(id: str, *tenants: Tenant, **kw: Any) -> DeviceState:
    return device(id, busy=True, tenants=tenants, **kw)


def chosen(devices: list[DeviceState], *jobs: WaitingJob) -> dict[str, str]:
    """The device of each job that goes somewhere."""
    return {id: p.devices[0] for id, p in place(devices, jobs).placements.items()}


def test_a_batch_job_joins_another_where_nothing_is_free() -> None:
    decision = place([taken("cpu0@a", tenant())], [batch("b")]).decisions["b"]
    assert isinstance(decision, Placement)
    assert decision.shared
    assert (decision.devices, decision.queues) == (("cpu0@a",), (device_queue("cpu0@a"),))
    assert "joins another batch job" in decision.reason
    assert "same model" in decision.reason


def test_a_free_device_comes_first_the_warm_one_before_others() -> None:
    shared = taken("cpu0@a", tenant(), warm=("tiny",))
    cold, warm = device("cpu1@a"), device("cpu2@a", warm=("tiny",))
    plan = place([shared, cold, warm], [batch("b"), batch("c"), batch("d")])
    devices = [p.devices[0] for p in plan.placements.values()]
    assert devices == ["cpu2@a", "cpu1@a", "cpu0@a"]
    first, second, third = plan.placements.values()
    assert first.queues == (device_queue("cpu2@a"),), "another device of the class is not warm"
    assert second.queues == ("cpu",)
    assert [p.shared for p in (first, second, third)] == [False, False, True]


def test_a_warm_device_is_hinted_by_its_class_where_no_other_could_take_it() -> None:
    warm, busy = device("cpu0@a", warm=("tiny",)), device("cpu1@a", busy=True)
    assert place([warm, busy], [batch("b")]).placements["b"].queues == ("cpu",)


def test_a_warm_device_is_no_reason_to_take_a_rare_one() -> None:
    devices = [fleet("1xA100-80GB", warm=("tiny",))[0], fleet("1xT4-16GB")[0]]
    assert chosen(devices, batch("b")) == {"b": "t4-0@a"}


def test_the_same_model_is_joined_before_a_warm_one_and_that_before_any() -> None:
    any_one, warm = (
        taken("cpu0@a", tenant(model="x")),
        taken("cpu1@a", tenant(model="x"), warm=("tiny",)),
    )
    same = taken("cpu2@a", tenant(), tenant("u", "x"))
    assert chosen([any_one, warm, same], batch("b")) == {"b": "cpu2@a"}
    assert chosen([any_one, warm], batch("b")) == {"b": "cpu1@a"}
    assert chosen([any_one], batch("b")) == {"b": "cpu0@a"}


def test_jobs_of_one_round_spread_over_the_devices_and_share_them() -> None:
    devices = [device("cpu0@a"), device("cpu1@a")]
    found = chosen(devices, *(batch(f"b{i}") for i in range(6)))
    assert sorted(found.values()) == 3 * ["cpu0@a"] + 3 * ["cpu1@a"]


def test_there_are_so_many_seats_and_no_more() -> None:
    found = chosen([device("cpu0@a")], *(batch(f"b{i}") for i in range(SEATS + 2)))
    assert len(found) == SEATS


def test_models_must_fit_together() -> None:
    full = taken("cpu0@a", tenant(memory=6))
    assert chosen([full], batch("b", memory=6)) == {"b": "cpu0@a"}, "the model is there once"
    assert chosen([full], batch("b", "other", memory=1)) == {"b": "cpu0@a"}
    assert chosen([full], batch("b", "other", memory=3)) == {}


def test_nobody_joins_those_of_a_higher_priority() -> None:
    urgent = taken("cpu0@a", tenant(priority=1))
    assert chosen([urgent], batch("b")) == {}
    assert chosen([urgent], batch("b", priority=1)) == {"b": "cpu0@a"}


def test_a_training_shares_with_nobody() -> None:
    assert chosen([taken("cpu0@a", tenant())], job("t")) == {}
    assert chosen([device("cpu0@a", busy=True)], batch("b")) == {}, "a whole device is taken"
    assert chosen([device("cpu0@a")], job("t"), batch("b", age=1)) == {"t": "cpu0@a"}


def test_nobody_joins_where_a_job_ahead_waits_for_the_device() -> None:
    shared = taken("cpu0@a", tenant())
    assert chosen([shared], job("t"), batch("b", age=1)) == {}
    elsewhere = job("t", needs(accelerator="cuda"))
    both = [shared, *fleet("1xT4-16GB", busy=True)]
    assert chosen(both, elsewhere, batch("b", age=1, requirements=needs(accelerator="cpu"))) == {
        "b": "cpu0@a"
    }


@st.composite
def shared_fleets(draw: st.DrawFn) -> list[DeviceState]:
    found = []
    for each in draw(fleets()):
        count = draw(st.integers(0, SEATS)) if each.busy else 0
        tenants = tuple(
            tenant(
                f"t{i}",
                draw(st.sampled_from(["tiny", "x"])),
                draw(st.integers(0, 40)),
                draw(st.integers(-2, 2)),
            )
            for i in range(count)
        )
        found.append(replace(each, tenants=tenants))
    return found


@st.composite
def mixed_queues(draw: st.DrawFn) -> list[WaitingJob]:
    jobs = draw(queues(9))
    return order(
        replace(each, shares=draw(st.booleans()), model=draw(st.sampled_from(["tiny", "x", "y"])))
        if each.requirements.devices == 1 and not each.requirements.world_sizes
        else each
        for each in jobs
    )


@given(devices=shared_fleets(), jobs=mixed_queues())
def test_seats_are_taken_by_the_rules(devices: list[DeviceState], jobs: list[WaitingJob]) -> None:
    plan = place(devices, jobs)
    by_id = {d.id: d for d in devices}
    there = {d.id: list(d.tenants) for d in devices}
    whole: set[str] = set()
    waiting: list[WaitingJob] = []
    for each in jobs:
        decision = plan.decisions[each.id]
        if isinstance(decision, Waiting):
            waiting.append(each)
            continue
        for id in decision.devices:
            found = by_id[id]
            assert found.live
            assert fits(each.requirements, found.capability) is None
            assert id not in whole
            if decision.shared:
                assert each.shares
                assert there[id], "somebody is there"
                assert all(t.priority <= each.priority for t in there[id])
                assert decision.queues == (device_queue(id),)
                assert not any(
                    fits(other.requirements, found.capability) is None
                    and other.requirements.accelerator == found.capability.accelerator
                    and place(
                        [replace(d, busy=False, tenants=()) for d in devices], [other]
                    ).placements
                    for other in waiting
                )
            else:
                assert not found.busy
                assert not there[id]
            if each.shares:
                there[id].append(Tenant(each.id, each.priority, each.model, 0))
            else:
                whole.add(id)
            assert len(there[id]) <= SEATS
