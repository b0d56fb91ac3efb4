"""The shards of one rank: leased, kept in the engine, passed on, and isolated when they kill it."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import time
from typing import Any

from shared.errors import Unavailable
from shared.lifecycle import FailureClass
from shared.messages import (
    ComputeShards,
    InferAssignment,
    Progress,
    Ready,
    Report,
    Shard,
    ShardComputed,
    Stop,
)
from shared.resolved import Resolved
from shared.rows import find_row, read_lines, row_error
from shared.specs import InferSpec
from shared.store.claim import Claimed
from shared.store.ledger import (
    LeasedShard,
    has_suspects,
    lease_shards,
    record_deaths,
    row_totals,
    split_shard,
)
from workers.attempt.inbox import Inbox
from workers.attempt.insist import Insistent
from workers.attempt.outcome import Failed, Outcome, Stale, failed
from workers.attempt.progress import JobProgress
from workers.attempt.reporter import Reporter
from workers.attempt.site import Site
from workers.channel import ChannelClosed
from workers.engine_host import EngineUse

log = logging.getLogger(__name__)

MOST_IN_FLIGHT = 32
"""Shards that a rank leases at once, at most."""
SECONDS_IN_FLIGHT = 0.5
"""Of an engine that computes many small shards a second: what it has at once lasts so long."""
TRY_AGAIN = 0.5
"""Seconds until a lease is asked for again while Postgres is away."""
HOPELESS = 32
"""Engines that may die in a row without one finished shard: more than it takes to isolate a few rows
next to each other. Then it is no matter of rows."""

LOADS = 3
"""Engines that may die while they load the model, when others that were in them may be why."""


def shards_in_flight(spec: InferSpec) -> int:
    """Enough shards for two full batches, so that no slot idles while a result is on its way."""
    return max(2, -(-2 * spec.batch_size // spec.shard_rows) + 1)


class ShardFeed:
    """Leases what is about to be computed, and no more, so that the last rows of a job are shared out
    evenly. Serves one engine after the other, should one die."""

    def __init__(
        self,
        site: Site,
        claimed: Claimed,
        assignment: InferAssignment,
        engine: EngineUse,
        store: Insistent,
        inbox: Inbox,
        reporter: Reporter,
    ) -> None:
        self._site = site
        self._holder = claimed.holder
        resolved = Resolved.model_validate(claimed.resolved)
        self._label, self._path = resolved.model.label, resolved.model.path
        self._input = site.settings.data / resolved.inputs["input"].path
        self._spec = InferSpec.model_validate(claimed.spec)
        self._store = store
        self._inbox = inbox
        self._reporter = reporter
        self._progress = JobProgress(store.call(row_totals, self._holder.job_id), self._totals)
        self._assignment = assignment
        self._engine = engine
        self._in_flight: dict[int, LeasedShard] = {}
        self._waits_alone = False
        """What is open has to be computed alone, and others are still in the engine."""
        self._nothing_at: int | None = None
        """How many were in flight when there was nothing to lease."""
        self.begun = False
        """The engine has heard of the attempt."""
        self._ready_at: float | None = None
        self._computed = 0
        self._died = self._died_loading = 0
        self._stopped = False

    @property
    def in_flight(self) -> bool:
        """The engine has something to compute."""
        return bool(self._in_flight)

    @property
    def expects(self) -> bool:
        """The engine is wanted for something: to load the model, to compute, or to say that it is done."""
        loading = self.begun and self._ready_at is None
        return loading or self.in_flight or self._stopped

    def begin(self) -> None:
        """Feed another engine from now on, once it has the model."""
        self.begun, self._ready_at, self._nothing_at = False, None, None
        self._computed, self._stopped = 0, False
        self._progress.begin()

    def take(self, report: Report) -> None:
        """What the engine reports."""
        match report:
            case ShardComputed():
                self._in_flight.pop(report.index, None)
                if not self._in_flight:
                    self._engine.leave()
                self._computed += 1
                self._died = 0
                self._put(report)
            case Progress():
                self._reporter.put(self._progress.of_job(report))
            case Ready():
                self._ready_at = time.monotonic()
                self._engine.leave()
                self._site.engine.holds(self._label, self._path, report.models)
                self._reporter.put(report)
            case _:
                self._reporter.put(report)

    def order_more(self) -> float | None:
        """Keep the engine fed; when no shard is open, or the rank is to leave, tell it to finish. Returns
        after how many seconds it is to be called again at the latest, if at any time."""
        if not self.begun:
            self._begin()
        if self._stopped or self._ready_at is None or self._reporter.full:
            return None
        drained = not self._in_flight and self._reporter.idle
        if self._inbox.leaving:
            if drained:
                self._stop("asked_back")
            return None
        limit = self._limit()
        alone = any(each.deaths for each in self._in_flight.values())
        told = self._nothing_at is not None and len(self._in_flight) >= self._nothing_at
        if alone or len(self._in_flight) > limit // 2 or (told and not drained):
            return None
        if not self._engine.enter():
            return None
        try:
            return self._lease(limit - len(self._in_flight), drained)
        except Unavailable as error:
            log.warning("no shards are leased: %s; trying on", error)
            return TRY_AGAIN
        finally:
            if not self._in_flight and not self._waits_alone:
                self._engine.leave()

    def bury(self, end: Failed, *, blames: bool) -> Outcome | None:
        """The engine died, as ``end`` says. None: a fresh one is to go on; else how the rank ends, which it
        does if the engine had not even loaded the model, unless others may be why.

        ``blames``: whether what it computed may be why. A shard that it died over alone, and not for the
        first time, is cut in halves; a row that it died over twice alone gets an error.

        Raises:
            GivenUp: Postgres did not answer, and the attempt is given up.
        """
        lost, self._in_flight = list(self._in_flight.values()), {}
        self._waits_alone = False
        self._engine.leave()
        self._died += 1
        if self._died > HOPELESS:
            return end
        if self._ready_at is None and self.begun:
            self._died_loading += 1
            ended = self._engine.ended
            innocent = ended is not None and (ended.crowded or ended.on_purpose)
            return None if innocent and self._died_loading < LOADS else end
        log.warning("the engine died over %d shards: %s", len(lost), end.failure.message)
        if not blames or not lost:
            return None
        try:
            counted = self._record(lost, end.failure.message)
        except (OSError, ValueError) as error:
            return failed(
                FailureClass.DATA_ERROR, "input_changed", str(error), "Submit the job again."
            )
        return self._inbox.end if counted else Stale()

    def _lease(self, count: int, drained: bool) -> float | None:
        """Raises: Unavailable: Postgres is away."""
        having = [*self._in_flight, *self._reporter.shards]
        idle = not self._in_flight
        alone = idle and self._engine.alone()
        self._waits_alone = False
        found = self._site.store.call(lease_shards, self._holder, count, having, idle=alone)
        if alone and not any(each.deaths for each in found or ()):
            self._engine.let_in()
        if found is None:
            self._inbox.end_with(Stale())
        elif not found and idle and not alone and self._suspects():
            self._waits_alone = True
            self._engine.want_alone()
        elif found:
            self._nothing_at = None
            self._in_flight.update((each.shard.index, each) for each in found)
            shards = tuple(each.shard for each in found)
            self._send(ComputeShards(attempt_id=self._holder.attempt_id, shards=shards))
        elif drained:
            # The last of all ranks to look sees the errors of all.
            if not self._progress.look():
                return TRY_AGAIN
            self._check_errors()
            if self._inbox.end is None:
                self._stop("finished")
        else:
            self._nothing_at = len(self._in_flight)
        return None

    def _begin(self) -> None:
        """Tell the engine of the attempt, as soon as nobody has to be alone in it."""
        if self._engine.enter():
            self.begun = True
            self._send(self._assignment)

    def _suspects(self) -> bool:
        """Whether shards are open that have to be computed alone. Raises: Unavailable: Postgres is away."""
        return self._site.store.call(has_suspects, self._holder.job_id)

    def _limit(self) -> int:
        assert self._ready_at is not None  # noqa: S101 - nothing is ordered before
        fewest = shards_in_flight(self._spec)
        seconds = time.monotonic() - self._ready_at
        if seconds < SECONDS_IN_FLIGHT:
            return fewest
        fast = math.ceil(self._computed / seconds * SECONDS_IN_FLIGHT)
        return max(fewest, min(fast, MOST_IN_FLIGHT))

    def _record(self, lost: list[LeasedShard], how: str) -> bool:
        """False: stale.

        Raises:
            GivenUp: Postgres did not answer, and the attempt is given up.
            OSError: the input file cannot be read.
            ValueError: it was changed.
        """
        first = lost[0]
        shard, alone = first.shard, len(lost) == 1
        if alone and first.deaths >= 1 and shard.rows > 1:
            middle = shard.first_row + shard.rows // 2
            offset = find_row(self._input, shard, middle)
            return self._store.call(split_shard, self._holder, shard.index, middle, offset, how)
        if alone and first.deaths >= 2:
            self._put(self._poisonous(shard, how))
            return True
        indexes = [each.shard.index for each in lost]
        return self._store.call(record_deaths, self._holder, indexes, how)

    def _poisonous(self, shard: Shard, how: str) -> ShardComputed:
        [(row, line)] = read_lines(self._input, shard)
        message = f"the engine died twice while it computed this row alone: {how}"
        error = row_error(row, "engine_died", message, id=_id_of(line))
        return ShardComputed(
            attempt_id=self._holder.attempt_id, index=shard.index, results=(error,), seconds=0.0
        )

    def _put(self, report: ShardComputed) -> None:
        bad = sum(result["error"] is not None for result in report.results)
        self._progress.count(len(report.results), bad)
        self._reporter.put(report)
        self._check_errors()

    def _check_errors(self) -> None:
        allowed, errors = self._spec.max_errors, self._progress.errors
        if allowed is not None and errors > allowed:
            self._inbox.end_with(
                failed(
                    FailureClass.DATA_ERROR,
                    "too_many_row_errors",
                    f"{errors} rows failed, and max_errors allows {allowed}",
                    "The results so far name each row's error.",
                )
            )

    def _totals(self) -> dict[str, int] | None:
        try:
            return self._site.store.call(row_totals, self._holder.job_id)
        except Unavailable:
            return None

    def _stop(self, reason: str) -> None:
        self._stopped = True
        self._send(Stop(reason=reason, attempt_id=self._holder.attempt_id))

    def _send(self, message: InferAssignment | ComputeShards | Stop) -> None:
        # An engine that is gone says so by its exit, which the watch sees next.
        with contextlib.suppress(ChannelClosed):
            self._engine.send(message)


def _id_of(line: bytes) -> Any:
    """The row's own id, if it has one."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row.get("id") if isinstance(row, dict) else None
