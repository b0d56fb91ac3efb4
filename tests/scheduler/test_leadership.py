"""Leadership among real scheduler processes: one decides, and the dead are replaced."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sqlalchemy import text

from shared.lifecycle import JobState
from shared.store import Store
from shared.store.dispatch import Placed, dispatch_attempt
from shared.store.leader import leads
from tests.stack import eventually
from tests.store import world

Process = subprocess.Popen[bytes]
TTL = 3.0


@pytest.fixture
def start(store: Store, valkey_url: str, tmp_path: Path) -> Iterator[Callable[[], Process]]:
    """Starts scheduler processes, as ``python -m scheduler run`` does; ends them with the test."""
    processes: list[Process] = []

    def make() -> Process:
        environment = {
            **os.environ,
            "DATABASE_URL": store.url,
            "BROKER_URL": valkey_url,
            "GPUYARD_LEADER_TTL": str(TTL),
            "GPUYARD_TICK_EVERY": "0.2",
            "GPUYARD_DEVICE_TIMEOUT": "600",
        }
        with (tmp_path / f"scheduler-{len(processes)}.log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "scheduler", "run"], env=environment, stderr=log
            )
        processes.append(process)
        return process

    yield make
    for process in processes:
        if process.poll() is None:
            process.kill()
            process.wait()


def leader(store: Store) -> tuple[int, int] | None:
    """(term, process id) of the leader, if one leads."""
    with store.transaction() as session:
        row = session.execute(
            text("SELECT term, holder FROM leader WHERE expires_at > clock_timestamp()")
        ).first()
        return (row.term, int(row.holder.split(":")[1])) if row and row.holder else None


def dispatched(store: Store, job_id: str) -> bool:
    return world.job_of(store, job_id).state == JobState.DISPATCHED


def kill(process: Process, how: signal.Signals) -> None:
    process.send_signal(how)
    process.wait(timeout=30)


@pytest.mark.chaos
@pytest.mark.timeout(180)
def test_a_standby_takes_over_from_the_dead(store: Store, start: Callable[[], Process]) -> None:
    world.register_simulated(store, "3xT4-16GB")
    first = start()
    term, pid = eventually(lambda: leader(store), within=60)
    assert pid == first.pid
    second = start()
    eventually(lambda: dispatched_one(store))
    kill(first, signal.SIGKILL)
    new_term, pid = eventually(
        lambda: found if (found := leader(store)) and found[1] != first.pid else None, within=60
    )
    assert (new_term, pid) == (term + 1, second.pid)
    eventually(lambda: dispatched_one(store))
    # What the dead one might still have had on its way is refused.
    assert not store.call(leads, term)
    job_id = world.submit(store)
    eventually(lambda: dispatched(store, job_id))
    late = world.submit(store, world.needs(devices=9))
    refused = store.call(
        dispatch_attempt, term, late, [Placed("t4-0@a", "cpu")],
        label="x", claim_timeout=60, device_timeout=60, reason="test",
    )  # fmt: skip
    assert refused is None


def dispatched_one(store: Store) -> bool:
    """A job goes out, so somebody decides."""
    job_id = world.submit(store)
    eventually(lambda: dispatched(store, job_id), within=30)
    return True


@pytest.mark.chaos
@pytest.mark.timeout(180)
def test_sigterm_hands_over_at_once(store: Store, start: Callable[[], Process]) -> None:
    first = start()
    eventually(lambda: leader(store), within=60)
    second = start()
    eventually(lambda: stands_by(store, 2), within=60, what="both connected")
    kill(first, signal.SIGTERM)
    assert first.returncode == 0
    now_leads = leader(store)
    assert now_leads is None or now_leads[1] == second.pid, "it did not leave its lease to run out"
    eventually(lambda: (found := leader(store)) is not None and found[1] == second.pid)
    kill(second, signal.SIGINT)
    assert second.returncode == 0
    assert leader(store) is None, "it resigned"


def stands_by(store: Store, processes: int) -> bool:
    """Each scheduler listens for wake-ups, over a connection of its own."""
    with store.transaction() as session:
        query = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'LISTEN%'"
        return bool(session.execute(text(query)).scalar_one() >= processes)


@pytest.mark.chaos
@pytest.mark.timeout(180)
def test_a_leader_that_stood_still_decides_nothing_when_it_wakes(
    store: Store, start: Callable[[], Process]
) -> None:
    world.register_simulated(store, "2xT4-16GB")
    first = start()
    term, _ = eventually(lambda: leader(store), within=60)
    first.send_signal(signal.SIGSTOP)
    second = start()
    eventually(lambda: (found := leader(store)) is not None and found[1] == second.pid, within=60)
    job_id = world.submit(store)
    eventually(lambda: dispatched(store, job_id))
    first.send_signal(signal.SIGCONT)
    assert dispatched_one(store)
    found = leader(store)
    assert found == (term + 1, second.pid), "the one that stood still stands by"


def test_a_scheduler_waits_for_postgres_and_ends_when_asked(
    valkey_url: str, tmp_path: Path
) -> None:
    environment = {
        **os.environ,
        "DATABASE_URL": "postgresql://nobody@127.0.0.1:1/none",
        "BROKER_URL": valkey_url,
    }
    log = tmp_path / "log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "scheduler", "run"], env=environment, stderr=file
        )
    try:
        eventually(lambda: "waiting: Postgres cannot be reached" in log.read_text(), within=60)
        assert process.poll() is None, "it waits and does not crash"
        kill(process, signal.SIGTERM)
        assert process.returncode == 0
        assert "Traceback" not in log.read_text()
    finally:
        process.kill()
        process.wait()
