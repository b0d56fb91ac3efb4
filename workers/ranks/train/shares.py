"""How a checkpoint is divided among the ranks: who writes, who writes what, and the copy it is written
from."""

from __future__ import annotations

import os
import secrets
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import torch

from workers.ranks.train.device import Compute
from workers.ranks.train.gang import Gang

_ALIGNMENT = 64


def find_writers(folder: Path, gang: Gang) -> tuple[int, ...]:
    """The ranks that can write into rank 0's ``folder``, in order, and rank 0 always. All ranks call
    it together, once.

    Rank 0 leaves a file there that only it can have made. A rank that does not find it is on a host
    that has another folder under that path, or none: rank 0 writes its share too.
    """
    folder.mkdir(parents=True, exist_ok=True)
    mark = folder / f".seen-{secrets.token_hex(8)}"
    if gang.rank == 0 and gang.world_size > 1:
        mark.touch()
    mark = folder / gang.share("checkpoints", mark.name)
    found = gang.rank == 0 or (mark.exists() and os.access(folder, os.W_OK))
    votes = gang.sum([float(found and rank == gang.rank) for rank in range(gang.world_size)])
    if gang.rank == 0:
        mark.unlink(missing_ok=True)
    return tuple(rank for rank, vote in enumerate(votes) if vote)


def divide(sizes: Mapping[str, int], parts: int, of_first: Collection[str] = ()) -> list[list[str]]:
    """Names in ``parts`` shares of nearly the same number of bytes: the largest first, each to the
    share that has least. The names ``of_first`` all belong to the first share.

    Depends on nothing else, so that ranks which hold the same tensors divide them alike.
    """
    shares: list[list[str]] = [[] for _ in range(parts)]
    loads = [0] * parts
    for name in sorted(sizes, key=lambda each: (each not in of_first, -sizes[each], each)):
        share = 0 if name in of_first else min(range(parts), key=loads.__getitem__)
        shares[share].append(name)
        loads[share] += sizes[name]
    return shares


class HostCopy:
    """A copy of tensors in host memory that stays allocated: fresh memory would have to be touched
    page by page each time, which takes longer than the copy itself."""

    def __init__(self, compute: Compute) -> None:
        self._compute = compute
        self._layout: Sequence[tuple[str, torch.dtype, torch.Size]] = ()
        self._views: dict[str, torch.Tensor] = {}

    def take(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Copy ``tensors``; blocks while it copies. The copy before this one is overwritten."""
        layout = [(name, tensor.dtype, tensor.shape) for name, tensor in tensors.items()]
        if layout != self._layout:
            self._views = {}  # given back before more is asked for
            self._views = self._allocate(tensors)
            self._layout = layout
        for name, tensor in tensors.items():
            self._views[name].copy_(tensor, non_blocking=True)
        self._compute.wait()
        return self._views

    def _allocate(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        # One block: a pinned one is rounded up to a power of two, as each of many would be.
        places: dict[str, int] = {}
        size = 0
        for name, tensor in tensors.items():
            places[name] = size
            size += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
        block = self._compute.host_memory(size)
        return {
            name: block[places[name] : places[name] + tensor.nbytes]
            .view(tensor.dtype)
            .view(tensor.shape)
            for name, tensor in tensors.items()
        }
