"""What the routes share: settings, the store, the keys, the wake-ups."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request

from scheduler.api.keys import KeyCache
from scheduler.api.wakeups import Wakeups
from shared.settings import Settings
from shared.store import Store


@dataclass(frozen=True, slots=True)
class Context:
    settings: Settings
    store: Store
    keys: KeyCache
    wakeups: Wakeups


def get_context(request: Request) -> Context:
    context: Context = request.app.state.context
    return context


ContextDep = Annotated[Context, Depends(get_context)]
