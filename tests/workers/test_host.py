"""The host manager: one at a time, what it finds and leaves, and how it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from gpuyard.local.servers import PostgresServer
from shared.errors import ConfigurationError
from tests.stack import eventually
from tests.workers.fleet import ROOT, STAND_INS, Fleet
from workers.inventory import LocalDevice, host_memory, take_stock


def test_drain_lets_short_work_finish(fleet: Fleet) -> None:
    fleet.start_host()
    job_id = fleet.train("wait")
    fleet.wait_until_set_up(job_id)
    fleet.hosts["one"].send_signal(signal.SIGTERM)
    eventually(lambda: fleet.devices("one", "draining"))
    waiting = fleet.train("quick")
    (fleet.data / "go").touch()
    fleet.wait(job_id, "succeeded")
    assert fleet.hosts["one"].wait(20) == 0
    assert fleet.devices("one", "gone") == ["cpu0@one"]
    assert fleet.job(waiting).state == "queued"
    assert not fleet.processes()
    fleet.start_host("two")
    fleet.wait(waiting, "succeeded")


def test_drain_ends_long_work_at_no_cost_of_a_try(fleet: Fleet) -> None:
    fleet.start_host()
    job_id = fleet.train("deaf", retry={"max_attempts": 1})
    fleet.wait_until_set_up(job_id)
    began = time.monotonic()
    assert fleet.stop_host() == 0
    assert time.monotonic() - began > 2.0  # drain_grace
    assert not fleet.processes()
    [attempt] = fleet.attempts(job_id)
    assert attempt.failure_class == "preempted"
    assert fleet.job(job_id).state == "queued"


def test_second_signal_ends_it_sooner(
    new_fleet: Callable[..., Fleet], database: str, valkey_url: str
) -> None:
    fleet = new_fleet(database, valkey_url, drain_grace="300")
    fleet.start_scheduler()
    fleet.start_host()
    job_id = fleet.train("wait")
    fleet.wait_until_set_up(job_id)
    fleet.hosts["one"].send_signal(signal.SIGINT)
    eventually(lambda: fleet.devices("one", "draining"))
    fleet.hosts["one"].send_signal(signal.SIGINT)
    assert fleet.hosts["one"].wait(20) == 0
    assert not fleet.processes()
    assert fleet.attempts(job_id)[0].failure_class == "preempted"


@pytest.mark.chaos
def test_host_manager_killed_takes_everything_with_it(fleet: Fleet) -> None:
    fleet.start_host()
    job_id = fleet.train("deaf")
    fleet.wait_until_set_up(job_id)
    fleet.hosts["one"].kill()
    # Its workers hear of it and drain.
    eventually(lambda: not fleet.processes(), 25, lambda: str(fleet.processes()))
    assert fleet.attempts(job_id)[0].failure_class == "preempted"


@pytest.mark.chaos
def test_what_an_earlier_run_left_is_swept_before_the_next_serves(fleet: Fleet) -> None:
    """Everything but the ranks is killed or stopped at once, as nothing ever should be."""
    host = fleet.start_host()
    job_id = fleet.train("deaf")
    fleet.wait_until_set_up(job_id)
    left = fleet.processes()
    for pid in left:
        os.kill(pid, signal.SIGSTOP)
    host.kill()
    assert host.wait(10) != 0
    fleet.start_host()
    eventually(lambda: not set(left) & set(fleet.processes()))
    eventually(lambda: len(fleet.attempts(job_id)) == 2, 20, lambda: fleet.story(job_id))


def test_second_manager_of_a_host_is_refused(fleet: Fleet) -> None:
    host = fleet.start_host()
    second = subprocess.run(
        [sys.executable, "-m", "workers", "--name=one", "--devices=cpu:1", *STAND_INS],
        cwd=ROOT,
        env=fleet.environment,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert second.returncode == 5
    assert f"serves host 'one' in {fleet.data} already (process {host.pid})" in second.stderr
    assert "Traceback" not in second.stderr
    assert fleet.devices("one") == ["cpu0@one"]


def test_waits_for_postgres_with_a_message(
    new_fleet: Callable[..., Fleet], new_postgres: Callable[[], PostgresServer], valkey_url: str
) -> None:
    postgres = new_postgres()
    fleet = new_fleet(postgres.url, valkey_url)
    postgres.stop()
    with fleet.log("one").open("ab") as out:
        host = subprocess.Popen(
            [sys.executable, "-m", "workers", "--name=one", "--devices=cpu:1", *STAND_INS],
            cwd=ROOT,
            env=fleet.environment,
            stdout=out,
            stderr=out,
        )
    fleet.hosts["one"] = host
    eventually(lambda: "waiting: Postgres cannot be reached" in fleet.log("one").read_text())
    assert host.poll() is None
    postgres.start()
    eventually(lambda: fleet.devices("one"), 30)
    assert fleet.stop_host() == 0


def test_broker_down_at_start_is_waited_for(
    new_fleet: Callable[..., Fleet], new_valkey: Callable[[], object], database: str
) -> None:
    valkey = new_valkey()
    fleet = new_fleet(database, valkey.url)  # type: ignore[attr-defined]
    valkey.kill()  # type: ignore[attr-defined]
    with fleet.log("one").open("ab") as out:
        fleet.hosts["one"] = subprocess.Popen(
            [sys.executable, "-m", "workers", "--name=one", "--devices=cpu:1", *STAND_INS],
            cwd=ROOT,
            env=fleet.environment,
            stdout=out,
            stderr=out,
        )
    eventually(lambda: "Cannot connect to redis" in fleet.log("one").read_text(), 30)
    valkey.start()  # type: ignore[attr-defined]
    eventually(lambda: fleet.devices("one"), 30)
    assert "ended" not in fleet.log("one").read_text()
    assert fleet.stop_host() == 0


def test_missing_settings_are_named(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "DATABASE_URL"}
    done = subprocess.run(
        [sys.executable, "-m", "workers"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 2
    assert "DATABASE_URL is not set" in done.stderr
    assert "Traceback" not in done.stderr


def test_stock_of_cpu_slots() -> None:
    devices = take_stock("here", "cpu:2")
    assert [device.id for device in devices] == ["cpu0@here", "cpu1@here"]
    assert all(device.facts.capability.queue == "cpu" for device in devices)
    shares = [device.facts.capability.memory_bytes for device in devices]
    assert 0.9 * host_memory() <= sum(shares) <= host_memory()
    assert devices[0].environment == {"CUDA_VISIBLE_DEVICES": ""}
    assert not devices[0].handle.bf16


def test_stock_of_simulated_devices() -> None:
    devices = take_stock("here", "auto", "2xA100-80GB,1xT4-16GB")
    assert [d.facts.capability.queue for d in devices] == [
        *["cuda.sm80.80g"] * 2,
        "cuda.sm75.16g",
    ]
    for device in devices:
        assert device.facts.simulated
        assert "simulated" in device.facts.model
        assert device.handle.kind == "cpu"
        assert LocalDevice.from_json(device.to_json()) == device


@pytest.mark.parametrize(
    ("devices", "simulate"),
    [
        *[("cpu:0", None), ("cpu:all", None), ("tpu:1", None), ("cpu:1,cpu:1", None)],
        *[("", None), ("auto", "3xT5"), ("gpu:999", None)],
    ],
)
def test_stock_refuses_what_is_not_there(devices: str, simulate: str | None) -> None:
    with pytest.raises(ConfigurationError):
        take_stock("here", devices, simulate)


def test_no_driver_means_no_gpus_and_no_noise(caplog: pytest.LogCaptureFixture) -> None:
    with suppress(ImportError):
        import pynvml

        with suppress(pynvml.NVMLError):
            pynvml.nvmlInit()
            pytest.skip("this machine has GPUs")
    assert all(not device.is_gpu for device in take_stock("here"))
    assert len(take_stock("here")) >= 2
    assert not caplog.records
