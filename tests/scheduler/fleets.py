"""Fleets and jobs as values, drawn at random or spelled out."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from hypothesis import strategies as st

from shared.capability import GIB, Capability, parse_simulated
from shared.resolved import Requirements
from shared.store.snapshot import DeviceState, WaitingJob

NOW = datetime(2030, 1, 1, tzinfo=UTC)
CAPABILITIES = (
    Capability("cpu", 0, 8 * GIB),
    Capability("cuda", 75, 15 * GIB),
    Capability("cuda", 80, 79 * GIB),
    Capability("cuda", 80, 80 * GIB),
    Capability("cuda", 90, 80 * GIB),
)


def needs(**kw: Any) -> Requirements:
    return Requirements.model_validate({"devices": 1, "accelerator": "auto", **kw})


def job(id: str, requirements: Requirements | None = None, **kw: Any) -> WaitingJob:
    return WaitingJob(
        id=id,
        priority=kw.pop("priority", 0),
        created_at=NOW + timedelta(seconds=kw.pop("age", 0)),
        requirements=requirements or needs(),
        label="train:tiny",
        **kw,
    )


def device(id: str, capability: Capability = CAPABILITIES[0], **kw: Any) -> DeviceState:
    return DeviceState(
        id=id,
        host=id.partition("@")[2],
        capability=capability,
        **{"simulated": False, "live": True, "known": True, "busy": False, **kw},
    )


def fleet(text: str, host: str = "a", **kw: Any) -> list[DeviceState]:
    """``2xA100-80GB,1xT4-16GB`` as devices a100-0@a, a100-1@a, t4-0@a."""
    found: list[DeviceState] = []
    for simulated in parse_simulated(text):
        stem = simulated.model.partition("-")[0].lower()
        number = sum(d.id.startswith(f"{stem}-") for d in found)
        found.append(device(f"{stem}-{number}@{host}", simulated.capability, **kw))
    return found


@st.composite
def fleets(draw: st.DrawFn, most: int = 9) -> list[DeviceState]:
    count = draw(st.integers(0, most))
    found = []
    for i in range(count):
        known = draw(st.sampled_from([True, True, True, False]))
        found.append(
            device(
                f"gpu{i}@{draw(st.sampled_from('abc'))}",
                draw(st.sampled_from(CAPABILITIES)),
                simulated=draw(st.sampled_from([False, False, True])),
                known=known,
                live=known and draw(st.sampled_from([True, True, True, False])),
                busy=draw(st.booleans()),
            )
        )
    return found


@st.composite
def requirements(draw: st.DrawFn) -> Requirements:
    accelerator = draw(st.sampled_from(["auto", "auto", "cpu", "cuda"]))
    sizes = draw(st.sampled_from([(1,), (1,), (1,), (2,), (3,), (4,), (1, 2), (1, 3), (2, 4, 8)]))
    return needs(
        devices=sizes[0],
        world_sizes=sizes if len(sizes) > 1 else (),
        accelerator=accelerator,
        memory_bytes=draw(st.sampled_from([0, 1, 8, 10, 16, 40, 80, 200])) * GIB,
        compute_capability=draw(st.sampled_from([0, 0, 75, 80, 90])),
        features=draw(st.sampled_from([(), (), ("bf16",), ("fp8",)])),
        memory_is_estimate=draw(st.booleans()),
    )


@st.composite
def queues(draw: st.DrawFn, most: int = 6) -> list[WaitingJob]:
    return [
        job(
            f"job_{i}",
            draw(requirements()),
            priority=draw(st.integers(-2, 2)),
            age=draw(st.integers(0, 3)),
        )
        for i in range(draw(st.integers(0, most)))
    ]
