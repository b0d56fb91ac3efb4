"""A real worker measures what a submission asks, in a real rank, and the waiting job hears of it."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import text

from shared.footprint import RUNTIME, Configuration, configuration
from shared.resolved import Requirements, Resolved, ResolvedInput, ResolvedModel
from shared.specs import parse_spec
from shared.store.submit import insert_job, new_job_id
from shared.tables import Footprint
from tests.stack import eventually
from tests.workers.fleet import Fleet

pytestmark = pytest.mark.slow
BERT = {
    "model_type": "bert", "vocab_size": 500, "hidden_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "intermediate_size": 64,
}  # fmt: skip
TOO_MUCH = 1 << 50


def submit(fleet: Fleet, config: dict[str, Any]) -> tuple[str, Configuration]:
    """A job that needs more than there is, as arithmetic has it, and so waits."""
    spec = parse_spec(
        {"kind": "train", "task": "text-classification", "model": "m", "data": {"train": "x"}}
    )
    asked = configuration(spec, config, None, labels=3, length=32, device="cpu")  # type: ignore[arg-type]
    job, _ = fleet.store.call(
        insert_job,
        job_id=new_job_id(),
        spec=spec,
        resolved=Resolved(
            model=ResolvedModel(source="folder", path="/models/tiny", label="tiny"),
            requirements=Requirements(devices=1, accelerator="auto", memory_bytes=TOO_MUCH),
            configuration=asked,
            estimated_bytes=TOO_MUCH,
            inputs={"train": ResolvedInput(path=str(fleet.data / "none.jsonl"), size=1)},
        ),
    )
    return job.id, asked


def footprint(fleet: Fleet, asked: Configuration) -> Footprint:
    found = fleet.store.call(lambda session: session.get(Footprint, asked.key))
    assert found is not None
    return found


def test_a_measured_job_is_placed_by_it(fleet: Fleet) -> None:
    fleet.start_host("one", "--devices=cpu:1", real=True)
    job, asked = submit(fleet, BERT)
    eventually(lambda: footprint(fleet, asked).state == "measured", 120, lambda: fleet.story(job))
    measured = footprint(fleet, asked).measured_bytes
    assert measured is not None and RUNTIME < measured < RUNTIME + 50e6
    needs = Requirements.model_validate(fleet.job(job).resolved["requirements"])
    assert (needs.memory_bytes, needs.memory_from) == (measured, "measured")
    told = fleet.wait_for_event(job, "footprint")
    assert told.data["memory_bytes"] == measured
    # Its data do not exist: that it is found out shows that it left the queue.
    assert fleet.wait(job, "failed", within=120).failure is not None


def test_what_cannot_be_measured_says_why_and_the_next_one_is(fleet: Fleet) -> None:
    fleet.start_host("one", "--devices=cpu:1", real=True)
    job, unknown = submit(fleet, {"model_type": "no-such-model"})
    _, known = submit(fleet, BERT)
    eventually(lambda: footprint(fleet, known).state == "measured", 120, lambda: fleet.story(job))
    assert footprint(fleet, unknown).state == "failed"
    assert "no-such-model" in str(footprint(fleet, unknown).error)
    needs = Requirements.model_validate(fleet.job(job).resolved["requirements"])
    assert (needs.memory_bytes, needs.memory_from) == (TOO_MUCH, "estimate")


def test_what_a_lost_worker_had_begun_is_measured_by_the_next(fleet: Fleet) -> None:
    _, asked = submit(fleet, BERT)
    with fleet.store.transaction() as session:
        session.execute(
            text(
                "UPDATE footprints SET state = 'measuring', claimed_by = 'gone', tries = 1,"
                " claimed_at = clock_timestamp() - interval '1 day'"
            )
        )
    fleet.start_host("one", "--devices=cpu:2", real=True, devices=2)
    eventually(lambda: footprint(fleet, asked).state == "measured", 120)
    assert footprint(fleet, asked).tries == 2
