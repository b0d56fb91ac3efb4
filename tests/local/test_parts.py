"""Parts that end are started again, ever more slowly; Flower's damaged state is put aside."""

from __future__ import annotations

import dbm
import os
from pathlib import Path

import pytest

from gpuyard.local.flower import put_damaged_state_aside, run
from gpuyard.local.parts import Part
from gpuyard.local.processes import end
from shared.errors import ConfigurationError
from tests.stack import eventually


def test_a_part_that_keeps_ending_is_started_ever_more_slowly(tmp_path: Path) -> None:
    said: list[str] = []
    script = "echo began; exit 3"
    part = Part("broken", ["sh", "-c", script], os.environ, tmp_path / "logs" / "broken.log", 5)
    part.start()

    def ended_three_times() -> bool:
        part.look_after(said.append)
        return len(said) == 3

    eventually(ended_three_times, 20, "its third end")
    assert part.restarts == 2
    assert [line.partition(" (")[0] for line in said] == [
        "broken ended with exit code 3; starts again in 0.5 s",
        "broken ended with exit code 3; starts again in 1 s",
        "broken ended with exit code 3; starts again in 2 s",
    ]
    assert "began" in part.log_tail()


def test_a_part_that_runs_is_left_alone(tmp_path: Path) -> None:
    said: list[str] = []
    part = Part("steady", ["sleep", "60"], os.environ, tmp_path / "steady.log", 5)
    part.start()
    assert part.process is not None
    try:
        assert not part.look_after(said.append)
        assert part.pid == part.process.pid
        assert (part.restarts, said) == (0, [])
    finally:
        end(part.process, [])


def test_damaged_flower_state_is_put_aside(tmp_path: Path) -> None:
    state = tmp_path / "state"
    with dbm.open(str(state), "c") as good:
        good["events"] = b"pickled"
    put_damaged_state_aside(state)
    assert list(tmp_path.glob("*damaged*")) == [], "good state was put aside"
    for path in list(tmp_path.glob("state*")):
        path.write_bytes(b"cut off in the middle of a write")
    put_damaged_state_aside(state)
    assert list(tmp_path.glob("state*damaged*"))
    with dbm.open(str(state), "c") as fresh:
        assert not list(fresh.keys())


def test_flower_refuses_to_start_without_a_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgresql://nowhere/none")
    monkeypatch.setenv("BROKER_URL", "redis://nowhere/0")
    with pytest.raises(ConfigurationError, match="GPUYARD_FLOWER_PASSWORD is not set"):
        run()
