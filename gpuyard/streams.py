"""Streams that outlive their connection: they go on exactly where it broke."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any, Literal, TypeVar

import httpx

from gpuyard import sse
from gpuyard.transport import Transport
from shared.errors import Unavailable
from shared.lifecycle import JobState
from shared.views import EventView, LogView

Order = Literal["input", "completion"]
Item = TypeVar("Item", EventView, LogView)


def follow(
    transport: Transport, path: str, view: type[Item], after: int, params: dict[str, Any]
) -> Iterator[Item]:
    """Items with an id above ``after``, until the service says that there will be no more.

    Raises:
        Unavailable: nothing arrived for as long as the transport is patient.
    """
    pauses = transport.pauses()
    while True:
        # `after` and not the header alone: proxies drop headers that they do not know.
        headers = {"Accept": "text/event-stream", "Last-Event-ID": str(after)}
        try:
            with transport.stream(
                path, params={**params, "follow": "true", "after": after}, headers=headers
            ) as answer:
                for message in sse.parse(answer.iter_lines()):
                    if message.event == "end":
                        return
                    if message.id is None or message.event not in ("event", "log"):
                        continue
                    item = view.model_validate_json(message.data)
                    if item.id > after:
                        pauses.reset()
                        after = item.id
                        yield item
            # It ended without its `end`: the service is going down, or a proxy cut it.
            broken = Unavailable(f"the stream {path} ended early")
        except Unavailable as error:
            broken = error
        pauses.after(broken)


def follow_results(
    transport: Transport, job_id: str, follow: bool, order: Order
) -> Iterator[dict[str, Any]]:
    """Result rows in either order, each once.

    A stream that ends properly may still be short, since a service that stops ends its streams. So
    the rows are counted: there have to be as many as were committed when the first answer began
    or, with ``follow``, when an answer began after the job was over. A broken stream goes on, in input
    order, behind the last row; as the order of completion never changes, there the count is the place.

    Raises:
        Unavailable: nothing arrived for as long as the transport is patient.
    """
    pauses = transport.pauses()
    path = f"/v1/jobs/{job_id}/results"
    last, count, promised = -1, 0, None
    while True:
        place = {"after_row": last} if order == "input" else {"order": order, "skip": count}
        try:
            with transport.stream(path, params={**place, "follow": str(follow).lower()}) as answer:
                over = JobState(answer.headers["X-Job-State"]).terminal
                if promised is None or follow:
                    promised = int(answer.headers["X-Rows-Done"])
                for line in whole_lines(answer):
                    row = json.loads(line)
                    if order == "input" and row["row"] <= last:
                        continue
                    pauses.reset()
                    last, count = row["row"], count + 1
                    yield row
            if count >= promised and (over or not follow):
                return
            broken = Unavailable(f"the results of {job_id} broke off after {count} rows")
            if not over:
                # The job ended, or the service restarts, and the next answer says which. A healthy
                # stream that ends costs no patience.
                pauses.reset()
        except Unavailable as error:
            broken = error
        pauses.after(broken)


def whole_lines(answer: httpx.Response) -> Iterator[bytes]:
    """Lines that arrived with their end; what was cut off is left out and fetched again."""
    rest: list[bytes] = []
    for piece in answer.iter_bytes():
        head, newline, tail = piece.rpartition(b"\n")
        if not newline:
            rest.append(piece)
            continue
        yield from _split(b"".join([*rest, head]))
        rest = [tail] if tail else []


def _split(block: bytes) -> Iterable[bytes]:
    return (line for line in block.split(b"\n") if line.strip())
