"""What Flower shows, read from its API behind the login."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx

from tests.e2e.stack_process import StackProcess


def flower(stack: StackProcess) -> httpx.Client:
    instance = stack.instance
    password = Path(str(instance["flower_password_file"])).read_text().strip()
    return httpx.Client(
        base_url=str(instance["flower_url"]),
        auth=(str(instance["flower_user"]), password),
        timeout=20,
    )


def flower_tasks(stack: StackProcess) -> dict[str, dict[str, Any]]:
    """Tasks by id."""
    with flower(stack) as client:
        answer = client.get("/api/tasks", params={"limit": 5000})
        answer.raise_for_status()
        return dict(answer.json())
