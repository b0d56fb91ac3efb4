"""Query parameters that a route does not have are refused: `?stat=failed` would list everything."""

from __future__ import annotations

import difflib
from collections.abc import Iterator

from fastapi import Request
from fastapi.dependencies.models import Dependant
from fastapi.routing import APIRoute

from shared.errors import InvalidRequest


def refuse_unknown(request: Request) -> None:
    """Compare with what the route declares, its dependencies included.

    Raises:
        InvalidRequest: names the parameter, those that there are, and which may be meant.
    """
    route = request.scope["route"]
    if not isinstance(route, APIRoute):
        return
    known = sorted(set(_declared(route.dependant)))
    for name in request.query_params:
        if name not in known:
            raise InvalidRequest(
                f"{request.method} {request.url.path} has no query parameter {name!r}",
                param=name,
                hint=_hint(name, known),
            )


def _declared(dependant: Dependant) -> Iterator[str]:
    yield from (param.alias for param in dependant.query_params)
    for inner in dependant.dependencies:
        yield from _declared(inner)


def _hint(name: str, known: list[str]) -> str:
    if not known:
        return "It has none."
    near = difflib.get_close_matches(name, known, n=1)
    meant = f"Did you mean {near[0]!r}? " if near else ""
    return f"{meant}It has {', '.join(known)}."
