"""A small fleet: real host managers with their workers as processes, and the real scheduler loop.

Ranks are the stand-ins of ``entries.py`` unless a test asks for the real ones.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from celery import Celery

from scheduler.loop import Scheduler
from scheduler.submission.requirements import asked
from shared.broker import celery_config
from shared.lifecycle import JobState
from shared.resolved import Resolved, ResolvedInput, ResolvedModel
from shared.rows import cut_into_shards, unpack_results
from shared.settings import Settings
from shared.specs import parse_spec
from shared.store import Store, read
from shared.store.cancel import cancel_job
from shared.store.submit import insert_job, new_job_id
from shared.tables import Attempt, Event, Job
from tests.stack import eventually
from workers.host import host_tag
from workers.sweep import TREE_VARIABLE

ROOT = Path(__file__).parents[2]
FAST = {
    "lease_ttl": "3",
    "lease_renew_every": "0.5",
    "heartbeat_every": "0.4",
    "device_timeout": "2",
    "tick_every": "0.3",
    "leader_ttl": "3",
    "rering_every": "1",
    "claim_timeout": "15",
    "end_grace": "2",
    "drain_grace": "2",
    "abandon_after": "60",
}
STAND_INS = (
    "--nursery-option=--no-preload",
    "--nursery-option=--entry=train=tests.workers.entries:train",
    "--nursery-option=--entry=engine=tests.workers.entries:engine",
)


class Fleet:
    """Everything but the API, on one data folder."""

    def __init__(self, data: Path, database: str, broker: str, **settings: str) -> None:
        chosen = {**FAST, **settings}
        self.settings = Settings.model_validate(
            {"DATABASE_URL": database, "BROKER_URL": broker, "data": data, **chosen}
        )
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith("GPUYARD_")},
            **{f"GPUYARD_{name.upper()}": value for name, value in chosen.items()},
            "GPUYARD_DATA": str(data),
            "DATABASE_URL": database,
            "BROKER_URL": broker,
            "OMP_NUM_THREADS": "1",
        }
        self.data = data
        data.mkdir(parents=True, exist_ok=True)
        self.store = Store(database)
        self.hosts: dict[str, subprocess.Popen[bytes]] = {}
        self._scheduler: Scheduler | None = None
        self._thread: threading.Thread | None = None

    # --- processes ----------------------------------------------------------------------------

    def start_host(
        self,
        name: str = "one",
        *options: str,
        real: bool = False,
        devices: int = 1,
        inside: Sequence[str] = (),
        **settings: str,
    ) -> subprocess.Popen[bytes]:
        """A host manager; by default with one CPU slot and stand-in ranks. Waits until so
        many ``devices`` are up. ``inside``: a command that runs it, in a network of its own."""
        own = {f"GPUYARD_{name.upper()}": value for name, value in settings.items()}
        command = [
            *inside,
            sys.executable,
            "-m",
            "workers",
            "--name",
            name,
            *(options or ("--devices=cpu:1",)),
        ]
        with self.log(name).open("ab") as out:
            host = subprocess.Popen(
                [*command, *(() if real else STAND_INS)],
                cwd=ROOT,
                env={**self.environment, **own},
                stdout=out,
                stderr=out,
                start_new_session=True,
            )
        self.hosts[name] = host
        eventually(
            lambda: len(self.devices(name)) >= devices, 40, lambda: self.log(name).read_text()
        )
        return host

    def start_scheduler(self) -> None:
        self._scheduler = Scheduler(Store(str(self.settings.database_url)), self.settings)
        self._thread = threading.Thread(target=self._scheduler.run, daemon=True)
        self._thread.start()

    def log(self, host: str) -> Path:
        return self.data.parent / f"{host}.log"

    def stop_host(self, name: str = "one", within: float = 30.0) -> int:
        """SIGTERM, as an operator would; the exit code."""
        host = self.hosts[name]
        host.send_signal(signal.SIGTERM)
        return host.wait(within)

    def lose_host(self, name: str) -> None:
        """SIGKILL to the manager and everything below it, as when the power fails."""
        self.hosts[name].kill()
        tag = f"{TREE_VARIABLE}={host_tag(self.data, name)}".encode()
        for pid in self.processes():
            with suppress(OSError):
                if tag in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                    os.kill(pid, signal.SIGKILL)
        self.hosts[name].wait(10)

    def worker_pid(self, device: str) -> int:
        """The process that serves the device now."""
        return next(
            row.worker.pid for row in self.store.call(read.list_devices) if row.device.id == device
        )

    def processes(self) -> dict[int, str]:
        """Everything alive that has this fleet's data folder in its environment: managers, workers,
        nurseries, supervisors, ranks and whatever those started. Read from /proc and independent of
        the code under test."""
        found = {}
        for entry in Path("/proc").iterdir():
            with suppress(OSError):
                if not entry.name.isdecimal() or int(entry.name) == os.getpid():
                    continue
                wanted = f"GPUYARD_DATA={self.data}".encode()
                if wanted in (entry / "environ").read_bytes().split(b"\0"):
                    found[int(entry.name)] = (entry / "comm").read_text().strip()
        return found

    def rank_processes(self) -> dict[int, str]:
        """What attempts started: supervisors, ranks, engines and their children."""
        ours = {"gpuyard-attempt", "gpuyard-rank", "sh", "sleep"}
        return {pid: name for pid, name in self.processes().items() if name in ours}

    def close(self) -> None:
        if self._scheduler is not None:
            self._scheduler.stop()
        if self._thread is not None:
            self._thread.join(10)
        for host in self.hosts.values():
            if host.poll() is None:
                host.send_signal(signal.SIGCONT)
                host.kill()
            host.wait()
        # A failed test must not leave processes on the machine.
        for pid in self.processes():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.store.close()

    # --- jobs ---------------------------------------------------------------------------------

    def train(self, name: str, *, devices: int = 1, **spec: Any) -> str:
        """Submit a training job that does what its name says (see ``entries.py``)."""
        return self.submit(
            {
                "kind": "train",
                "task": "text-classification",
                "data": {"train": "x"},
                "name": name,
                "resources": {"devices": devices},
                **spec,
            },
            {"train": ResolvedInput(path=str(self.data / "train.jsonl"), size=1)},
        )

    def infer(
        self, rows: Sequence[Any], name: str = "echo", model: Path | None = None, **spec: Any
    ) -> str:
        """Submit a batch over these rows; a string is a raw line. ``model``: for real engines."""
        path = self.data / f"{new_job_id()}.jsonl"
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        path.write_text("".join(line + "\n" for line in lines))
        return self.submit(
            {"kind": "infer", "task": "text-generation", "name": name, "input": "x", **spec},
            {"input": ResolvedInput(path=str(path), size=path.stat().st_size)},
            path,
            **({} if model is None else {"model": str(model)}),
        )

    def submit(
        self,
        spec: dict[str, Any],
        inputs: dict[str, ResolvedInput],
        shards_of: Path | None = None,
        model: str = "/models/tiny",
    ) -> str:
        retry = {"backoff_seconds": 0, "max_attempts": 3}
        parsed = parse_spec({"model": "tiny", "retry": retry, **spec})
        resolved = Resolved(
            model=ResolvedModel(source="folder", path=model, label="tiny"),
            requirements=asked(parsed),
            inputs=inputs,
        )
        shards = [] if shards_of is None else list(cut_into_shards(shards_of, parsed.shard_rows))
        job, _ = self.store.call(
            insert_job, job_id=new_job_id(), spec=parsed, resolved=resolved, shards=shards
        )
        return job.id

    def job(self, job_id: str) -> Job:
        job = self.store.call(read.get_job, job_id)
        assert job is not None
        return job

    def attempts(self, job_id: str) -> list[Attempt]:
        return list(self.store.call(read.list_attempts, job_id))

    def events(self, job_id: str) -> list[Event]:
        return list(self.store.call(read.events_after, job_id, 0, 10_000))

    def log_text(self, job_id: str, rank: int = 0) -> str:
        found, after = [], 0
        while chunks := self.store.call(read.logs_after, job_id, after, rank=rank):
            found += [chunk.text for chunk in chunks]
            after = chunks[-1].id or 0
        return "".join(found)

    def results(self, job_id: str) -> list[dict[str, Any]]:
        """All rows of a batch, in the order of delivery."""
        shards = self.store.call(read.committed_shards, job_id, -1, 100_000)
        lines = b"".join(unpack_results(shard.results or b"") for shard in shards).splitlines()
        return [json.loads(line) for line in lines]

    def input_of(self, job_id: str) -> Path:
        return Path(self.job(job_id).resolved["inputs"]["input"]["path"])

    def open_gate(self, job_id: str, row: int) -> None:
        """Let stand-in engines of a ``gated`` batch compute the rows below this one."""
        gate = Path(f"{self.input_of(job_id)}.gate")
        new = gate.with_suffix(".new")
        new.write_text(str(row))
        new.rename(gate)

    def begun(self, job_id: str) -> list[tuple[int, str]]:
        """Each row that a stand-in engine began to compute, with its device; again where again."""
        path = Path(f"{self.input_of(job_id)}.begun")
        lines = path.read_text().splitlines() if path.exists() else []
        return [(int(row), device) for row, device in (line.split() for line in lines)]

    def cancel(self, job_id: str) -> None:
        self.store.call(cancel_job, job_id, "by the test")

    def wait(self, job_id: str, *states: str, within: float = 30.0) -> Job:
        """Until the job is in one of these states (or terminal ones, by default)."""
        wanted = states or tuple(state for state in JobState if state.terminal)

        def arrived() -> bool:
            state = JobState(self.job(job_id).state)
            if state.terminal and state not in wanted:
                pytest.fail(f"{job_id} is {state}: {self.story(job_id)}")
            return state in wanted

        eventually(arrived, within, lambda: self.story(job_id))
        return self.job(job_id)

    def wait_for_event(self, job_id: str, type: str, within: float = 20.0) -> Event:
        return eventually(
            lambda: next((e for e in self.events(job_id) if e.type == type), None),
            within,
            lambda: f"event {type}: {self.story(job_id)}",
        )

    def wait_until_set_up(self, job_id: str, within: float = 20.0) -> int:
        """Until the stand-in said that it runs; its process id."""
        return int(self.wait_for_event(job_id, "notice", within).data["pid"])

    def story(self, job_id: str) -> str:
        lines = [f"{event.type}: {event.message}" for event in self.events(job_id)]
        logs = [log.read_text()[-3000:] for log in self.data.parent.glob("*.log")]
        return "\n".join([self.job(job_id).state, *lines, *logs])

    # --- fleet --------------------------------------------------------------------------------

    def devices(self, host: str | None = None, state: str = "up") -> list[str]:
        rows = self.store.call(read.list_devices)
        return [
            row.device.id
            for row in rows
            if row.device.state == state and host in (None, row.device.host)
        ]

    def free(self) -> bool:
        """No device is reserved or held."""
        return all(not row.runs for row in self.store.call(read.list_devices))

    def running_on(self, device: str) -> str | None:
        """The job that has the device."""
        rows = self.store.call(read.list_devices)
        return next(
            (job_id for row in rows if row.device.id == device for job_id, _ in row.runs), None
        )

    def celery(self) -> Celery:
        """A client of the broker, as Flower has one."""
        return Celery("test", set_as_current=False, config_source=celery_config(self.settings))


class Monitor:
    """What Flower sees: every event, and the state of each task by Celery's own rules."""

    def __init__(self, client: Celery) -> None:
        self._state = client.events.State()
        self._events: list[dict[str, Any]] = []
        self._connection = client.connection()
        self._receiver = client.events.Receiver(self._connection, handlers={"*": self._take})
        self._thread = threading.Thread(
            target=self._receiver.capture, kwargs={"wakeup": True}, daemon=True
        )

    def _take(self, event: dict[str, Any]) -> None:
        self._events.append(event)
        self._state.event(event)

    def events_of(self, task_id: str) -> list[str]:
        return [event["type"] for event in self._events if event.get("uuid") == task_id]

    def state_of(self, task_id: str) -> str | None:
        task = self._state.tasks.get(task_id)
        return None if task is None else str(task.state)

    def last_event_of(self, task_id: str) -> dict[str, Any]:
        return [event for event in self._events if event.get("uuid") == task_id][-1]

    def __enter__(self) -> Monitor:
        self._thread.start()
        eventually(lambda: self._events, 10, "a heartbeat of a worker")
        return self

    def __exit__(self, *_: object) -> None:
        self._receiver.should_stop = True
        self._thread.join(5)
        self._connection.release()
