"""How the ranks of an attempt find one another and agree: a TCPStore, then gloo or NCCL.

Rank 0 opens the store before anything else and reports its port; the worker tells every rank the
address once all of them are claimed. A gang of one opens nothing.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import struct
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from shared.lifecycle import FailureClass
from shared.messages import JoinRendezvous, Listening, TrainAssignment
from workers.ranks.train.device import Compute
from workers.ranks.train.failures import TrainingFailed
from workers.ranks.train.health.pulse import Pulse
from workers.ranks.train.reports import Reporter

HOST_VARIABLE = "GPUYARD_RANK_HOST"
"""The address of this host that the gang's other hosts reach; rank 0 listens on it alone."""
TIMEOUT_VARIABLE = "GPUYARD_RENDEZVOUS_SECONDS"
_COLLECTIVE_TIMEOUT = timedelta(minutes=30)
_POLL_SECONDS = 0.05
_SIOCGIFADDR = 0x8915
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Gang:
    """A rank among the others. All ranks make the same calls in the same order."""

    rank: int
    world_size: int
    device: torch.device
    store: Store | None = None
    pulse: Pulse = field(default_factory=Pulse, compare=False)
    """What this rank is doing: it notes here when it waits for others."""
    sharded: bool = False
    """Whether each rank has a part of the model only, so that every call of it is one of all ranks."""

    def sum(self, values: Sequence[float]) -> list[float]:
        """Add up values of all ranks; all get the same sums, in float64."""
        if self.store is None:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        with self.pulse.waiting():
            dist.all_reduce(tensor)
            return [float(value) for value in tensor.tolist()]

    def gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """The tensors of all ranks, in their order, on every rank. Their lengths may differ."""
        if self.store is None:
            return [tensor]
        own = [len(tensor) * (rank == self.rank) for rank in range(self.world_size)]
        lengths = [int(length) for length in self.sum(own)]
        padded = tensor.new_zeros(max(lengths), *tensor.shape[1:])
        padded[: len(tensor)] = tensor
        parts = [torch.empty_like(padded) for _ in lengths]
        with self.pulse.waiting():
            dist.all_gather(parts, padded)
        return [part[:length] for part, length in zip(parts, lengths, strict=True)]

    def deal(self, items: Sequence[T]) -> list[tuple[T, bool]]:
        """This rank's share of what is to be put through the model, dealt out like cards, and whether
        each counts. Ranks with a sharded model call it equally often: a rank that has less computes
        the first item for nothing."""
        own = [(item, True) for item in items[self.rank :: self.world_size]]
        if self.sharded and len(own) * self.world_size < len(items):
            own.append((items[0], False))
        return own

    def share(self, key: str, value: Any) -> Any:
        """Rank 0's ``value`` (what JSON can hold), on every rank. Each key once in a gang's life."""
        if self.store is None:
            return value
        if self.rank == 0:
            self.store.set(key, json.dumps(value))
            return value
        with self.pulse.waiting():
            return json.loads(self.store.get(key))

    def wait_for(self, key: str, meanwhile: Callable[[], object]) -> None:
        """Until rank 0 has shared ``key``, however long that takes; ``meanwhile`` is called again and
        again, and waits a little. A rank 0 that is gone ends it with an error, as its store is."""
        while self.store is not None and not self.store.check([key]):
            meanwhile()

    def tell(self, key: str, value: Any) -> None:
        """Leave ``value`` (what JSON can hold) for a rank that asks for it with ``hear``. Unlike all
        else here it may be called on any thread: the store takes one call at a time."""
        assert self.store is not None  # noqa: S101  a gang of one has nobody to tell
        self.store.set(key, json.dumps(value))

    def hear(self, key: str) -> Any | None:
        """What was told under ``key``, once; None until then. May be called on any thread."""
        if self.store is None or not self.store.check([key]):
            return None
        value = json.loads(self.store.get(key))
        self.store.delete_key(key)
        return value

    def spread(self, tensors: Iterable[torch.Tensor]) -> None:
        """Overwrite the tensors of every rank with those of rank 0, wherever they lie: an optimizer
        may count its steps on the host, which NCCL does not reach."""
        if self.store is not None:
            for tensor in tensors:
                moved = tensor.to(self.device)
                with self.pulse.waiting():
                    dist.broadcast(moved, src=0)
                if moved is not tensor:
                    tensor.copy_(moved)

    def leave(self) -> None:
        """End the process group after a success. After a failure the process just exits: a
        backend that lost a peer may wait for it for ever.

        A group of gloo is left to the end of the process as well. Its destructor waits for gloo's
        thread and holds the interpreter's lock meanwhile, which that thread may be waiting for to
        let go of its last work: in one of some twenty trainings both would wait for ever.
        """
        if self.store is not None and dist.get_backend() == "nccl":
            dist.destroy_process_group()


