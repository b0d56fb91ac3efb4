"""The Celery worker process of one device. The only module of the workers that imports Celery.

``python -m workers.serve --device JSON --nursery SOCKET --folder DIR``, started by the host
manager. Celery delivers hints and shows what goes on; what counts is in Postgres. A pool of threads,
supervised by our own code, so that pings, revokes and heartbeats work while a job runs: one is busy with
a training, several are with batch jobs that share the device.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import threading
import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from types import MethodType
from typing import Any

from celery import Celery, bootsteps
from celery.apps.worker import Worker
from celery.exceptions import Ignore
from celery.platforms import SecurityWarning
from celery.signals import worker_ready
from celery.worker import state as worker_state
from celery.worker.consumer import Consumer
from celery.worker.control import Panel, control_command, inspect_command
from celery.worker.request import Request
from kombu.common import ignore_errors
from pydantic import ValidationError

from shared.broker import celery_config
from shared.capability import SEATS, device_queue
from shared.errors import GpuyardError
from shared.messages import RUN_TASK, Hint
from shared.settings import load_settings
from shared.store.claim import Refusal
from workers import console
from workers.attempt.insist import GivenUp
from workers.attempt.outcome import Cancelled, Finished
from workers.attempt.run import say
from workers.inventory import LocalDevice
from workers.service import DeviceService
from workers.tree import die_with_parent

log = logging.getLogger(__name__)

_celery_revoke = Panel.data["revoke"]


class AttemptFailed(Exception):
    """An attempt ended without success. What Flower shows; the story is in the store."""


def main(argv: Sequence[str] | None = None) -> int:
    """Serve one device until told to end; the exit code."""
    options = _parse(argv)
    device = LocalDevice.from_json(options.device)
    console.configure(device.id)
    # Celery warns of root for the sake of pickled messages; here all messages are JSON.
    warnings.simplefilter("ignore", SecurityWarning)
    if options.parent is not None:
        die_with_parent(options.parent, signal.SIGTERM)
    try:
        settings = load_settings()
    except GpuyardError as error:
        log.error("%s. %s", error, error.hint or "")
        return error.exit_code
    service = DeviceService(settings, device, options.nursery, options.folder, version("gpuyard"))
    service.prepare()
    app = make_app(service)
    worker = DeviceWorker(
        app=app,
        hostname=device.id,
        pool="threads",
        concurrency=SEATS,
        consumer_cls=DeviceConsumer,
        # That of the device itself is heard apart: see DeviceConsumer.
        queues=[device.facts.capability.queue],
        loglevel="INFO",
        # What they exchange between workers is in Postgres.
        without_gossip=True,
        without_mingle=True,
        quiet=True,
    )
    worker.start()
    return int(worker.exitcode or 0)


def make_app(service: DeviceService) -> Any:
    """The Celery app with its one task, for one device."""
    app = Celery("gpuyard.workers", config_source=celery_config(service.settings))
    app.device_service = service
    app.live_consumer = None
    app.steps["consumer"].add(DeviceStep)

    @app.task(  # type: ignore[untyped-decorator]
        name=RUN_TASK, bind=True, Request=HintRequest, throws=(AttemptFailed,)
    )
    def run(task: Any, **fields: Any) -> str:
        return run_hint(service, worker_state.requests[task.request.id], fields)

    def register(**_: Any) -> None:
        # Celery calls this before it takes the first message.
        service.register()

    worker_ready.connect(register, weak=False)
    service.on_replaced = lambda: begin_drain(app, hurry=True)
    return app


def run_hint(service: DeviceService, request: HintRequest, fields: dict[str, Any]) -> str:
    """The body of the task: every way in which a hint can end, as Celery has to be told of it.

    Raises:
        Ignore: nothing to say, or it was said: a repeated hint must not change what Flower shows of
            the run that it is a repeat of.
        AttemptFailed: the attempt ended without success.
    """
    try:
        hint = Hint.model_validate(fields)
    except ValidationError as error:
        log.error("no hint: %s", error.errors(include_url=False)[0])
        raise Ignore from None
    try:
        result = service.run_hint(hint, request.announce_start)
    except GivenUp:
        raise Ignore from None
    if result in (Refusal.CANCELLED, Refusal.STALE) or isinstance(result, Cancelled):
        request.announce_revoked()
        raise Ignore
    if isinstance(result, Refusal):
        raise Ignore
    if not isinstance(result, Finished):
        raise AttemptFailed(say(result))
    return f"{hint.job_id}: {say(result)}"


class HintRequest(Request):  # type: ignore[misc]  # Celery has no types
    """A hint as Celery sees it: started once it is claimed, and failed without a traceback of ours."""

    claimed = False

    def announce_start(self) -> None:
        self.claimed = True
        self.send_event("task-started")

    def announce_revoked(self) -> None:
        self.send_event("task-revoked", terminated=True, signum="SIGTERM", expired=False)

    def send_event(self, type: str, **fields: Any) -> None:
        """Through the dispatcher of now: the one of this request's start is closed after a
        reconnect, and what is sent through it is lost."""
        if type == "task-started" and not self.claimed:
            return
        if type == "task-failed":
            fields["traceback"] = ""
        consumer = self._app.live_consumer
        dispatcher = consumer.event_dispatcher if consumer is not None else None
        if dispatcher is not None and dispatcher.enabled:
            dispatcher.send(type, uuid=self.id, **fields)


class DeviceConsumer(Consumer):  # type: ignore[misc]  # Celery has no types
    """Hears two queues in two ways: that of the device's class while it is idle, and that of the device
    itself, which names batch jobs that are to share it, also while it is at work. Each has a channel of its
    own, as Kombu waits for all queues of a channel at once or for none."""

    own: Any = None
    """Of the device's queue."""

    def open_own(self) -> None:
        """The consumer of tasks is there, on a new connection."""
        service: DeviceService = self.app.device_service
        queue = self.app.amqp.queues.new_missing(device_queue(service.device.id))
        channel = self.connection.channel()
        self.own = self.app.amqp.TaskConsumer(
            channel, queues=[queue], on_decode_error=self.on_decode_error
        )
        self.own.on_message = self.create_task_handler()
        _consume_while(channel, lambda: len(worker_state.reserved_requests) < SEATS)
        _consume_while(
            self.task_consumer.channel,
            lambda: not service.busy and not worker_state.reserved_requests,
        )
        self.own.consume()

    def close_own(self) -> None:
        own, self.own = self.own, None
        if own is not None:
            ignore_errors(self, own.cancel)  # type: ignore[no-untyped-call]

    def cancel_task_queue(self, queue: str) -> None:
        """What ``cancel_consumer`` does."""
        if self.own is not None and queue == device_queue(self.app.device_service.device.id):
            self.own.cancel_by_queue(queue)
        else:
            super().cancel_task_queue(queue)

    def cancel_all_queues(self) -> None:
        """Take nothing new. In the thread of the event loop."""
        for name in list(self.app.amqp.queues.consume_from):
            self.cancel_task_queue(name)
        self.close_own()


