"""A whole `gpuyard up` as a user starts it, with handles to break it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

from gpuyard import Client
from shared.store import Store
from tests.e2e.processes import alive, environment_of, started_by_stack
from tests.stack import eventually

ROOT = Path(__file__).resolve().parents[2]

# Short enough for tests to see leases run out, long enough for two busy cores.
QUICK: dict[str, str] = {
    "GPUYARD_LEASE_TTL": "6",
    "GPUYARD_LEASE_RENEW_EVERY": "1",
    "GPUYARD_HEARTBEAT_EVERY": "1",
    "GPUYARD_DEVICE_TIMEOUT": "8",
    "GPUYARD_LEADER_TTL": "3",
    "GPUYARD_RERING_EVERY": "2",
    "GPUYARD_CLAIM_TIMEOUT": "20",
    "GPUYARD_END_GRACE": "3",
}


class StackProcess:
    """`gpuyard up` on a data folder. ``workers`` CPU slots, or ``simulate``d devices."""

    def __init__(
        self,
        data: Path,
        *,
        workers: int = 2,
        simulate: str | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.data = data
        argv = [sys.executable, "-m", "gpuyard", "up", "--data", str(data)]
        argv += ["--simulate", simulate] if simulate else ["--workers", str(workers)]
        data.parent.mkdir(parents=True, exist_ok=True)
        self.output = data.parent / f"{data.name}-up.log"
        home = data.parent / "home"
        home.mkdir(exist_ok=True)
        self._env = {**os.environ, **QUICK, **(env or {}), "HOME": str(home), "NO_COLOR": "1"}
        for name in ("DATABASE_URL", "BROKER_URL", "GPUYARD_URL", "GPUYARD_API_KEY"):
            self._env.pop(name, None)
        self._argv = argv
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> StackProcess:
        with self.output.open("ab") as output:
            self.process = subprocess.Popen(
                self._argv, cwd=ROOT, env=self._env, stdout=output, stderr=subprocess.STDOUT
            )
        eventually(self._up, within=120, what=f"`gpuyard up` ({self.output})")
        return self

    def _up(self) -> bool:
        if self.process is None or self.process.poll() is not None:
            raise RuntimeError(f"`gpuyard up` ended: {self.output.read_text()}")
        with contextlib.suppress(OSError, ValueError, KeyError):
            return bool(self.instance["pid"] == self.process.pid)
        return False

    @property
    def instance(self) -> dict[str, object]:
        found: dict[str, object] = json.loads((self.data / "instance.json").read_text())
        return found

    @cached_property
    def client(self) -> Client:
        return Client(url=str(self.instance["url"]), api_key=str(self.instance["api_key"]))

    def pid(self, part: str) -> int:
        """Process id of a part as it is now."""
        parts = self.instance["parts"]
        assert isinstance(parts, dict)
        return int(parts[part])

    @cached_property
    def store(self) -> Store:
        return Store(self.setting("DATABASE_URL"), pool_size=2)

    def setting(self, name: str) -> str:
        """A setting as the scheduler got it."""
        return environment_of(self.pid("scheduler"))[name]

    def stop(self) -> None:
        """Ctrl-C, as a user ends it; afterwards nothing of it runs."""
        if self.process is None:
            return
        if "store" in self.__dict__:
            self.store.close()
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGINT)
        code = self.process.wait(60)
        left = started_by_stack(self.data)
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        assert not left, f"{[(p, alive(p)) for p in left]} outlived `gpuyard up`"
        assert code in (0, 130), self.output.read_text()[-4000:]
