"""The whole service on one machine: ``gpuyard up``.

In the order of its life (``up``): own the data folder; end what a killed run left; start Postgres and
Valkey (or use those of ``DATABASE_URL`` and ``BROKER_URL``); migrate; make an API key; start API,
scheduler, workers and Flower; wait until all answer; say where everything is; start again what ends;
on Ctrl-C or SIGTERM drain the workers and stop everything in turn. Nothing remains running.

Everything is a child of this process, with its settings in the environment, and gets a signal when
this process is killed.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import httpx

from gpuyard.connection import INSTANCE_FILE, data_folder
from gpuyard.local.demo_models import provide_encoder
from gpuyard.local.instance import Instance, read_instance
from gpuyard.local.parts import Part, how_it_ended
from gpuyard.local.processes import (
    STACK_TAG,
    ProcessId,
    command_line,
    end,
    end_strangers,
    find_by_tag,
)
from gpuyard.local.servers import FolderLock, PostgresServer, ValkeyServer, free_port, secret
from shared.errors import AlreadyRunning, ConfigurationError, Unavailable

Say = Callable[[str], None]

START_SECONDS = 180.0
"""Everything has to answer by then; importing torch is the slow part."""
STOP_SECONDS = 150.0
"""What draining workers and the rest get, at most, from outside (``background.RunningStack.stop``)."""
DRAIN_GRACE = 10.0
"""Seconds that running attempts get at Ctrl-C; they go on from their checkpoint at the next start."""


@dataclass(frozen=True)
class StackOptions:
    """What ``gpuyard up`` can be told. Ports: None takes a customary one if it is free, 0 any."""

    data: Path = field(default_factory=data_folder)
    devices: str = "auto"
    """As ``gpuyard worker --devices``: ``auto``, ``cpu:2``, ``gpu:all`` …"""
    simulate: str | None = None
    """Devices to register and not to have, such as ``2xA100-80GB,1xT4-16GB``."""
    host: str = "127.0.0.1"
    """Where API and Flower listen."""
    api_port: int | None = None
    flower_port: int | None = None
    flower: bool = True
    fsync: bool = True
    """Off only for tests: a crash of the machine could then cost the data."""


class Stack:
    """A stack that this process runs. To be used in the main thread."""

    def __init__(self, options: StackOptions, say: Say) -> None:
        self.options = options
        self.data = options.data.expanduser().resolve()
        self.parts: dict[str, Part] = {}
        self.instance: Instance | None = None
        self._say = _unbreakable(say)
        self._lock = FolderLock(self.data / "up.lock")
        self._postgres: PostgresServer | None = None
        self._valkey: ValkeyServer | None = None
        self._signals = 0
        self._starting = False

    def start(self) -> Instance:
        """Start everything and wait until it answers.

        Raises:
            AlreadyRunning: a stack runs on this data folder; names its process and address.
            Unavailable: a part ended or did not answer in time; carries the end of its log.
            KeyboardInterrupt: told to stop meanwhile.
        """
        self._own_the_folder()
        deadline = time.monotonic() + START_SECONDS
        try:
            self._starting = True
            environment = self._environment(self._start_servers())
            key_file = self._prepare_store(environment["DATABASE_URL"])
            provide_encoder(self.data)
            self._start_parts(environment)
            key = key_file.read_text().strip()
            self._wait_for_answers(key, deadline)
            self.instance = self._describe(key, key_file)
            self.instance.write()
            self._starting = False
        except BaseException:
            # Also the KeyboardInterrupt of `handle_signals`: what was started must not stay.
            self._starting = False
            self.stop()
            raise
        return self.instance

    def serve(self) -> None:
        """Start again what ends, until told to stop."""
        while not self._signals:
            changed = False
            for part in self.parts.values():
                changed |= part.look_after(self._say)
            for server in (self._postgres, self._valkey):
                if server is not None and server.pid is None:
                    self._say(f"{server.name} ended; starts again ({server.log})")
                    try:
                        server.start()
                        changed = True
                    except Unavailable as error:
                        self._say(f"{error}")
                        time.sleep(2)
            if changed and self.instance is not None:
                self.instance = self._describe(
                    self.instance.api_key, Path(self.instance.api_key_file)
                )
                self.instance.write()
            # What is watched are processes and signals: nothing that one call could wait for.
            time.sleep(0.1)

    def handle_signals(self) -> None:
        """SIGTERM, Ctrl-C and a closed terminal stop it; a second one shortens the drain."""

        def note(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 - as signals call it
            self._signals += 1
            if self._starting and self._signals == 1:
                raise KeyboardInterrupt

        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, note)

    def stop(self) -> None:
        """Drain the workers, then stop loop, API and Flower, then the servers. For sure."""
        (self.data / INSTANCE_FILE).unlink(missing_ok=True)
        self._drain()
        for name in ("scheduler", "api", "flower"):
            if (part := self.parts.pop(name, None)) is not None and part.process is not None:
                self._say(f"stopping {name}")
                end(part.process, [(signal.SIGTERM, part.end_seconds)])
        left = find_by_tag(self.data)
        if left:
            self._say(f"ending {len(left)} processes that were left")
            end_strangers(left, [(signal.SIGTERM, 3)])
        for server in (self._valkey, self._postgres):
            if server is not None:
                self._say(f"stopping {server.name}")
                server.stop()
        self._lock.release()

    def _drain(self) -> None:
        part = self.parts.pop("workers", None)
        if part is None or part.process is None:
            return
        self._say(
            "stopping workers: running jobs are ended and go on at the next start (again to hurry)"
        )
        part.process.send_signal(signal.SIGTERM)
        seen, deadline = self._signals, time.monotonic() + part.end_seconds
        while part.process.poll() is None and time.monotonic() < deadline:
            if self._signals > seen:
                seen = self._signals
                part.process.send_signal(signal.SIGTERM)
            time.sleep(0.05)
        end(part.process, [])

    def _own_the_folder(self) -> None:
        try:
            self.data.mkdir(mode=0o700, parents=True, exist_ok=True)
            owned = self._lock.acquire()
        except OSError as error:
            raise ConfigurationError(
                f"the data folder {self.data} cannot be used: {error.strerror}",
                param="data",
                hint="Choose another with --data, or GPUYARD_DATA.",
            ) from None
        if not owned:
            running = read_instance(self.data)
            where = f" and answers at {running.url}" if running else " and is just starting"
            raise AlreadyRunning(
                f"a gpuyard stack runs on {self.data} already: process {self._lock.holder()}{where}",
                hint="Use that one, stop it first, or give this one a folder of its own with --data.",
            )
        (self.data / INSTANCE_FILE).unlink(missing_ok=True)
        if left := find_by_tag(self.data):
            self._say(f"ending {len(left)} processes that an earlier run left")
            end_strangers(left, [(signal.SIGTERM, 3)])

    def _start_servers(self) -> tuple[str, str]:
        """(DATABASE_URL, BROKER_URL): the embedded servers', or those of the environment."""
        database, broker = os.environ.get("DATABASE_URL"), os.environ.get("BROKER_URL")
        if not database:
            self._say("starting Postgres")
            self._postgres = PostgresServer(self.data, fsync=self.options.fsync)
            database = self._postgres.start()
        if not broker:
            self._say("starting Valkey")
            self._valkey = ValkeyServer(self.data)
            broker = self._valkey.start()
        return database, broker

    def _environment(self, servers: tuple[str, str]) -> dict[str, str]:
        from pydantic import ValidationError

        from shared.settings import Settings

        database, broker = servers
        own = {
            "DATABASE_URL": database,
            "BROKER_URL": broker,
            "GPUYARD_DATA": str(self.data),
            "GPUYARD_FLOWER_USER": "gpuyard",
            "GPUYARD_FLOWER_PASSWORD": secret(self.data, "flower"),
            STACK_TAG: str(self.data),
        }
        given = {"GPUYARD_DRAIN_GRACE": f"{DRAIN_GRACE:g}", "PYTHONUNBUFFERED": "1", **os.environ}
        try:
            # Read here only to refuse wrong settings before anything is started with them.
            checked = Settings(DATABASE_URL=database, BROKER_URL=broker)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            what = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
            raise ConfigurationError(what, hint="It comes from the environment.") from None
        return {**given, **own, "DATABASE_URL": checked.database_url}

    def _prepare_store(self, database_url: str) -> Path:
        """Migrate, and see that there is a valid API key; the file that it is in."""
        from shared.migrate import upgrade
        from shared.store import Store
        from shared.store.keys import create_key, find_key

        self._say("preparing the job store")
        upgrade(database_url)
        path = self.data / "secrets" / "api-key"
        store = Store(database_url, pool_size=1)
        try:
            if not path.exists() or store.call(find_key, path.read_text().strip()) is None:
                path.touch(mode=0o600)
                path.write_text(store.call(create_key, "local")[1] + "\n")
        finally:
            store.close()
        return path

    def _start_parts(self, environment: Mapping[str, str]) -> None:
        host, python = self.options.host, sys.executable
        self._api_port = choose_port(self.options.api_port, 8080)
        api = [python, "-m", "scheduler", "api", "--host", host, "--port", str(self._api_port)]
        self._add("api", api, environment, 15)
        self._add("scheduler", [python, "-m", "scheduler", "run"], environment, 15)
        workers = [python, "-m", "workers", "--name", host_name()]
        if self.options.simulate:
            workers += ["--simulate", self.options.simulate]
        else:
            workers += ["--devices", self.options.devices]
        self._add("workers", workers, environment, STOP_SECONDS - 40)
        if self.options.flower:
            self._flower_port = choose_port(self.options.flower_port, 5555)
            flower = [python, "-m", "gpuyard.local.flower", "--address", host]
            self._add("flower", [*flower, "--port", str(self._flower_port)], environment, 10)

    def _add(self, name: str, argv: list[str], env: Mapping[str, str], seconds: float) -> None:
        self._say(f"starting {name}")
        part = Part(name, argv, env, self.data / "logs" / f"{name}.log", seconds)
        part.start()
        self.parts[name] = part

    def _wait_for_answers(self, key: str, deadline: float) -> None:
        """Until the API is ready, each of our devices is served, and Flower answers."""
        self._await("api", deadline, lambda: _status(f"{self._api_url}/readyz") == 200)
        if "flower" in self.parts:
            self._await(
                "flower", deadline, lambda: _status(f"{self._flower_url}/healthcheck") == 200
            )
        self._say("waiting for the devices (loading PyTorch)")
        self._await("workers", deadline, lambda: self._devices_served(key))
        self._await("scheduler", deadline, lambda: True)

    def _await(self, name: str, deadline: float, answers: Callable[[], bool]) -> None:
        part = self.parts[name]
        while True:
            code = part.process.poll() if part.process is not None else 0
            if code is not None:
                what = f"{name} {how_it_ended(code)} while starting"
                raise Unavailable(what, hint=part.log_tail())
            if answers():
                return
            if time.monotonic() > deadline:
                raise Unavailable(
                    f"{name} did not answer within {START_SECONDS:g} s", hint=part.log_tail()
                )
            time.sleep(0.1)

    def _devices_served(self, key: str) -> bool:
        """Whether every worker process of this run has registered its device. The store also knows
        devices of earlier runs and of other hosts, so pids are compared."""
        tagged = (process.pid for process in find_by_tag(self.data))
        ours = {pid for pid in tagged if "--device" in command_line(pid)}  # one process for each
        if not ours:
            return False
        headers = {"Authorization": f"Bearer {key}"}
        with contextlib.suppress(httpx.HTTPError, ValueError, KeyError):
            answer = httpx.get(f"{self._api_url}/v1/workers", headers=headers, timeout=5)
            here = [w for w in answer.json()["items"] if w["host"] == host_name()]
            return ours <= {worker["pid"] for worker in here}
        return False

    @property
    def _api_url(self) -> str:
        return f"http://{_reachable(self.options.host)}:{self._api_port}"

    @property
    def _flower_url(self) -> str:
        return f"http://{_reachable(self.options.host)}:{self._flower_port}"

    def _describe(self, key: str, key_file: Path) -> Instance:
        me = ProcessId.of(os.getpid())
        assert me is not None  # noqa: S101 - we live
        pids = {name: part.pid for name, part in self.parts.items()}
        for server in (self._postgres, self._valkey):
            if server is not None:
                pids[server.name] = server.pid
        return Instance(
            url=self._api_url,
            api_key=key,
            api_key_file=str(key_file),
            flower_url=self._flower_url if "flower" in self.parts else None,
            flower_user="gpuyard",
            flower_password_file=str(self.data / "secrets" / "flower"),
            data=str(self.data),
            pid=me.pid,
            started=me.started,
            parts={name: pid for name, pid in pids.items() if pid is not None},
        )


