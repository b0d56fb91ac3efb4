"""Server-sent events, as https://html.spec.whatwg.org/multipage/server-sent-events.html parses them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Message:
    """One message. ``id`` is the last id the stream has named, also if this message named none."""

    event: str
    data: str
    id: str | None = None


def parse(lines: Iterable[str]) -> Iterator[Message]:
    """Messages out of lines (without their ends).

    A message that was cut off, with no blank line after it, is none: it comes again on resumption.
    """
    event, data, last_id = "", list[str](), None
    for line in lines:
        if not line:
            if data:
                yield Message(event or "message", "\n".join(data), last_id)
            event, data = "", []
            continue
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "event":
            event = value
        elif name == "data":
            data.append(value)
        elif name == "id" and "\0" not in value:
            last_id = value
        # Everything else is a comment (keep-alive) or a field for browsers.
