"""Plays scheduler and worker against the real store: dispatches, claims, reports and finishes a job
through the functions that the real ones call, so that what the API reads is what they write."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shared.capability import GIB, Capability
from shared.lifecycle import FailureClass
from shared.messages import Hint
from shared.rows import result, row_error
from shared.store import Holder, Store, claim, finish, leader, ledger, report
from shared.store.devices import DeviceFacts, heartbeat, register_device
from shared.store.dispatch import Placed, dispatch_attempt
from shared.store.finish import Failure
from shared.tables import Shard

CPU = Capability("cpu", 0, 8 * GIB)


class FakeFleet:
    """Devices, and what a job goes through on them. One per database."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.workers: dict[str, str] = {}
        term = store.call(leader.lead, f"fake-{os.getpid()}", 3600.0)
        assert term is not None
        self.term = term

    def add_device(
        self, name: str = "cpu0@fake", capability: Capability = CPU, **facts: Any
    ) -> str:
        """Register a device and its worker: the device's id."""
        device = DeviceFacts(name, "fake", "a device for tests", capability, **facts)
        self.workers[name] = self.store.call(register_device, device, os.getpid(), "0")
        return name

    def beat(self) -> None:
        for worker in self.workers.values():
            self.store.call(heartbeat, worker)

    def dispatch(self, job_id: str, devices: Sequence[str] = ("cpu0@fake",)) -> list[Hint]:
        """queued -> dispatched, on these devices."""
        self.beat()
        attempt = self.store.call(
            dispatch_attempt,
            self.term,
            job_id,
            [Placed(device, "cpu") for device in devices],
            label="train:fake",
            claim_timeout=3600.0,
            device_timeout=3600.0,
            reason="the test says so",
        )
        assert attempt is not None, "not dispatched: is the job queued and are the devices free?"
        return [
            Hint(job_id=job_id, attempt_id=attempt.id, token=attempt.token, rank=rank)
            for rank in range(len(devices))
        ]

    def start(self, job_id: str, devices: Sequence[str] = ("cpu0@fake",)) -> list[Holder]:
        """queued -> running: one holder per rank."""
        holders = []
        for hint, device in zip(self.dispatch(job_id, devices), devices, strict=True):
            claimed = self.store.call(claim.claim_rank, hint, device, self.workers[device], 3600.0)
            assert isinstance(claimed, claim.Claimed), claimed
            holders.append(claimed.holder)
        return holders

    def say(self, holder: Holder, text: str) -> None:
        assert self.store.call(report.append_log, holder, text)

    def tell(self, holder: Holder, message: str) -> None:
        assert self.store.call(report.record_event, holder, "note", message)

    def compute(self, holder: Holder, index: int) -> int:
        """Commit a shard's results, every seventh row an error: the number of rows."""
        shard = self.store.call(lambda s: s.get_one(Shard, (holder.job_id, index)))
        rows = [answer(shard.first_row + i) for i in range(shard.rows)]
        assert self.store.call(ledger.commit_shard, holder, index, rows, 0.1)
        return shard.rows

    def publish(self, holder: Holder, data: Path, name: str, content: bytes) -> None:
        """Write a deliverable and record it, as a worker does."""
        path = f"jobs/{holder.job_id}/{holder.attempt_id}/artifacts/{name}"
        (data / path).parent.mkdir(parents=True, exist_ok=True)
        (data / path).write_bytes(content)
        assert self.store.call(
            report.record_artifact,
            holder,
            name=name,
            kind="model" if name.startswith("model/") else "file",
            path=path,
            size=len(content),
            sha256=hashlib.sha256(content).hexdigest(),
        )

    def finish(self, holder: Holder, summary: dict[str, Any] | None = None) -> None:
        assert self.store.call(finish.finish_rank, holder, summary or {})

    def fail(self, holder: Holder, failure_class: FailureClass, message: str) -> None:
        failure = Failure(failure_class, "fake_failure", message, "Change the test.")
        assert self.store.call(finish.fail_rank, holder, failure)


def answer(row: int) -> dict[str, Any]:
    """What ``compute`` says about a row."""
    if row % 7 == 6:
        return row_error(row, "missing_column", "no column 'text'")
    output = {"label": "a", "score": 0.5, "labels": [{"label": "a", "score": 0.5}]}
    return result(row, output=output, input_tokens=3)
