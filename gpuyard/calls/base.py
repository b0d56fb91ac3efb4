"""What all calls need: the transport, and pages of a list."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar

from gpuyard.transport import Transport
from shared.views import Page, View

V = TypeVar("V", bound=View)
PAGE = 200


class Calls:
    """The transport is the client's."""

    _transport: Transport

    def _pages(self, path: str, item: type[V], **params: Any) -> Iterator[V]:
        cursor: str | None = None
        while True:
            page = self._transport.get(path, Page[item], limit=PAGE, cursor=cursor, **params)  # type: ignore[valid-type]
            yield from page.items
            cursor = page.next
            if cursor is None:
                return
