"""Where attempts run: what one device's worker process has at hand for each of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from shared.settings import Settings
from shared.store import Store
from workers.engine_host import WarmEngine
from workers.inventory import LocalDevice


@dataclass(frozen=True, slots=True)
class Site:
    settings: Settings
    store: Store
    device: LocalDevice
    worker_id: str
    """This life of the worker process, as registered."""
    nursery: Path
    """The socket of the host's nursery."""
    engine: WarmEngine
