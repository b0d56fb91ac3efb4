"""What a submission asks about memory, and what it is answered."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
from sqlmodel import select

from shared.footprint import Configuration
from shared.store import Store
from shared.store.footprints import record_out_of_memory, record_peak
from shared.tables import Footprint, Job
from tests.api.conftest import submit

GIB = 1024**3
Spec = Callable[..., dict[str, Any]]


def footprints(store: Store) -> list[Footprint]:
    return list(store.call(lambda session: session.exec(select(Footprint)).all()))


def test_a_training_asks_once_for_what_it_is(
    client: httpx.Client, store: Store, train_spec: Spec, place: Path
) -> None:
    first = submit(client, train_spec())
    again = submit(client, train_spec(name="another", priority=3))
    (asked,) = footprints(store)
    assert asked.state == "wanted"
    assert asked.estimated_bytes == first["requirements"]["memory_bytes"]
    assert again["requirements"] == first["requirements"]
    assert first["requirements"]["memory_from"] == "estimate"
    found = Configuration.model_validate(asked.configuration)
    assert found.key == asked.key
    assert found.labels == 2
    config = json.loads((place / "roots" / "encoder" / "config.json").read_text())
    assert found.model is not None and found.model["hidden_size"] == config["hidden_size"]
    with store.transaction() as session:
        assert {job.footprint_key for job in session.exec(select(Job)).all()} == {asked.key}


def test_what_was_remembered_is_what_the_next_one_needs(
    client: httpx.Client, store: Store, train_spec: Spec
) -> None:
    submit(client, train_spec())
    (asked,) = footprints(store)
    store.call(record_peak, asked.key, 3 * GIB)
    needs = submit(client, train_spec())["requirements"]
    assert (needs["memory_bytes"], needs["memory_from"]) == (3 * GIB, "remembered")
    store.call(record_out_of_memory, asked.key, 4 * GIB)
    assert submit(client, train_spec())["requirements"]["memory_bytes"] > 4 * GIB
    given = submit(client, train_spec(resources={"memory_gb": 2}))["requirements"]
    assert (given["memory_bytes"], given["memory_from"]) == (2 * GIB, "user")


def test_a_batch_job_asks_for_no_measurement(
    client: httpx.Client, store: Store, infer_spec: Spec
) -> None:
    needs = submit(client, infer_spec())["requirements"]
    assert needs["memory_from"] == "estimate"
    assert footprints(store) == []