def up(options: StackOptions, say: Say, ready: Callable[[Instance], None]) -> None:
    """Run a stack until SIGTERM or Ctrl-C. ``ready`` is called once all of it answers.

    Raises:
        AlreadyRunning, ConfigurationError, Unavailable: see ``Stack.start``; nothing is left running.
    """
    stack = Stack(options, say)
    stack.handle_signals()
    try:
        instance = stack.start()
    except KeyboardInterrupt:
        return
    try:
        ready(instance)
        stack.serve()
    finally:
        stack.stop()
        _unbreakable(say)("stopped")


def choose_port(wanted: int | None, customary: int) -> int:
    """The wanted port; for None the customary one if it is free, else any; for 0 any."""
    if wanted:
        return wanted
    if wanted is None:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", customary))
            return customary
    return free_port()


def host_name() -> str:
    """This machine's name as workers carry it: devices are ``cpu0@name``."""
    name = re.sub(r"[^A-Za-z0-9-]+", "-", socket.gethostname().partition(".")[0]).strip("-")
    return name[:60] or "local"


def _unbreakable(say: Say) -> Say:
    """A closed terminal must not keep anything from being stopped."""

    def unbroken(line: str) -> None:
        with contextlib.suppress(OSError, ValueError):
            say(line)

    return unbroken


def _status(url: str) -> int:
    try:
        return httpx.get(url, timeout=5).status_code
    except httpx.HTTPError:
        return 0


def _reachable(host: str) -> str:
    """Where to reach, from this machine, what listens on ``host``."""
    if host in ("0.0.0.0", "::", ""):  # noqa: S104 - compared, not listened on
        return "127.0.0.1"
    return f"[{host}]" if ":" in host else host
