"""``python -m workers``: serve the devices of this host. The same as ``gpuyard worker``."""

from __future__ import annotations

import argparse
import os
import re
import socket
import sys
from collections.abc import Sequence

from shared.errors import ConfigurationError, GpuyardError
from shared.settings import load_settings
from workers import console
from workers.host import HostManager
from workers.inventory import take_stock

_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,62}[A-Za-z0-9])?")


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM; the exit code."""
    options = _parse(argv)
    console.configure("worker")
    # Ranks share the processors by the threads that each is told to use. Libraries that size their
    # pools when they load would otherwise take all of them in every process.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    try:
        settings = load_settings()
        host = _host_name(options.name)
        devices = take_stock(host, options.devices, options.simulate)
        return HostManager(settings, host, devices, options.nursery_option).run()
    except GpuyardError as error:
        print(f"error: {error}", file=sys.stderr)
        if error.hint:
            print(error.hint, file=sys.stderr)
        return error.exit_code


def _host_name(given: str | None) -> str:
    name = given or socket.gethostname().partition(".")[0]
    if not _NAME.fullmatch(name):
        raise ConfigurationError(
            f"'{name}' is no name for a host",
            param="name",
            hint="Give one with --name: letters, digits, '.', '_' and '-'.",
        )
    return name


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("gpuyard worker", description="Serve this host's devices.")
    parser.add_argument(
        "--devices",
        default=os.environ.get("GPUYARD_DEVICES", "auto"),
        help="auto (GPUs, else CPU slots), gpu:all, gpu:N, cpu:N, or parts with commas",
    )
    parser.add_argument(
        "--simulate",
        default=os.environ.get("GPUYARD_SIMULATE") or None,
        help="devices to register and not to have, such as 2xA100-80GB,1xT4-16GB",
    )
    parser.add_argument("--name", default=os.environ.get("GPUYARD_HOST"), help="name of this host")
    parser.add_argument(
        "--nursery-option",
        action="append",
        default=[],
        metavar="OPTION",
        help="passed on to the nursery (see python -m workers.ranks.nursery --help)",
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
