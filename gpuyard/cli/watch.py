"""Following a job to its end: moving progress on a terminal, lines otherwise."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from gpuyard.cli import render
from gpuyard.cli.command import Interrupted
from gpuyard.cli.session import Session
from gpuyard.errors import JobFailed
from gpuyard.waiting import looks
from shared.errors import Unavailable
from shared.lifecycle import JobState
from shared.views import JobDetail

LOOK_EVERY = 0.5
LINE_EVERY = 10.0
"""Seconds between lines of progress where nothing can move."""
WINDOW = 30.0
"""Seconds over which the speed of rows is taken."""


def watch(session: Session, id: str) -> None:
    """Show the job until it is over.

    With ``--json``, one line of stdout each time it looks different, the last one terminal.

    Raises:
        JobFailed: it failed or was cancelled.
        Interrupted: Ctrl-C; the job goes on.
    """
    job: JobDetail | None = None
    with _detaching(id), _display(session) as display:
        for look in looks(lambda: session.client.job(id), every=LOOK_EVERY):
            if isinstance(look, Unavailable):
                continue  # the session says so; the job goes on
            session.reached()
            if look != job and session.json:
                session.emit(look)
            job = look
            # Events are asked for after the look, so that those of the end are among them.
            display.tell(session, id)
            display.show(job)
    if job is None or not job.state.terminal:
        raise AssertionError("a watch ends with the job")
    if job.state is not JobState.SUCCEEDED:
        raise JobFailed(job)
    if not session.json:
        started = job.started_at or job.created_at
        took = render.duration(((job.finished_at or started) - started).total_seconds())
        session.say(f"{job.id} succeeded in {took}", style="green")
        if result := render.summary(job):
            session.out.print(result, soft_wrap=True)


@contextmanager
def _detaching(id: str) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(
            f"detached; {id} goes on\n"
            f"  watch it again: gpuyard watch {id}\n"
            f"  end it:         gpuyard cancel {id}"
        ) from None


@contextmanager
def _display(session: Session) -> Iterator[Display]:
    if session.json:
        yield Display()
    elif session.live:
        with Live(console=session.err, transient=True, refresh_per_second=8) as live:
            yield MovingDisplay(live)
    else:
        yield LineDisplay(session)


class Display:
    """Shows nothing: for ``--json``."""

    def show(self, job: JobDetail) -> None:
        """How the job stands now."""

    def tell(self, session: Session, id: str) -> None:
        """Events since the last time."""


class _Telling(Display, ABC):
    def __init__(self) -> None:
        self._last_event = 0
        self._rows: deque[tuple[float, int]] = deque()

    @abstractmethod
    def line(self, text: Text) -> None:
        """Show a line, below those before it."""

    def tell(self, session: Session, id: str) -> None:
        with suppress(Unavailable):  # then it is told the next time
            for event in session.client.events(id, after=self._last_event, follow=False):
                self._last_event = event.id
                self.line(render.event(event))

    def rows_per_second(self, job: JobDetail) -> float | None:
        """Measured here, from the rows that are committed."""
        now, done = time.monotonic(), job.rows_done or 0
        self._rows.append((now, done))
        while now - self._rows[0][0] > WINDOW:
            self._rows.popleft()
        then, before = self._rows[0]
        return (done - before) / (now - then) if now - then > 1 and done > before else None


class MovingDisplay(_Telling):
    """A bar, numbers and the reason of waiting at the bottom; events scroll above."""

    def __init__(self, live: Live) -> None:
        super().__init__()
        self._live = live
        self._spinner = Spinner("dots")

    def line(self, text: Text) -> None:
        self._live.console.print(text, soft_wrap=True)

    def show(self, job: JobDetail) -> None:
        done, total = _measure(job)
        head = Table.grid(padding=(0, 1, 0, 0))
        cells: list[RenderableType] = [self._spinner, render.state(job.state)]
        if job.state.active and total:
            width = max(10, min(40, self._live.console.width - 40))
            bar = ProgressBar(total=total, completed=done, width=width)
            cells += [bar, Text(f"{100 * done // total}%"), Text(render.time_left(job))]
        head.add_row(*cells)
        if remark := render.remark(job):
            below = [remark]
        else:
            standing = render.standing_of(job, self.rows_per_second(job))
            below = render.wrapped(standing, self._live.console.width - 2)
        self._live.update(Group(head, *(Text("  " + line, style="dim") for line in below)))


class LineDisplay(_Telling):
    """A line now and then: for logs of CI and for pipes."""

    def __init__(self, session: Session) -> None:
        super().__init__()
        self._session = session
        self._said = ("", 0.0)

    def line(self, text: Text) -> None:
        self._session.err.print(text, soft_wrap=True)

    def show(self, job: JobDetail) -> None:
        speed = self.rows_per_second(job)
        text = render.remark(job) or render.pace(job, speed)
        before, when = self._said
        now = time.monotonic()
        waits = job.state is JobState.QUEUED
        if job.state.terminal or not text or text == before:
            return
        if waits or now - when >= LINE_EVERY:
            self._said = (text, now)
            self.line(Text(f"          {job.state}: {text}"))


def _measure(job: JobDetail) -> tuple[int, int]:
    """(done, in all), in rows or steps."""
    if job.kind == "infer" and job.rows_total:
        return job.rows_done or 0, job.rows_total
    if job.progress is not None:
        return job.progress.step, job.progress.total_steps
    return 0, 0
