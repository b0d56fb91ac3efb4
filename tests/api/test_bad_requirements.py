"""What no device of the fleet can run: refused when it is submitted, or told why it waits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest

from shared.capability import GIB, Capability
from shared.store import Store
from tests.api.conftest import Api, submit
from tests.api.fake_worker import FakeFleet
from tests.api.refusals import Spec, refused

T4 = Capability("cuda", 75, 16 * GIB)


@pytest.mark.parametrize(
    ("resources", "says"),
    [
        ({"accelerator": "cuda", "memory_gb": 40}, "needs 40 GB, has 16 GB"),
        ({"min_compute_capability": 8.0}, "needs compute capability 8.0"),
        ({"accelerator": "cuda", "features": ["bf16"]}, "needs bf16"),
    ],
)
def test_requirements_that_no_device_can_ever_meet(
    client: httpx.Client, fleet: FakeFleet, train_spec: Spec, resources: Any, says: str
) -> None:
    fleet.add_device("gpu0@fake", T4)
    error = refused(client, train_spec(resources=resources), "unsatisfiable", param="resources")
    assert says in error["message"]
    assert error["hint"]


def test_the_precision_asked_for_is_a_requirement(
    client: httpx.Client, fleet: FakeFleet, train_spec: Spec
) -> None:
    fleet.add_device("gpu0@fake", T4)
    spec = train_spec(resources={"accelerator": "cuda"}, hyperparameters={"precision": "bf16"})
    refused(client, spec, "unsatisfiable", param="resources")


def test_int8_is_for_cpus(client: httpx.Client, fleet: FakeFleet, infer_spec: Spec) -> None:
    fleet.add_device("gpu0@fake", T4)
    both = infer_spec(precision="int8", resources={"accelerator": "cuda"})
    assert "int8 is for CPUs" in refused(client, both, "invalid_spec")["message"]
    job = submit(client, infer_spec(precision="int8", fail_fast=True))
    assert job["requirements"]["accelerator"] == "cpu"


def test_an_empty_fleet_refuses_nothing_unless_asked_to(
    client: httpx.Client, train_spec: Spec
) -> None:
    wanted = {"accelerator": "cuda", "memory_gb": 40}
    refused(client, train_spec(fail_fast=True), "unsatisfiable", param="resources")
    submit(client, train_spec(resources=wanted))


def test_more_devices_than_the_fleet_has_waits_unless_asked_not_to(
    client: httpx.Client, fleet: FakeFleet, train_spec: Spec
) -> None:
    many = {"resources": {"devices": 4}}
    error = refused(client, train_spec(**many, fail_fast=True), "unsatisfiable", param="resources")
    assert "needs 4 devices, the fleet has 1" in error["message"]
    assert submit(client, train_spec(**many))["state"] == "queued"


def test_an_estimate_alone_refuses_nothing(
    client: httpx.Client, store: Store, train_spec: Spec, place: Path
) -> None:
    FakeFleet(store).add_device("gpu0@fake", Capability("cuda", 75, GIB // 4))
    job = submit(client, train_spec())
    assert job["requirements"]["memory_bytes"] > GIB // 4


def test_nothing_of_a_refused_submission_stays(api: Api, infer_spec: Spec) -> None:
    with api.client() as client:
        refused(client, infer_spec(model="nothing"), "model_not_found", param="model")
    assert not (api.settings.data / "inline").exists()