def join(assignment: TrainAssignment, compute: Compute, reporter: Reporter) -> Gang:
    """Meet the other ranks.

    Raises:
        TrainingFailed: the order to join, or another rank, did not come in time (infrastructure).
        Stopped: the worker ordered it, or is gone.
    """
    rank, world_size = assignment.rank, assignment.world_size
    if world_size == 1:
        return Gang(rank, world_size, compute.device)
    host = os.environ.get(HOST_VARIABLE, "127.0.0.1")
    seconds = float(os.environ.get(TIMEOUT_VARIABLE, "120"))
    _use_interface_of(host)
    store: Store | None = None
    if rank == 0:
        store, port = _open_store(host, world_size, seconds)
        reporter.send(Listening(port=port))
    address = _wait_for_address(reporter, seconds)
    if store is None:
        store = _reach_store(address, world_size, seconds)
    _wait_for_all(store, rank, world_size, seconds, reporter)
    # From here on a rank may wait for another's work: rank 0 verifies a checkpoint of many GB.
    store.set_timeout(_COLLECTIVE_TIMEOUT)
    dist.init_process_group(
        compute.backend,
        store=PrefixStore("group", store),
        rank=rank,
        world_size=world_size,
        timeout=_COLLECTIVE_TIMEOUT,
        device_id=compute.device if compute.device.type == "cuda" else None,
    )
    return Gang(
        rank,
        world_size,
        compute.device,
        PrefixStore("gang", store),
        sharded=assignment.parallelism == "fsdp",
    )


def _open_store(host: str, world_size: int, seconds: float) -> tuple[Store, int]:
    # TCPStore itself would listen on every interface: it gets a socket that is bound already.
    listener = socket.create_server((host, 0))
    port: int = listener.getsockname()[1]
    store = TCPStore(
        host,
        port,
        world_size,
        is_master=True,
        timeout=timedelta(seconds=seconds),
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )
    return store, port


def _wait_for_address(reporter: Reporter, seconds: float) -> str:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        order = reporter.check_orders(wait=min(1.0, seconds))
        if isinstance(order, JoinRendezvous):
            return order.address
    raise TrainingFailed(
        FailureClass.INFRASTRUCTURE,
        "rendezvous_timeout",
        f"the gang was not complete within {seconds:.0f} s: no order to join came",
    )


def _reach_store(address: str, world_size: int, seconds: float) -> Store:
    host, _, port = address.rpartition(":")
    try:
        store: Store = TCPStore(
            host.strip("[]"),
            int(port),
            world_size,
            is_master=False,
            timeout=timedelta(seconds=seconds),
            wait_for_workers=False,
        )
    except (dist.DistError, RuntimeError, ValueError) as error:
        raise TrainingFailed(
            FailureClass.INFRASTRUCTURE,
            "rendezvous_unreachable",
            f"rank 0 cannot be reached at {address}",
            f"Hosts of one gang must reach each other: set {HOST_VARIABLE} to an address of the "
            "host that the others see, and open the ports between them.",
        ) from error
    return store


def _wait_for_all(
    store: Store, rank: int, world_size: int, seconds: float, reporter: Reporter
) -> None:
    """Until every rank has said that it is here. Polled, so that an order to stop is heard."""
    store.set(f"here/{rank}", "1")
    missing = list(range(world_size))
    deadline = time.monotonic() + seconds
    while missing := [other for other in missing if not store.check([f"here/{other}"])]:
        if time.monotonic() > deadline:
            raise TrainingFailed(
                FailureClass.INFRASTRUCTURE,
                "rendezvous_timeout",
                f"rank(s) {', '.join(map(str, missing))} of {world_size} did not come to the "
                f"rendezvous within {seconds:.0f} s",
            )
        reporter.check_orders(wait=_POLL_SECONDS)


def _use_interface_of(host: str) -> None:
    """Make gloo and NCCL talk over the interface that has ``host``: left alone, gloo takes what the
    host's own name resolves to, which on Debian is a loopback address."""
    name = _interface_of(host)
    if name is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", name)


def _interface_of(host: str) -> str | None:
    try:
        wanted = socket.gethostbyname(host)
    except OSError:
        return None
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            try:
                answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)
            except OSError:
                continue
            if socket.inet_ntoa(answer[20:24]) == wanted:
                return name
    return None
