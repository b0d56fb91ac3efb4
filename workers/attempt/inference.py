"""An inference attempt: open shards go to the device's warm engine, finished ones to the store."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable

from shared.lifecycle import FailureClass
from shared.messages import (
    ComputeShards,
    Done,
    InferAssignment,
    Progress,
    Ready,
    Report,
    Shard,
    ShardComputed,
    Stop,
)
from shared.messages import Failed as FailedReport
from shared.resolved import Resolved
from shared.specs import InferSpec
from shared.store.claim import Claimed
from shared.store.report import open_shards, row_totals
from workers.attempt.inbox import Inbox
from workers.attempt.insist import Insistent
from workers.attempt.outcome import (
    Failed,
    Finished,
    OomWatch,
    Outcome,
    Stale,
    classify_exit,
    failed,
    last_line,
)
from workers.attempt.reporter import Reporter
from workers.attempt.site import Site
from workers.attempt.watch import Watch
from workers.channel import ChannelClosed, ProtocolError
from workers.launch import Exit, RankProcess

STOP_PATIENCE = 5.0
"""Seconds an engine has to answer a stop. One that does not is ended, and its models are cold."""


def run_inference(
    site: Site,
    claimed: Claimed,
    store: Insistent,
    inbox: Inbox,
    reporter: Reporter,
    deadline: float | None,
) -> Outcome:
    """Returns once the engine works for this attempt no more.

    Raises:
        LaunchFailed: no engine could be started.
        GivenUp: Postgres did not answer, and the attempt is given up.
    """
    holder = claimed.holder
    assignment = inference_assignment(site, claimed)
    oom = OomWatch()
    with site.engine.use() as engine:
        _send(engine, assignment)
        feed = ShardFeed(site, claimed, engine, store, inbox, reporter)
        watch = Watch(
            engine, holder.attempt_id, inbox, reporter, deadline, feed.take, feed.order_more
        )
        end = watch.until_end()
        if isinstance(end, Exit):
            rest = watch.read_rest()
            exit = engine.end(grace=0)
            site.engine.discard()
            if isinstance(rest, Finished | Failed):
                return rest
            words = last_line(site.engine.log_path)
            return classify_exit("the engine", exit, out_of_memory=oom.struck(), last_words=words)
        if watch.said_so:
            # After a failure of this class the engine ends by itself: nothing in it can be trusted.
            if isinstance(end, Failed) and is_infrastructure(end):
                site.engine.discard(grace=site.settings.end_grace)
        elif not _stop(engine, holder.attempt_id, reason_for(end), feed.take):
            site.engine.discard()
        return end


def inference_assignment(site: Site, claimed: Claimed) -> InferAssignment:
    resolved = Resolved.model_validate(claimed.resolved)
    return InferAssignment(
        job_id=claimed.holder.job_id,
        attempt_id=claimed.holder.attempt_id,
        attempt=claimed.attempt_number,
        token=claimed.holder.token,
        device=site.device.handle,
        spec=InferSpec.model_validate(claimed.spec),
        model_path=resolved.model.path,
        input_path=str(site.settings.data / resolved.inputs["input"].path),
    )


def shards_in_flight(spec: InferSpec) -> int:
    """Enough shards for two full batches, so that no slot idles while a result is on its way."""
    return max(2, -(-2 * spec.batch_size // spec.shard_rows) + 1)


class ShardFeed:
    """Orders open shards, keeps a few in the engine, and passes on what comes back.

    Progress is that of the whole job: the rows that earlier attempts committed count.
    """

    def __init__(
        self,
        site: Site,
        claimed: Claimed,
        engine: RankProcess,
        store: Insistent,
        inbox: Inbox,
        reporter: Reporter,
    ) -> None:
        self._site = site
        self._holder = claimed.holder
        model = Resolved.model_validate(claimed.resolved).model
        self._label, self._path = model.label, model.path
        self._spec = InferSpec.model_validate(claimed.spec)
        self._engine = engine
        self._store = store
        self._inbox = inbox
        self._reporter = reporter
        self._totals = store.call(row_totals, claimed.holder.job_id)
        self._errors = self._totals["errors"]
        self._limit = shards_in_flight(self._spec)
        self._page: deque[Shard] = deque()
        self._in_flight: set[int] = set()
        self._computed: set[int] = set()
        self._stopped = False

    def take(self, report: Report) -> None:
        match report:
            case ShardComputed():
                self._in_flight.discard(report.index)
                self._computed.add(report.index)
                self._errors += sum(result["error"] is not None for result in report.results)
                self._reporter.put(report)
                self._check_errors()
            case Progress():
                step = min(self._totals["done"] + report.step, self._totals["rows"])
                update = {"step": step, "total_steps": self._totals["rows"]}
                self._reporter.put(report.model_copy(update=update))
            case Ready():
                self._site.engine.holds(self._label, self._path, report.models)
                self._reporter.put(report)
            case _:
                self._reporter.put(report)

    def order_more(self) -> None:
        """Keep the engine fed; when every shard is committed, tell it to finish.

        Raises:
            GivenUp: Postgres did not answer, and the attempt is given up.
        """
        if self._stopped:
            return
        if not self._page and not self._in_flight and self._reporter.idle:
            self._turn_page()
        order: list[Shard] = []
        while self._page and len(self._in_flight) < self._limit and not self._reporter.full:
            order.append(self._page.popleft())
            self._in_flight.add(order[-1].index)
        if order:
            _send(
                self._engine,
                ComputeShards(attempt_id=self._holder.attempt_id, shards=tuple(order)),
            )

    def _turn_page(self) -> None:
        found = self._store.call(open_shards, self._holder)
        if found is None:
            self._inbox.end_with(Stale())
        elif not found:
            self._stopped = True
            _send(self._engine, Stop(reason="finished", attempt_id=self._holder.attempt_id))
        elif again := [shard.index for shard in found if shard.index in self._computed]:
            # Ordering it again would go on for ever.
            self._inbox.end_with(
                failed(
                    FailureClass.INFRASTRUCTURE,
                    "shard_not_committed",
                    f"the results of shard {again[0]} were not accepted by the store",
                )
            )
        else:
            self._page.extend(found)

    def _check_errors(self) -> None:
        allowed = self._spec.max_errors
        if allowed is not None and self._errors > allowed:
            self._inbox.end_with(
                failed(
                    FailureClass.DATA_ERROR,
                    "too_many_row_errors",
                    f"{self._errors} rows failed, and max_errors allows {allowed}",
                    "The results so far name each row's error.",
                )
            )


def is_infrastructure(end: Failed) -> bool:
    return end.failure.failure_class is FailureClass.INFRASTRUCTURE


def reason_for(end: Outcome) -> str:
    """Why an engine is told to stop, for its log."""
    return end.failure.code if isinstance(end, Failed) else type(end).__name__.lower()


def _stop(
    engine: RankProcess, attempt_id: str, reason: str, take: Callable[[Report], None]
) -> bool:
    """Have the engine drop the attempt; False when it does not obey in time."""
    _send(engine, Stop(reason=reason, attempt_id=attempt_id))
    deadline = time.monotonic() + STOP_PATIENCE
    while (left := deadline - time.monotonic()) > 0:
        try:
            report = engine.channel.receive(left)
        except (ChannelClosed, ProtocolError):
            return False
        if isinstance(report, ShardComputed) and report.attempt_id == attempt_id:
            take(report)
        elif isinstance(report, FailedReport) and report.attempt_id == attempt_id:
            return report.failure_class is not FailureClass.INFRASTRUCTURE
        elif isinstance(report, Done) and report.attempt_id == attempt_id:
            return True
    return False


def _send(engine: RankProcess, message: InferAssignment | ComputeShards | Stop) -> None:
    # An engine that is gone says so by its exit, which the watch sees next.
    with contextlib.suppress(ChannelClosed):
        engine.channel.send(message)
