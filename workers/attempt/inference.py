"""One rank of an inference attempt: open shards go to the device's warm engine, finished ones to the
store. An engine that dies is replaced, and the attempt goes on."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass

from shared.lifecycle import FailureClass
from shared.messages import Done, InferAssignment, Report, ShardComputed, Stop
from shared.messages import Failed as FailedReport
from shared.resolved import Resolved
from shared.specs import InferSpec
from shared.store.claim import Claimed
from workers.attempt.feed import ShardFeed
from workers.attempt.hang import HangWatch
from workers.attempt.inbox import Inbox
from workers.attempt.insist import Insistent
from workers.attempt.outcome import (
    Failed,
    Finished,
    OomWatch,
    Outcome,
    classify_exit,
    last_line,
)
from workers.attempt.reporter import Reporter
from workers.attempt.site import Site
from workers.attempt.watch import Watch
from workers.channel import ChannelClosed
from workers.engine_host import EngineUse
from workers.launch import Exit

STOP_PATIENCE = 5.0
"""Seconds an engine has to answer a stop. One that does not is ended, and its models are cold."""
BROKE = "engine_error"
"""The code of an engine that broke over what it computed and says so before it ends."""


@dataclass(frozen=True, slots=True)
class _Died:
    """The engine is gone."""

    end: Failed
    blames: bool
    """Whether what it computed may be why."""


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
    with site.engine.use(claimed.holder.attempt_id, inbox.ring) as engine:
        assignment = inference_assignment(site, claimed)
        feed = ShardFeed(site, claimed, assignment, engine, store, inbox, reporter)
        while True:
            end = _serve(site, claimed, engine, feed, inbox, reporter, deadline)
            if not isinstance(end, _Died):
                return end
            if (outcome := feed.bury(end.end, blames=end.blames)) is not None:
                return outcome
            engine.renew()


def _serve(
    site: Site,
    claimed: Claimed,
    engine: EngineUse,
    feed: ShardFeed,
    inbox: Inbox,
    reporter: Reporter,
    deadline: float | None,
) -> Outcome | _Died:
    """One engine, to its end or to that of its work."""
    attempt_id = claimed.holder.attempt_id
    oom = OomWatch()
    feed.begin()
    hang = HangWatch(site.settings.engine_hang, time.monotonic())
    watch = Watch(
        engine, attempt_id, inbox, reporter, deadline, feed.take, feed.order_more,
        hang, lambda: feed.expects,
    )  # fmt: skip
    end = watch.until_end()
    if watch.hung and isinstance(end, Failed):
        # For all who use it: as with any death, each of them may have the row that is to blame.
        engine.end(grace=0, on_purpose=False)
        return _Died(end, blames=True)
    if isinstance(end, Exit):
        rest = watch.read_rest()
        ended = engine.ended
        assert ended is not None  # noqa: S101 - it said so
        if isinstance(rest, Finished):
            return rest
        if isinstance(rest, Failed):
            return _Died(rest, blames=True) if _broke(rest, feed) else rest
        words = last_line(site.engine.log_path)
        died = classify_exit("the engine", end, out_of_memory=oom.struck(), last_words=words)
        return _Died(died, blames=not (end.lost or ended.on_purpose))
    if watch.said_so:
        # After a failure of this class the engine ends by itself: nothing in it can be trusted.
        if isinstance(end, Failed) and is_infrastructure(end):
            engine.end(grace=site.settings.end_grace)
            if _broke(end, feed):
                return _Died(end, blames=True)
    elif feed.begun:
        obeyed = _stop(engine, attempt_id, reason_for(end), feed.take)
        # One that works for others as well may be slow to answer. What it still says of this attempt
        # reaches nobody.
        if not obeyed and not engine.shared:
            engine.end(grace=0)
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
        adapter_path=resolved.model.adapter,
    )


def _broke(end: Failed, feed: ShardFeed) -> bool:
    return end.failure.code == BROKE and feed.in_flight


def is_infrastructure(end: Failed) -> bool:
    return end.failure.failure_class is FailureClass.INFRASTRUCTURE


def reason_for(end: Outcome) -> str:
    """Why an engine is told to stop, for its log."""
    return end.failure.code if isinstance(end, Failed) else type(end).__name__.lower()


def _stop(engine: EngineUse, attempt_id: str, reason: str, take: Callable[[Report], None]) -> bool:
    """Have the engine drop the attempt; False when it does not obey in time."""
    # An engine that is gone says so by its exit, which the watch sees next.
    with contextlib.suppress(ChannelClosed):
        engine.send(Stop(reason=reason, attempt_id=attempt_id))
    deadline = time.monotonic() + STOP_PATIENCE
    while (left := deadline - time.monotonic()) > 0:
        try:
            report = engine.channel.receive(left)
        except ChannelClosed:
            return False
        if isinstance(report, ShardComputed) and report.attempt_id == attempt_id:
            take(report)
        elif isinstance(report, FailedReport) and report.attempt_id == attempt_id:
            return report.failure_class is not FailureClass.INFRASTRUCTURE
        elif isinstance(report, Done) and report.attempt_id == attempt_id:
            return True
    return False
