"""What is known about the memory of configurations, in a real Postgres."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from sqlalchemy import text
from sqlmodel import Session

from shared.capability import GIB, Capability
from shared.footprint import Configuration, configuration
from shared.lifecycle import FailureClass
from shared.resolved import Requirements, Resolved, ResolvedModel
from shared.specs import TrainSpec
from shared.store import Store
from shared.store.claim import Claimed, claim_rank
from shared.store.engine import WAKE_SCHEDULER
from shared.store.finish import Failure, fail_rank, finish_rank
from shared.store.footprints import (
    BEYOND,
    TRIES,
    claim_measurement,
    fail_measurement,
    known_needs,
    record_measurement,
    record_out_of_memory,
    record_peak,
)
from shared.store.read import events_after
from shared.store.submit import insert_job, new_job_id
from shared.tables import Footprint
from tests.store import world

GB = 10**9


def asked(rows: int = 8, **hyperparameters: Any) -> Configuration:
    spec = world.train_spec(hyperparameters={"batch_size": rows, **hyperparameters})
    return configuration(
        spec, {"model_type": "bert", "hidden_size": 8}, None, labels=2, length=16, device="cpu"
    )


def submit(
    store: Store,
    question: Configuration | None = None,
    estimate: int = 4 * GB,
    needs: Requirements | None = None,
) -> str:
    job, _ = store.call(
        insert_job,
        job_id=new_job_id(),
        spec=world.train_spec(),
        resolved=Resolved(
            model=ResolvedModel(source="folder", path="/models/tiny", label="tiny"),
            requirements=needs or world.needs(memory_bytes=estimate),
            configuration=question or asked(),
            estimated_bytes=estimate,
            inputs={},
        ),
    )
    return job.id


def needs_of(store: Store, job_id: str) -> tuple[int, str]:
    needs = Requirements.model_validate(world.job_of(store, job_id).resolved["requirements"])
    return needs.memory_bytes, needs.memory_from


def row(store: Store, key: str | None = None) -> Footprint:
    footprint = store.call(lambda s: s.get(Footprint, key or asked().key))
    assert footprint is not None
    return footprint


def claimed(store: Store, worker: str = "cpu0@a", expires_after: float = 60) -> str | None:
    footprint = store.call(claim_measurement, worker, expires_after)
    return None if footprint is None else footprint.key


def test_what_decides_no_memory_gives_the_same_key() -> None:
    first = asked()
    assert asked(learning_rate=0.1, seed=1, epochs=9, schedule="cosine").key == first.key
    others = [asked(9), asked(optimizer="sgd"), asked(l1=0.1), asked(freeze=["a*"])]
    others += [asked(micro_batch_size=4), asked(precision="bf16"), asked(dropout=0.0)]
    assert len({first.key, *(other.key for other in others)}) == 1 + len(others)
    assert Configuration.model_validate_json(first.model_dump_json()).key == first.key
    two = configuration(
        world.train_spec(resources={"devices": 2}, hyperparameters={"batch_size": 16}),
        {"model_type": "bert", "hidden_size": 8, "_name_or_path": "x", "id2label": {"0": "a"}},
        None, labels=2, length=16, device="cpu",
    )  # fmt: skip
    assert (two.rows, two.gradients_stay) == (8, True)
    assert two.model == first.model


def test_a_new_configuration_is_wanted_once(store: Store) -> None:
    first, second = submit(store), submit(store, estimate=5 * GB)
    key = world.job_of(store, first).footprint_key
    assert key == world.job_of(store, second).footprint_key == asked().key
    assert needs_of(store, first) == (4 * GB, "estimate")
    assert claimed(store) == key
    assert claimed(store, "cpu1@a") is None, "each is measured once"
    footprint = row(store)
    assert Configuration.model_validate(footprint.configuration) == asked()


def test_a_measurement_reaches_waiting_and_later_jobs(store: Store) -> None:
    mine = world.needs(memory_bytes=9 * GB, memory_is_estimate=False, memory_from="user")
    waiting, given = submit(store), submit(store, needs=mine)
    listener = store.listen(WAKE_SCHEDULER)
    listener.wait(0.05)
    key = claimed(store)
    assert key is not None
    assert not store.call(record_measurement, key, "cpu1@b", GB), "another worker's claim"
    assert store.call(record_measurement, key, "cpu0@a", 3 * GB)
    assert listener.wait(10), "the scheduler decides anew"
    listener.close()
    assert needs_of(store, waiting) == (3 * GB, "measured")
    assert needs_of(store, given) == (9 * GB, "user"), "what the user asked for stays"
    told = [e for e in store.call(events_after, waiting, 0, 100) if e.type == "footprint"]
    assert [e.data for e in told] == [{"memory_bytes": 3 * GB, "memory_from": "measured"}]
    assert needs_of(store, submit(store)) == (3 * GB, "measured")
    assert not store.call(record_measurement, key, "cpu0@a", GB), "it is over"
    assert claimed(store) is None


def test_a_failed_measurement_says_why_and_leaves_the_arithmetic(store: Store) -> None:
    job = submit(store)
    key = claimed(store)
    assert key is not None
    assert store.call(fail_measurement, key, "cpu0@a", "a model\x00 of its own")
    assert (row(store).state, row(store).error) == ("failed", "a model� of its own")
    assert needs_of(store, job) == (4 * GB, "estimate")
    assert claimed(store) is None


def test_a_claim_expires_and_a_worker_that_was_late_is_stale(store: Store) -> None:
    submit(store)
    key = claimed(store, "cpu0@a")
    assert key is not None
    assert claimed(store, "cpu0@b") is None
    with store.transaction() as session:
        session.execute(text("UPDATE footprints SET claimed_at = claimed_at - interval '1 hour'"))
    assert claimed(store, "cpu0@b") == key
    assert not store.call(record_measurement, key, "cpu0@a", GB)
    assert store.call(record_measurement, key, "cpu0@b", 2 * GB)


def test_a_measurement_that_never_ends_is_given_up(store: Store) -> None:
    submit(store)
    for _ in range(TRIES):
        assert claimed(store, expires_after=-1) is not None
    assert claimed(store, expires_after=-1) is None
    assert row(store).state == "failed"
    assert "never came to an end" in str(row(store).error)


def test_two_workers_never_claim_one_configuration(store: Store) -> None:
    for rows in range(1, 9):
        submit(store, asked(rows))
    found: list[str] = []
    together = threading.Barrier(4)

    def work(name: str) -> None:
        together.wait(10)
        while (key := claimed(store, name)) is not None:
            found.append(key)

    threads = [threading.Thread(target=work, args=(f"cpu{n}@a",)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(found) == sorted(asked(rows).key for rows in range(1, 9))


def test_a_real_peak_counts_more_and_only_rises(store: Store) -> None:
    job = submit(store)
    key = claimed(store)
    assert key is not None
    assert store.call(record_peak, key, 2 * GB)
    assert needs_of(store, job) == (2 * GB, "remembered")
    assert store.call(record_measurement, key, "cpu0@a", 3 * GB)
    assert needs_of(store, job) == (2 * GB, "remembered")
    assert store.call(record_peak, key, 5 * GB) and store.call(record_peak, key, GB)
    assert needs_of(store, job) == (5 * GB, "remembered")
    assert not store.call(record_peak, "0" * 64, GB)


def test_what_a_training_outgrew_is_the_least_from_then_on(store: Store) -> None:
    job = submit(store)
    key = asked().key
    assert store.call(record_out_of_memory, key, 8 * GB)
    assert needs_of(store, job) == (int(8 * GB * BEYOND), "remembered")
    # It went on with half the micro-batch: that peak is not this configuration's.
    assert store.call(record_peak, key, 6 * GB)
    assert store.call(record_out_of_memory, key, 4 * GB)
    assert needs_of(store, submit(store)) == (int(8 * GB * BEYOND), "remembered")
    assert not store.call(record_out_of_memory, "0" * 64, GB)


def test_a_training_that_succeeds_leaves_its_peak(store: Store) -> None:
    job = submit(store)
    worker = world.register(store, "cpu0@a")
    attempt = world.send(store, job, ("cpu0@a", "cpu"))
    answer = store.call(claim_rank, world.hints(store, attempt.id)[0], "cpu0@a", worker, 60)
    assert isinstance(answer, Claimed)
    waiting = submit(store)
    assert store.call(finish_rank, answer.holder, {"peak_memory_bytes": 7 * GB})
    assert row(store).peak_bytes == 7 * GB
    assert needs_of(store, waiting) == (7 * GB, "remembered")
    assert needs_of(store, job) == (4 * GB, "estimate"), "what it was placed by"


@pytest.mark.parametrize("larger_exists", [True, False])
def test_a_training_that_runs_out_of_memory_goes_on_where_it_was_and_the_next_elsewhere(
    store: Store, larger_exists: bool
) -> None:
    """Where no device is larger, the next one is not left waiting for one."""
    small = world.register(store, "cpu0@a")
    if larger_exists:
        world.register(store, "cpu0@b", Capability("cpu", 0, 64 * GIB))
    job, waiting = submit(store), submit(store)

    def run() -> Claimed:
        attempt = world.send(store, job, ("cpu0@a", "cpu"))
        return world.claim(store, world.hints(store, attempt.id)[0], "cpu0@a", small)

    first = run()
    assert first.micro_batch is None
    ran_out = Failure(FailureClass.OUT_OF_MEMORY, "out_of_memory", "too much", rows_at_once=32)
    assert store.call(fail_rank, first.holder, ran_out)
    assert needs_of(store, job) == (4 * GB, "estimate"), "it is placed as before"
    outgrown = (int(world.CPU.memory_bytes * BEYOND), "remembered")
    assert needs_of(store, waiting) == (outgrown if larger_exists else (4 * GB, "estimate"))
    second = run()
    assert second.micro_batch == 16
    assert store.call(finish_rank, second.holder, {"peak_memory_bytes": 3 * GB})
    assert row(store).peak_bytes is None, "it is that of another configuration"


def test_a_measurement_waits_for_the_job_that_is_just_inserted(store: Store) -> None:
    """Else it would find no job, and the job no measurement."""
    submit(store)
    key = claimed(store)
    assert key is not None
    inserted, measured = threading.Event(), threading.Event()
    job_id = new_job_id()

    def insert(session: Session) -> None:
        insert_job(
            session,
            job_id=job_id,
            spec=world.train_spec(),
            resolved=Resolved(
                model=ResolvedModel(source="folder", path="/models/tiny", label="tiny"),
                requirements=world.needs(memory_bytes=4 * GB),
                configuration=asked(), estimated_bytes=4 * GB, inputs={},
            ),
        )  # fmt: skip
        inserted.set()
        assert not measured.wait(0.3), "it is written before the job can be seen"

    def measure() -> None:
        inserted.wait(10)
        store.call(record_measurement, key, "cpu0@a", 3 * GB)
        measured.set()

    thread = threading.Thread(target=measure)
    thread.start()
    store.call(insert)
    thread.join(30)
    assert needs_of(store, job_id) == (3 * GB, "measured")


def test_needs_without_anything_known(store: Store) -> None:
    needs = world.needs(memory_bytes=GB)
    assert store.call(known_needs, "0" * 64, needs) == needs


@pytest.mark.parametrize(
    "wrong",
    [
        "state = 'measured'",
        "state = 'failed'",
        "state = 'measuring'",
        "measured_bytes = 5",
        "peak_bytes = 0",
        "state = 'lost'",
    ],
)
def test_postgres_refuses_what_cannot_be(store: Store, wrong: str) -> None:
    submit(store)
    with pytest.raises(Exception, match="ck_footprints"), store.transaction() as session:
        session.execute(text(f"UPDATE footprints SET {wrong}"))  # noqa: S608


def test_a_spec_stays_a_spec() -> None:
    spec = asked().spec
    assert isinstance(spec, TrainSpec) and spec.hyperparameters.batch_size == 8
