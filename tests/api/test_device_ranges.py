"""A training that may run on different numbers of devices: which ones, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from scheduler.submission.requirements import asked
from shared.errors import InvalidSpec
from shared.specs import TrainSpec, parse_spec
from shared.specs.world_sizes import fixed_world_size, waiting_sums, world_sizes

Spec = Callable[..., dict[str, Any]]


def spec(**changes: Any) -> dict[str, Any]:
    return {
        "kind": "train",
        "task": "text-classification",
        "model": "m",
        "data": {"train": "t.jsonl"},
        **changes,
    }


@pytest.mark.parametrize(
    ("devices", "hyperparameters", "says"),
    [
        (
            {"min": 5, "max": 7},
            {},
            "hyperparameters.batch_size 32 is the global batch and divides evenly over no number of "
            "devices from 5 to 7 (resources.devices)",
        ),
        (
            {"min": 3, "max": 8},
            {"micro_batch_size": 16},
            "hyperparameters.batch_size 32 is 2 micro-batches of 16, which divide evenly over no "
            "number of devices from 3 to 8 (resources.devices)",
        ),
        (
            {"min": 1, "max": 2},
            {"micro_batch_size": 5},
            "hyperparameters.batch_size 32 is no multiple of hyperparameters.micro_batch_size 5",
        ),
        ({"min": 4, "max": 2}, {}, "resources.devices.min 4 is above max 2"),
        ({"min": 4}, {}, "resources.devices.max is required"),
        ({"min": 1, "max": 2, "step": 1}, {}, "unknown field 'resources.devices.step'"),
        ({"min": 0, "max": 2}, {}, "resources.devices.min must be at least 1, not 0"),
        ("all", {}, "resources.devices must be a whole number, not 'all'"),
        (0, {}, "resources.devices must be at least 1, not 0"),
    ],
)
def test_ranges_that_make_no_sense(
    devices: Any, hyperparameters: dict[str, Any], says: str
) -> None:
    with pytest.raises(InvalidSpec) as caught:
        parse_spec(spec(resources={"devices": devices}, hyperparameters=hyperparameters))
    assert caught.value.message == says


def test_embeddings_need_two_pairs_on_the_most_devices_too() -> None:
    asked = {"batch_size": 8}
    wide = spec(
        task="embeddings", hyperparameters=asked, resources={"devices": {"min": 2, "max": 8}}
    )
    with pytest.raises(InvalidSpec, match=r"over resources\.devices 8 leaves one pair alone"):
        parse_spec(wide)
    parse_spec({**wide, "hyperparameters": {**asked, "micro_batch_size": 2}})


BATCH = {"kind": "infer", "task": "text-classification", "model": "m", "rows": [{"text": "a"}]}


@pytest.mark.parametrize(
    ("devices", "most"), [(1, 1), (4, 4), ({"min": 1, "max": 3}, 3), (None, None)]
)
def test_a_batch_job_starts_on_one_device_and_may_have_more(devices: Any, most: int | None) -> None:
    parsed = parse_spec({**BATCH, "resources": {"devices": devices}})
    needs = asked(parsed)
    assert (needs.devices, needs.world_sizes, needs.most) == (1, (), most)
    stored = parsed.model_dump(mode="json")
    assert stored["resources"]["devices"] == devices
    assert parse_spec(stored) == parsed


def test_left_out_devices_of_a_batch_job_stay_left_out() -> None:
    stored = parse_spec(BATCH).model_dump(mode="json")
    assert stored["resources"]["devices"] is None
    assert asked(parse_spec(stored)).most is None
    assert parse_spec(spec()).model_dump(mode="json")["resources"]["devices"] == 1


def test_a_batch_job_does_not_wait_for_several_devices() -> None:
    with pytest.raises(InvalidSpec, match=r"resources\.devices\.min must be 1, not 2") as caught:
        parse_spec({**BATCH, "resources": {"devices": {"min": 2, "max": 3}}})
    assert caught.value.param == "resources"
    with pytest.raises(InvalidSpec):
        parse_spec({**BATCH, "resources": {"devices": 0}})


@pytest.mark.parametrize(
    ("batch", "micro", "least", "most", "expected"),
    [
        (32, None, 1, 2, (16, (1, 2))),
        (32, None, 2, 6, (8, (2, 4))),
        (32, 4, 2, 8, (4, (2, 4, 8))),
        (24, 4, 1, 8, (4, (1, 2, 3, 6))),
        (12, None, 3, 5, (3, (4,))),
    ],
)
def test_the_usable_world_sizes(
    batch: int, micro: int | None, least: int, most: int, expected: tuple[int, tuple[int, ...]]
) -> None:
    found = world_sizes(batch, micro, least, most)
    assert (found.micro_batch, found.usable) == expected


@given(st.integers(1, 500), st.none() | st.integers(1, 40), st.integers(1, 12), st.integers(0, 8))
def test_a_usable_world_size_gives_each_rank_whole_micro_batches(
    batch: int, micro: int | None, least: int, further: int
) -> None:
    assume(micro is None or micro <= batch)
    try:
        found = world_sizes(batch, micro, least, least + further)
    except ValueError:
        sizes = range(least, least + further + 1)
        each = micro or 1
        assert all(batch % (size * each) for size in sizes)
        return
    assert list(found.usable) == sorted(set(found.usable))
    assert all(least <= size <= least + further for size in found.usable)
    assert all(batch % (size * found.micro_batch) == 0 for size in found.usable)
    assert micro in (None, found.micro_batch)
    for size in found.usable:
        assert fixed_world_size(batch, found.micro_batch, size).micro_batch == found.micro_batch


def test_how_many_sums_wait() -> None:
    assert [waiting_sums(n) for n in (1, 2, 3, 4, 5, 6, 8, 12, 16, 20)] == [
        0, 0, 0, 1, 0, 1, 2, 2, 3, 2,
    ]  # fmt: skip
    assert world_sizes(64, 2, 2, 8).waiting_sums == 3
    assert fixed_world_size(64, 2, 2).waiting_sums == 0, "a plain sum needs none"


def test_what_is_stored_is_a_range_again() -> None:
    parsed = parse_spec(spec(resources={"devices": {"min": 2, "max": 4}}))
    assert isinstance(parsed, TrainSpec) and parsed.elastic
    assert parse_spec(parsed.model_dump(mode="json")) == parsed
    same = parse_spec(spec(resources={"devices": {"min": 2, "max": 2}}))
    assert isinstance(same, TrainSpec) and not same.elastic


def test_requirements_name_the_numbers_of_devices(client: httpx.Client, train_spec: Spec) -> None:
    wide = train_spec(resources={"devices": {"min": 2, "max": 9}})
    answer = client.post("/v1/jobs", json=wide)
    assert answer.status_code == 201, answer.text
    job = client.get(f"/v1/jobs/{answer.json()['id']}").json()
    assert job["spec"]["resources"]["devices"] == {"min": 2, "max": 9}
    assert job["requirements"]["devices"] == 2
    assert job["requirements"]["world_sizes"] == [2, 4, 8]
    fixed = client.post("/v1/jobs", json=train_spec(resources={"devices": 2})).json()["id"]
    assert client.get(f"/v1/jobs/{fixed}").json()["requirements"]["world_sizes"] == []
