"""Where the service is and with which key: arguments, then the environment, then a local stack."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from shared.errors import ConfigurationError

URL, API_KEY, DATA = "GPUYARD_URL", "GPUYARD_API_KEY", "GPUYARD_DATA"
INSTANCE_FILE = "instance.json"


@dataclass(frozen=True, slots=True)
class Connection:
    """``origin`` says in words where the address came from, for error messages."""

    url: str
    api_key: str | None = field(repr=False)
    origin: str


def find_connection(url: str | None = None, api_key: str | None = None) -> Connection:
    """The service to talk to.

    ``instance.json`` is what a running ``gpuyard up`` leaves in its data folder (``GPUYARD_DATA``).
    Its key is used for its own address only, never sent to another.

    Raises:
        ConfigurationError: no service is named and no local stack runs, or the address is no URL.
    """
    named = url or os.environ.get(URL)
    key = api_key or os.environ.get(API_KEY) or None
    if named:
        return Connection(_checked(named), key, "the argument" if url else URL)
    path = instance_path()
    instance = _read_instance(path)
    if instance is None:
        raise ConfigurationError(
            "no gpuyard service is named, and no local one runs on this machine",
            param=URL,
            hint=f"Start one with `gpuyard up`, or set {URL} and {API_KEY} (looked for {path}).",
        )
    return Connection(_checked(str(instance["url"])), key or instance.get("api_key"), str(path))


def instance_path() -> Path:
    """Where a local stack on the default data folder describes itself."""
    return data_folder() / INSTANCE_FILE


def data_folder() -> Path:
    """Of the local stack: ``GPUYARD_DATA``, else the default."""
    named = os.environ.get(DATA)
    return Path(named).expanduser().resolve() if named else default_data_folder()


def default_data_folder() -> Path:
    """``gpuyard`` in the user's data folder of the system."""
    base = os.environ.get("XDG_DATA_HOME") or "~/.local/share"
    return (Path(base).expanduser() / "gpuyard").resolve()


def _read_instance(path: Path) -> dict[str, Any] | None:
    try:
        instance = json.loads(path.read_text())
    except (OSError, ValueError):
        return None  # no stack runs, or it is just writing the file
    if not isinstance(instance, dict) or not instance.get("url"):
        return None
    # One that was killed could not remove its file.
    alive = not Path("/proc/self").exists() or Path(f"/proc/{instance.get('pid')}").exists()
    return instance if alive else None


def _checked(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise ConfigurationError(
            f"{url!r} is not the address of a service",
            param=URL,
            hint="An address looks like http://127.0.0.1:8080.",
        )
    return url.rstrip("/")
