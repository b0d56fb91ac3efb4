"""The connection to Postgres: transactions, wake-ups, and waiting for a server that is not up yet."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Concatenate, ParamSpec, TypeVar

import psycopg
from sqlalchemy import ColumnElement, create_engine, event, func, make_url, text
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlmodel import Session

from shared.errors import Unavailable

log = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")

WAKE_SCHEDULER = "gpuyard_scheduler"
"""Something to decide: a job was submitted, a device came or became free."""
WAKE_JOB = "gpuyard_job"
"""Payload: the id of a job whose events, logs, progress or results grew."""
WAKE_ATTEMPT = "gpuyard_attempt"
"""Payload: the id of an attempt whose workers should renew at once (cancel, end, rendezvous)."""
WAKE_MEASURE = "gpuyard_measure"
"""A configuration was submitted whose memory nobody has measured."""

# Deadlock detected, serialization failure, and two transactions that want one device at once:
# nothing happened, and the same call again sees what the other one did.
_RETRYABLE = {"40P01", "40001", "23P01"}
_TRIES = 5
_WAKES = "wakes"
_NOTIFY = text(
    "SELECT pg_notify(channel, payload)"
    " FROM unnest(CAST(:channels AS text[]), CAST(:payloads AS text[])) AS wake (channel, payload)"
)
_CONNECT_ARGS: dict[str, Any] = {
    "connect_timeout": 5,
    "application_name": "gpuyard",
    # A cut network must not look like a slow query, or like a quiet channel, for ever.
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 30_000,
}

_IDLE_SECONDS = 20
"""A process that is stopped or frozen inside a transaction keeps its locks; Postgres ends such a transaction
after so long, and whoever waits goes on. Ours do nothing slow inside."""


class Store:
    """One per process. Threads share it; each call has a connection of its own."""

    def __init__(self, url: str, *, pool_size: int = 8) -> None:
        self.url = url
        self.engine = create_engine(
            url,
            pool_size=pool_size,
            max_overflow=8,
            pool_pre_ping=True,
            pool_timeout=30,
            connect_args=_CONNECT_ARGS,
        )
        event.listen(self.engine, "connect", _limit_idle_transactions)

    @contextmanager
    def transaction(self) -> Iterator[Session]:
        """Commits at the end, rolls back on an exception. Keep nothing slow inside."""
        with Session(self.engine, expire_on_commit=False) as session, session.begin():
            yield session
            _send_wakes(session)

    def call(
        self, function: Callable[Concatenate[Session, P], R], *args: P.args, **kwargs: P.kwargs
    ) -> R:
        """Run one store function in a transaction of its own; again if it lost a race in Postgres, in
        which case it has done nothing.

        Raises:
            Unavailable: Postgres cannot be reached. Whether the transaction was committed is then
                unknown; every transition is guarded, so calling again is safe.
        """
        for attempt in range(1, _TRIES + 1):
            try:
                with self.transaction() as session:
                    return function(session, *args, **kwargs)
            except DBAPIError as error:
                if getattr(error.orig, "sqlstate", None) in _RETRYABLE and attempt < _TRIES:
                    log.info("%s: %s; again", function.__name__, error.orig)
                    continue
                if is_connection_loss(error):
                    raise _unreachable() from error
                raise
            except PoolTimeout as error:  # all connections hang in calls that get no answer
                raise _unreachable() from error
        raise AssertionError("unreachable")

    def wait_until_ready(self, *, announce: Callable[[str], None], timeout: float = 3600) -> None:
        """Block until Postgres answers and the migrations of this version are in.

        ``announce`` gets a line for people when the reason for waiting changes and every 30 s.

        Raises:
            Unavailable: not ready within ``timeout`` seconds.
        """
        from shared.migrate import missing_migrations

        deadline, said_at, said, pause = time.monotonic() + timeout, 0.0, "", 0.2
        while True:
            try:
                missing = missing_migrations(self.engine)
                if not missing:
                    return
                reason = f"the database lacks migration {missing}: run `gpuyard migrate`"
            except (OperationalError, InterfaceError) as error:
                what = str(error.orig).strip().splitlines()
                reason = f"Postgres cannot be reached: {what[0] if what else error}"
            # Said before the deadline is looked at: on a busy machine the first try alone may take
            # longer than the timeout, and the reason belongs in the log also then.
            now = time.monotonic()
            if reason != said or now - said_at > 30:
                announce(f"waiting: {reason}")
                said, said_at = reason, now
            if now > deadline:
                raise Unavailable(reason, hint="Check DATABASE_URL.")
            time.sleep(pause)
            pause = min(pause * 1.5, 3.0)

    def listen(self, *channels: str) -> Listener:
        """A connection of its own that hears NOTIFY on ``channels``."""
        return Listener(self.url, channels)

    def close(self) -> None:
        self.engine.dispose()


class Listener:
    """Waits for wake-ups. They can be lost with the connection, so callers poll as well."""

    def __init__(self, url: str, channels: tuple[str, ...]) -> None:
        self._conninfo = make_url(url).set(drivername="postgresql").render_as_string(False)
        self._channels = channels
        self._connection: psycopg.Connection[Any] | None = None

    def wait(self, timeout: float) -> list[tuple[str, str]]:
        """(channel, payload) of what arrived within ``timeout`` seconds; returns at the first few.

        A lost connection counts as a quiet time and is opened again at the next call.
        """
        started = time.monotonic()
        try:
            if self._connection is None or self._connection.closed:
                self._connection = psycopg.connect(self._conninfo, autocommit=True, **_CONNECT_ARGS)
                for channel in self._channels:
                    self._connection.execute(f'LISTEN "{channel}"')
            found = self._connection.notifies(timeout=timeout, stop_after=1)
            return [(n.channel, n.payload) for n in found]
        except (psycopg.OperationalError, psycopg.InterfaceError):
            self.close()
            time.sleep(max(0.0, min(timeout, 1.0) - (time.monotonic() - started)))
            return []

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def _limit_idle_transactions(connection: Any, _: object) -> None:
    # Not by connection options: those of a DATABASE_URL would be lost.
    with connection.cursor() as cursor:
        cursor.execute(f"SET idle_in_transaction_session_timeout = '{_IDLE_SECONDS}s'")
    connection.commit()


def _unreachable() -> Unavailable:
    return Unavailable(
        "the job store (Postgres) cannot be reached",
        hint="It is retried; see that DATABASE_URL is right and the server is up.",
    )


def is_connection_loss(error: DBAPIError) -> bool:
    """Whether Postgres was out of reach, as against refusing what was asked of it."""
    state = getattr(error.orig, "sqlstate", None)
    lost = isinstance(error, (OperationalError, InterfaceError)) or error.connection_invalidated
    return lost and (state is None or state.startswith(("08", "57P", "53", "25P03")))


def wake(session: Session, channel: str, payload: str = "") -> None:
    """Wake the listeners of ``channel`` when this transaction commits."""
    # Kept in order, each once, and sent with one statement at the end: see ``Store.transaction``.
    session.info.setdefault(_WAKES, {})[channel, payload] = None


def _send_wakes(session: Session) -> None:
    wakes = session.info.pop(_WAKES, {})
    if wakes:
        channels, payloads = zip(*wakes, strict=True)
        session.execute(_NOTIFY, {"channels": list(channels), "payloads": list(payloads)})


def db_now() -> ColumnElement[Any]:
    """The database's clock, the one clock that all parts share."""
    return func.clock_timestamp()


def after(seconds: float) -> ColumnElement[Any]:
    """A point in time so many seconds from now, by the database's clock."""
    return func.clock_timestamp() + func.make_interval(0, 0, 0, 0, 0, 0, float(seconds))
