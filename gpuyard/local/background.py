"""A local stack in a process of its own: for the demo, for benchmarks and for tests."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from gpuyard.local.instance import Instance, read_instance
from gpuyard.local.processes import end, end_strangers, find_by_tag, spawn, wait_until
from gpuyard.local.stack import START_SECONDS, STOP_SECONDS, StackOptions, up
from shared.errors import AlreadyRunning, GpuyardError, Unavailable


@dataclass(slots=True)
class RunningStack:
    """A stack in a process of its own, with the pids of its parts for whoever wants to kill them."""

    instance: Instance
    process: subprocess.Popen[bytes] | None
    """None: somebody else's stack that was running already."""

    @property
    def api_url(self) -> str:
        return self.instance.url

    @property
    def api_key(self) -> str:
        return self.instance.api_key

    @property
    def data(self) -> Path:
        return Path(self.instance.data)

    def pids(self) -> dict[str, int]:
        """Process ids by part, as they are now: parts that ended are started again."""
        now = read_instance(self.data)
        return dict((now or self.instance).parts)

    def stop(self) -> None:
        """Stop it, if it is ours. Nothing of it is left running."""
        if self.process is None:
            return
        end(self.process, [(signal.SIGTERM, STOP_SECONDS)])
        end_strangers(find_by_tag(self.data), [(signal.SIGTERM, 3)])


@contextlib.contextmanager
def stack(
    options: StackOptions, *, env: Mapping[str, str] | None = None, join: bool = False
) -> Iterator[RunningStack]:
    """A stack in a process of its own, for the length of a ``with`` block.

    ``env`` is added to its environment. With ``join``, one that runs on the data folder already is
    used instead, and left running.

    Raises:
        AlreadyRunning, Unavailable: as ``Stack.start``.
    """
    running = start_stack(options, env=env, join=join)
    try:
        yield running
    finally:
        running.stop()


def start_stack(
    options: StackOptions, *, env: Mapping[str, str] | None = None, join: bool = False
) -> RunningStack:
    """The same without a ``with`` block; the caller calls ``stop()``."""
    data = options.data.expanduser().resolve()
    if join and (found := read_instance(data)) is not None:
        return RunningStack(found, None)
    data.mkdir(mode=0o700, parents=True, exist_ok=True)
    log = data / "logs" / "up.log"
    start = log.stat().st_size if log.exists() else 0
    process = spawn(
        [sys.executable, "-m", "gpuyard.local.background", *_as_arguments(options)],
        log=log,
        env={**os.environ, "PYTHONUNBUFFERED": "1", **(env or {})},
    )
    found = None

    def settled() -> bool:
        nonlocal found
        found = read_instance(data)
        if found is not None and found.pid != process.pid:
            found = None  # another stack has the folder; ours is about to say so and end
        return found is not None or process.poll() is not None

    try:
        wait_until(settled, START_SECONDS + 10)
    except BaseException:
        # Ctrl-C above all: nobody else knows of the process that was just started.
        end(process, [(signal.SIGTERM, STOP_SECONDS)])
        raise
    if found is None:
        end(process, [(signal.SIGTERM, 30)])
        said = _text_from(log, start)
        kind = AlreadyRunning if process.returncode == AlreadyRunning.exit_code else Unavailable
        raise kind("the local stack did not start", hint=said[-3000:])
    return RunningStack(found, process)


def _text_from(path: Path, start: int) -> str:
    if not path.exists():
        return ""
    with path.open("rb") as file:
        file.seek(start if path.stat().st_size >= start else 0)
        return file.read().decode(errors="replace").strip()


def _as_arguments(options: StackOptions) -> list[str]:
    return [json.dumps({**asdict(options), "data": str(options.data)})]


def _main() -> int:
    """``python -m gpuyard.local.background JSON``: what ``start_stack`` starts."""
    fields = json.loads(sys.argv[1])
    lock = threading.Lock()

    def say(line: str) -> None:
        with lock:
            print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)

    try:
        up(StackOptions(**{**fields, "data": Path(fields["data"])}), say, lambda _: say("ready"))
    except GpuyardError as error:
        say(f"error: {error}\n{error.hint or ''}".rstrip())
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(_main())
