"""Where the ranks of a gang meet: the address of this host for its fellows."""

from __future__ import annotations

import socket
from urllib.parse import urlsplit

from shared.settings import Settings
from shared.store.claim import Claimed
from shared.store.read import list_leases
from workers.attempt.insist import Insistent

LOOPBACK = "127.0.0.1"
HOST_VARIABLE = "GPUYARD_RANK_HOST"
"""Tells a rank on which address to listen and over which interface to talk."""


def rank_host(settings: Settings, store: Insistent, claimed: Claimed) -> str:
    """Loopback when the whole gang is on this host; else the address that other hosts see.

    Raises:
        GivenUp: Postgres did not answer, and the attempt is given up.
    """
    if claimed.world_size == 1:
        return LOOPBACK
    leases = store.call(list_leases, [claimed.holder.attempt_id])
    hosts = {lease.device_id.partition("@")[2] for lease in leases}
    if len(hosts) == 1:
        return LOOPBACK
    return settings.rank_host or own_address(settings)


def own_address(settings: Settings) -> str:
    """The address from which this host reaches the broker; its name, if the broker runs here."""
    broker = urlsplit(settings.broker_url).hostname or LOOPBACK
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((broker, 9))  # connecting a datagram socket sends nothing
            address = str(probe.getsockname()[0])
        except OSError:
            address = LOOPBACK
    return socket.gethostname() if address.startswith("127.") else address
