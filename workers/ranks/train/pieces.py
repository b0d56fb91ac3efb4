"""Checkpoints of a model in shards: each rank writes the rows that it has of each tensor.

In a part, ``name@12`` is a piece of the tensor ``name``, its rows from 12 on; a name alone is a whole
tensor. So a checkpoint says by itself how it was cut, and any number of ranks can read from it what
they need: each opens the parts and takes the rows that are its own now.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch.distributed.tensor import DTensor

from shared.lifecycle import FailureClass
from shared.messages import CheckpointRef
from workers.ranks.checkpoint import CheckpointDamaged, part_files
from workers.ranks.train.failures import TrainingFailed
from workers.ranks.train.gang import Gang
from workers.ranks.train.sharding import local, span

_PIECE = re.compile(r"(.+)@(\d+)")


def own_pieces(tensors: Iterable[tuple[str, torch.Tensor]], gang: Gang) -> dict[str, torch.Tensor]:
    """What this rank writes: its rows of the tensors that are in shards, under names that say so, and
    on rank 0 those that every rank has."""
    own: dict[str, torch.Tensor] = {}
    for name, tensor in tensors:
        if not isinstance(tensor, DTensor):
            if gang.rank == 0:
                own[name] = tensor
            continue
        first, behind = span(tensor.shape[0], gang.world_size, gang.rank)
        part = local(tensor)
        assert len(part) == behind - first  # noqa: S101  as FSDP2 cuts
        if len(part):
            own[f"{name}@{first}"] = part
    return own


class Pieces:
    """The tensors of a checkpoint that was verified; read row by row, not loaded."""

    def __init__(self, checkpoint: CheckpointRef) -> None:
        """
        Raises:
            CheckpointDamaged: a part is missing, or no part is what it should be.
        """
        self._found: dict[str, list[tuple[int, Any, str]]] = {}
        """Of each tensor: first row, open file, name in it."""
        try:
            for file in part_files(checkpoint):
                opened = safe_open(Path(checkpoint.path) / file, framework="pt")
                for key in opened.keys():  # type: ignore[no-untyped-call]  # noqa: SIM118  no mapping
                    match = _PIECE.fullmatch(key)
                    name, first = (match[1], int(match[2])) if match else (key, 0)
                    self._found.setdefault(name, []).append((first, opened, key))
        except (SafetensorError, ValueError, OSError) as error:
            raise CheckpointDamaged(f"it cannot be loaded: {error}") from error
        for pieces in self._found.values():
            pieces.sort(key=lambda piece: piece[0])

    def copy_to(self, name: str, tensor: torch.Tensor, first: int = 0) -> None:
        """Fill ``tensor``, which is the rows from ``first`` on of the tensor ``name``, or all of it.

        Raises:
            CheckpointDamaged: it is not there, or not in that size.
        """
        if tensor.ndim == 0:
            [(_, file, key)] = self._pieces(name, 1)
            tensor.copy_(file.get_tensor(key))
            return
        done = 0
        for start, file, key in self._pieces(name):
            rows = file.get_slice(key)
            count = rows.get_shape()[0]
            begin, end = max(first + done, start), min(first + len(tensor), start + count)
            if begin == first + done < end:
                tensor[done : end - first].copy_(rows[begin - start : end - start])
                done = end - first
        if done != len(tensor):
            raise CheckpointDamaged(f"rows of {name} are missing from {first + done} on")

    def _pieces(self, name: str, most: int | None = None) -> list[tuple[int, Any, str]]:
        pieces = self._found.get(name, [])
        if not pieces or (most is not None and len(pieces) > most):
            raise CheckpointDamaged(f"{name} is not in it")
        return pieces


def require_parts(checkpoint: CheckpointRef) -> None:
    """Raises CheckpointDamaged unless the parts of a checkpoint can be read."""
    Pieces(checkpoint)


@torch.no_grad()
def load(
    checkpoint: CheckpointRef, tensors: Iterable[tuple[str, torch.Tensor]], gang: Gang
) -> None:
    """Fill every rank's tensors from a checkpoint that rank 0 has verified.

    Where each has all of the model, rank 0 reads and hands on what it read: only its host needs to
    see the folder. Of a model in shards each rank reads its own.

    Raises:
        TrainingFailed: this rank cannot read it (infrastructure).
    """
    held = list(tensors)
    if gang.rank == 0 or gang.sharded:
        _read(checkpoint, held, gang)
    if not gang.sharded:
        gang.spread(tensor for _, tensor in held)


def _read(
    checkpoint: CheckpointRef, tensors: Iterable[tuple[str, torch.Tensor]], gang: Gang
) -> None:
    try:
        pieces = Pieces(checkpoint)
        for name, tensor in tensors:
            first = 0
            if isinstance(tensor, DTensor):
                first, _ = span(tensor.shape[0], gang.world_size, gang.rank)
            pieces.copy_to(name, local(tensor), first)
    except CheckpointDamaged as problem:
        raise TrainingFailed(
            FailureClass.INFRASTRUCTURE,
            "checkpoint_unreadable",
            f"rank {gang.rank} cannot read the checkpoint of step {checkpoint.step}: {problem}",
            "Ranks that share a model in shards read one checkpoint: GPUYARD_DATA must be the same "
            "folder on all hosts.",
        ) from problem
