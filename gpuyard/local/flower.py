"""Flower with a login: ``python -m gpuyard.local.flower --address HOST --port PORT``.

Reads ``GPUYARD_FLOWER_USER``, ``GPUYARD_FLOWER_PASSWORD`` and, where its state is kept,
``GPUYARD_FLOWER_DB`` (by default ``flower/state`` in the data folder), beside the service's settings.
Flower's ``/metrics`` and ``/healthcheck`` ask for no login.
"""

from __future__ import annotations

import argparse
import dbm
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from shared.errors import ConfigurationError, GpuyardError
from shared.settings import load_settings


def main(argv: Sequence[str] | None = None) -> int:
    """Become Flower; returns (an exit code) only if that is not possible."""
    parser = argparse.ArgumentParser("gpuyard flower", description=__doc__)
    parser.add_argument("--address", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=5555)
    options = parser.parse_args(argv)
    try:
        run(options.address, options.port)
    except GpuyardError as error:
        print(f"error: {error}\n{error.hint or ''}".rstrip(), file=sys.stderr)
        return error.exit_code
    return 0


def run(address: str = "127.0.0.1", port: int = 5555) -> None:
    """Replace this process by Flower.

    Raises:
        ConfigurationError: a setting is missing; above all, there is no password.
    """
    settings = load_settings()
    user = os.environ.get("GPUYARD_FLOWER_USER") or "gpuyard"
    if not os.environ.get("GPUYARD_FLOWER_PASSWORD"):
        raise ConfigurationError(
            "GPUYARD_FLOWER_PASSWORD is not set, and who can use Flower can stop jobs",
            param="GPUYARD_FLOWER_PASSWORD",
            hint="Set it to a password of your choice.",
        )
    state = Path(os.environ.get("GPUYARD_FLOWER_DB") or settings.data / "flower" / "state")
    state.parent.mkdir(parents=True, exist_ok=True)
    put_damaged_state_aside(state)
    environment = {
        **os.environ,
        "CELERY_CONFIG_MODULE": "gpuyard.local.celeryconfig",
        "GPUYARD_FLOWER_USER": user,
        "GPUYARD_FLOWER_DB": str(state.absolute()),
    }
    configuration = Path(__file__).with_name("flowerconfig.py")
    command = [sys.executable, "-m", "celery", "flower", f"--conf={configuration}"]
    command += [f"--address={address}", f"--port={port}"]
    os.execve(sys.executable, command, environment)  # noqa: S606 - to be that process


def put_damaged_state_aside(state: Path) -> None:
    """Rename state that cannot be read. Flower killed while it saves may leave such a file, and
    would then not start ever again; its state is only a view, the truth is in Postgres."""
    files = [path for path in state.parent.glob(f"{state.name}*") if ".damaged-" not in path.name]
    if not files:
        return
    try:
        with dbm.open(str(state), "r") as found:
            for key in found.keys():  # noqa: SIM118 - not a dictionary
                found[key]
    except Exception as error:  # the libraries behind dbm raise whatever they like
        for path in files:
            path.rename(path.with_name(f"{path.name}.damaged-{int(time.time())}"))
        print(f"Flower's state was damaged and is put aside: {error}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
