"""A nursery whose ranks do what ``entries.py`` says, and an oracle for what is left of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from shared.messages import Notice
from workers.launch import RankProcess, launch

ROOT = Path(__file__).parents[2]
ENTRIES = [
    line.removeprefix("def ").partition("(")[0]
    for line in (Path(__file__).parent / "entries.py").read_text().splitlines()
    if line.startswith("def ") and not line.startswith("def _")
]


class Yard:
    """One nursery with its tag, and the ranks that were launched from it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tag = f"test-{uuid4().hex}"
        self.socket = folder / "nursery.sock"
        self.log = folder / "rank.log"
        self.ranks: list[RankProcess] = []
        self.nurseries: list[subprocess.Popen[bytes]] = []

    def command(self, *options: str) -> list[str]:
        entries = [f"--entry={name}=tests.processes.entries:{name}" for name in ENTRIES]
        place = ["--socket", str(self.socket), "--tag", self.tag]
        return [sys.executable, "-m", "workers.ranks.nursery", *place, *entries, *options]

    def start(self, *options: str) -> subprocess.Popen[bytes]:
        # From the root, where `tests.processes` can be imported.
        nursery = subprocess.Popen(self.command(*(options or ("--no-preload",))), cwd=ROOT)
        self.nurseries.append(nursery)
        return nursery

    def launch(self, kind: str, timeout: float = 30.0, **env: str) -> RankProcess:
        rank = launch(
            self.socket,
            kind,
            env=env,
            log_path=self.log,
            timeout=timeout,
            abandoned_grace=0.5,
        )
        self.ranks.append(rank)
        return rank

    def living(self) -> set[int]:
        """Every process that inherited the tag, but the nurseries and zombies.

        Deliberately not the code under test: the whole of /proc is read, and one environment
        variable tells.
        """
        found = set()
        tag = f"GPUYARD_TREE={self.tag}".encode()
        for entry in Path("/proc").iterdir():
            with suppress(OSError):
                if tag in (entry / "environ").read_bytes().split(b"\0"):
                    found.add(int(entry.name))
        return found - {nursery.pid for nursery in self.nurseries}

    def close(self) -> None:
        for rank in self.ranks:
            rank.close()
        for nursery in self.nurseries:
            if nursery.poll() is None:
                nursery.kill()
            nursery.wait()
        # A failed test must not leave processes on the machine, sleepers without tag included.
        deadline = time.monotonic() + 30
        while (pids := self.living()) and time.monotonic() < deadline:
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


@pytest.fixture
def yard(tmp_path: Path) -> Iterator[Yard]:
    yard = Yard(tmp_path)
    yard.start()
    yield yard
    yard.close()


@pytest.fixture
def empty_yard(tmp_path: Path) -> Iterator[Yard]:
    """Without a nursery yet."""
    yard = Yard(tmp_path)
    yield yard
    yard.close()


@pytest.fixture
def ready() -> Callable[[RankProcess], dict[str, Any]]:
    """Wait until a rank says that it is set up; what it tells about itself."""

    def wait(rank: RankProcess) -> dict[str, Any]:
        notice = rank.channel.receive(timeout=20)
        assert isinstance(notice, Notice), notice
        assert notice.code == "ready"
        return notice.data

    return wait