class DeviceStep(bootsteps.StartStopStep):  # type: ignore[misc]  # Celery has no types
    """Opens the consumer of the device's queue, shows the device in the worker's stats, and gives the
    requests the live consumer."""

    requires = ("celery.worker.consumer.tasks:Tasks",)

    def start(self, consumer: DeviceConsumer) -> None:
        consumer.app.live_consumer = consumer
        consumer.open_own()

    def stop(self, consumer: DeviceConsumer) -> None:
        consumer.close_own()

    def shutdown(self, consumer: DeviceConsumer) -> None:
        consumer.close_own()

    def info(self, consumer: Any) -> dict[str, Any]:
        return {"device": consumer.app.device_service.describe()}


def _consume_while(channel: Any, allowed: Callable[[], bool]) -> None:
    """Take messages of this channel only while it is allowed: in the way in which Celery's own
    ``worker_disable_prefetch`` does it, which knows one limit for all queues."""
    original = type(channel.qos).can_consume
    channel.qos.can_consume = MethodType(lambda qos: allowed() and original(qos), channel.qos)


class DeviceWorker(Worker):  # type: ignore[misc]  # Celery has no types
    """Drains on SIGTERM and SIGINT by our rules: Celery's warm shutdown is deaf for as long as the
    job lasts, and its cold one leaves the job's processes."""

    def install_platform_tweaks(self, worker: Any) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: begin_drain(worker.app, hurry=False))


# Reentrant: the handler of one signal may interrupt that of another.
_drain_lock = threading.RLock()
_drain_began = False


def begin_drain(app: Any, *, hurry: bool) -> None:
    """End this process in good order. Asked for a second time, or with ``hurry``: sooner."""
    global _drain_began
    with _drain_lock:
        first, _drain_began = not _drain_began, True
    if hurry or not first:
        app.device_service.hurry()
    if first:
        threading.Thread(target=_drain, args=(app,), name="drain").start()


def _drain(app: Any) -> None:
    log.info("draining")
    consumer = app.live_consumer
    if consumer is not None:
        # In the thread of the event loop. Hints that others can take are left to them.
        consumer.call_soon(consumer.cancel_all_queues)
    try:
        app.device_service.drain()
    finally:
        worker_state.should_stop = os.EX_OK


@control_command(  # type: ignore[untyped-decorator]
    name="revoke",
    variadic="task_id",
    signature="[id1 [id2 [... [idN]]]]",
)
def revoke(state: Any, task_id: Any, **kwargs: Any) -> Any:  # noqa: ARG001 - the signature of commands
    """Cancel the jobs of these tasks."""
    ids = [task_id] if isinstance(task_id, str) else list(task_id or [])
    state.app.device_service.cancel_tasks(ids)
    # Celery only notes the ids, and drops hints that still wait. Terminating is for the attempt's
    # own thread, which ends the whole process tree.
    return _celery_revoke(state, ids, terminate=False)


@inspect_command(name="active_queues")  # type: ignore[untyped-decorator]
def active_queues(state: Any) -> list[dict[str, Any]]:
    """The queues that are heard, that of the device among them."""
    consumers = (state.consumer.task_consumer, state.consumer.own)
    return [
        dict(queue.as_dict(recurse=True)) for each in consumers if each for queue in each.queues
    ]


@control_command(name="shutdown")  # type: ignore[untyped-decorator]
def shutdown(state: Any, **kwargs: Any) -> Any:  # noqa: ARG001 - the signature of commands
    """Drain and end; the host manager starts a fresh process."""
    begin_drain(state.app, hurry=False)
    return {"ok": "draining"}


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("workers.serve", description=__doc__)
    parser.add_argument("--device", required=True, help="the device's facts, as JSON")
    parser.add_argument("--nursery", type=Path, required=True, help="socket of the nursery")
    parser.add_argument("--folder", type=Path, required=True, help="for the engine's log")
    parser.add_argument("--parent", type=int, help="drain when this process, the parent, ends")
    return parser.parse_args(argv)
