"""What a running stack says about itself: ``instance.json`` in its data folder, for its user only."""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gpuyard.connection import INSTANCE_FILE
from gpuyard.local.processes import ProcessId


@dataclass(frozen=True, slots=True)
class Instance:
    """Where everything of a running stack is. ``parts`` are process ids by name."""

    url: str
    api_key: str = field(repr=False)
    api_key_file: str
    flower_url: str | None
    flower_user: str
    flower_password_file: str
    data: str
    pid: int
    started: int
    """Start time of the process ``pid``, see ``ProcessId``."""
    parts: dict[str, int]

    @property
    def alive(self) -> bool:
        return ProcessId(self.pid, self.started).alive()

    def write(self) -> None:
        """Put it in place whole, readable for its owner only: it carries the API key."""
        fd, fresh = tempfile.mkstemp(dir=self.data)  # mode 0600
        with os.fdopen(fd, "w") as out:
            json.dump(asdict(self), out, indent=2)
        Path(fresh).replace(Path(self.data) / INSTANCE_FILE)


def read_instance(data: Path) -> Instance | None:
    """What the stack on ``data`` wrote; None without one, or if it does not run any more."""
    try:
        found: dict[str, Any] = json.loads((data / INSTANCE_FILE).read_text())
        instance = Instance(**found)
    except (OSError, ValueError, TypeError):
        return None
    return instance if instance.alive else None
