"""A small world for tests of the scheduler and of the store: jobs and devices in a real Postgres."""

from __future__ import annotations

import re
from typing import Any

from sqlalchemy import text
from sqlmodel import Session, select

from shared.capability import GIB, Capability, parse_simulated
from shared.lifecycle import FailureClass
from shared.messages import Hint, Shard
from shared.resolved import Requirements, Resolved, ResolvedModel
from shared.settings import Settings
from shared.specs import InferSpec, TrainSpec, parse_spec
from shared.store import Store
from shared.store.claim import Claimed, claim_rank
from shared.store.devices import DeviceFacts, register_device
from shared.store.dispatch import Placed, dispatch_attempt
from shared.store.finish import Failure
from shared.store.leader import lead
from shared.store.submit import insert_job, new_job_id
from shared.tables import Attempt, Job, Outbox

CPU = Capability("cpu", 0, 8 * GIB)
# Each table that tells of jobs, with the order of its rows in `contents`.
_TABLES = {
    "jobs": "created_at",
    "attempts": "created_at",
    "leases": "created_at, rank",
    "outbox": "attempt_id, rank",
    "shards": "job_id, index",
    "checkpoints": "created_at",
    "artifacts": "created_at",
    "metrics": "job_id, split, step",
    "events": "id",
    "log_chunks": "id",
}
_PARTS = (
    "'{0}', (SELECT coalesce(json_agg(t ORDER BY {1}), '[]') FROM {0} t)".format(*item)  # noqa: S608
    for item in _TABLES.items()
)
_CONTENTS = f"SELECT json_build_object({', '.join(_PARTS)})"
Contents = dict[str, list[dict[str, Any]]]


def settings(database_url: str, broker_url: str = "redis://127.0.0.1:1/0", **kw: Any) -> Settings:
    return Settings.model_validate({"DATABASE_URL": database_url, "BROKER_URL": broker_url, **kw})


def needs(**kw: Any) -> Requirements:
    return Requirements.model_validate({"devices": 1, "accelerator": "auto", **kw})


def train_spec(**kw: Any) -> TrainSpec:
    spec = parse_spec(
        {
            "kind": "train",
            "task": "text-classification",
            "model": "tiny",
            "data": {"train": "/data/train.jsonl"},
            "retry": {"max_attempts": 3, "backoff_seconds": 0},
            **kw,
        }
    )
    assert isinstance(spec, TrainSpec)
    return spec


def infer_spec(**kw: Any) -> InferSpec:
    spec = parse_spec(
        {
            "kind": "infer",
            "task": "text-generation",
            "model": "tiny",
            "rows": [{"prompt": "a"}],
            "retry": {"max_attempts": 3, "backoff_seconds": 0},
            **kw,
        }
    )
    assert isinstance(spec, InferSpec)
    return spec


def submit(
    store: Store,
    requirements: Requirements | None = None,
    spec: TrainSpec | InferSpec | None = None,
    shards: int = 0,
    **kw: Any,
) -> str:
    """The id of a new queued job."""
    ranges = [
        Shard(index=i, first_row=2 * i, rows=2, offset=20 * i, length=20) for i in range(shards)
    ]
    job, _ = store.call(
        insert_job,
        job_id=new_job_id(),
        spec=spec or (infer_spec(**kw) if shards else train_spec(**kw)),
        resolved=Resolved(
            model=ResolvedModel(source="folder", path="/models/tiny", label="tiny"),
            requirements=requirements or needs(),
            inputs={},
        ),
        shards=ranges,
    )
    return job.id


def register(
    store: Store, device_id: str, capability: Capability = CPU, simulated: bool = False
) -> str:
    """The worker id of a device that is up."""
    facts = DeviceFacts(
        id=device_id,
        host=device_id.partition("@")[2],
        model="test",
        capability=capability,
        simulated=simulated,
    )
    return store.call(register_device, facts, 4711, "0.1")


def register_simulated(store: Store, text: str, host: str = "a") -> dict[str, str]:
    """Worker ids by device id, for instance of ``2xA100-80GB,1xT4-16GB``: a100-0@host and so on."""
    found: dict[str, str] = {}
    for device in parse_simulated(text):
        stem = re.split("-", device.model)[0].lower()
        number = sum(name.startswith(f"{stem}-") for name in found)
        name = f"{stem}-{number}@{host}"
        found[name] = register(store, name, device.capability, simulated=True)
    return found


def become_leader(store: Store, holder: str = "test", ttl: float = 600) -> int:
    term = store.call(lead, holder, ttl)
    assert term is not None
    return term


def send(store: Store, job_id: str, *placed: tuple[str, str], term: int | None = None) -> Attempt:
    """Dispatch a job to (device, queue) pairs."""
    attempt = store.call(
        dispatch_attempt,
        become_leader(store) if term is None else term,
        job_id,
        [Placed(device, queue) for device, queue in placed],
        label="train:tiny",
        claim_timeout=60,
        device_timeout=60,
        reason="test",
    )
    assert attempt is not None
    return attempt


def hints(store: Store, attempt_id: str) -> list[Hint]:
    def read(session: Session) -> list[Hint]:
        rows = session.exec(
            select(Outbox).where(Outbox.attempt_id == attempt_id).order_by(Outbox.rank)
        )
        return [Hint.model_validate(row.hint) for row in rows.all()]

    return store.call(read)


def claim(store: Store, hint: Hint, device_id: str, worker_id: str, ttl: float = 60) -> Claimed:
    claimed = store.call(claim_rank, hint, device_id, worker_id, ttl)
    assert isinstance(claimed, Claimed), claimed
    return claimed


def job_of(store: Store, job_id: str) -> Job:
    job = store.call(lambda s: s.get(Job, job_id))
    assert job is not None
    return job


def failure(failure_class: FailureClass = FailureClass.INFRASTRUCTURE) -> Failure:
    return Failure(failure_class, "test", "for a test")


def contents(store: Store) -> Contents:
    """All rows of all tables that tell of jobs."""
    with store.transaction() as session:
        found: Contents = session.execute(text(_CONTENTS)).scalar_one()
        return found
