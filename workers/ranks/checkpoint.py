"""Checkpoints on disk: whole or not there, without pickle, and verified before they are believed.

A checkpoint is a folder with one or more parts (``state-00000-of-00002.safetensors``: tensors, each in
one of the parts or, of a model in shards, in pieces: ``workers/ranks/train/pieces.py``), ``state.json``
(all else) and ``manifest.json`` (size and SHA-256 of the others). It is written aside, each part by
whoever holds its tensors, synced and renamed into place once all parts are there: death at any moment
leaves either all of it or a hidden folder that nobody reads.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from shared.messages import UNFINISHED, CheckpointRef, FileDigest

STATE = "state.json"
MANIFEST = "manifest.json"
_PART = re.compile(r"state-(\d{5})-of-(\d{5})\.safetensors")


class CheckpointDamaged(Exception):
    """The checkpoint is not what was once written; the message says what differs."""


@dataclass(frozen=True, slots=True)
class Written:
    """A checkpoint that is durable: what ``CheckpointWritten`` reports."""

    step: int
    path: Path
    manifest: dict[str, FileDigest]


def part_name(number: int, parts: int) -> str:
    """The file of part ``number`` (from 0) of ``parts``."""
    return f"state-{number:05d}-of-{parts:05d}.safetensors"


def begin(folder: Path, step: int) -> Path:
    """The folder aside, in which the checkpoint of ``step`` is written; made where it is missing, as
    whoever writes a part may be the first."""
    aside = folder / f"{UNFINISHED}{_name(step)}"
    aside.mkdir(parents=True, exist_ok=True)
    return aside


def write_part(
    aside: Path, number: int, parts: int, tensors: Mapping[str, torch.Tensor]
) -> FileDigest:
    """Write one part of a checkpoint; returns once it is on disk.

    Args:
        tensors: On the CPU, contiguous, none overlapping another.

    Raises:
        OSError, SafetensorError: it could not be written; nothing of it is left.
    """
    file = aside / part_name(number, parts)
    try:
        save_file(dict(tensors), file)
        _sync(file)
        return digest(file)
    except BaseException:
        # A disk that is full must not stay full of what will never be finished.
        file.unlink(missing_ok=True)
        raise


def finish(
    aside: Path, step: int, parts: Mapping[str, FileDigest], state: Mapping[str, Any]
) -> Written:
    """Make whole what ``begin`` began: every one of the ``parts`` is durable.

    Args:
        parts: By the names of their files.
        state: What JSON can hold.

    Raises:
        OSError: it could not be written, or a part is not there; nothing is in place.
    """
    for name, entry in parts.items():
        if (size := (aside / name).stat().st_size) != entry.size:
            raise OSError(f"{name} has {size} bytes where {entry.size} were written")
    (aside / STATE).write_text(json.dumps(state, indent=1, sort_keys=True) + "\n")
    manifest = {**parts, STATE: digest(aside / STATE)}
    sizes = {file: entry.model_dump() for file, entry in manifest.items()}
    (aside / MANIFEST).write_text(json.dumps(sizes, indent=1) + "\n")
    place(aside, aside.parent / _name(step))
    return Written(step, aside.parent / _name(step), manifest)


def abandon(aside: Path) -> None:
    """Give back the space of a checkpoint that will not be finished."""
    shutil.rmtree(aside, ignore_errors=True)


def _name(step: int) -> str:
    return f"step-{step:08d}"


def read_state(checkpoint: CheckpointRef) -> dict[str, Any]:
    """Verify a checkpoint against its committed manifest and load all but its tensors.

    Raises:
        CheckpointDamaged: a file is missing, or differs from the manifest.
    """
    verify(checkpoint)
    try:
        state: dict[str, Any] = json.loads((Path(checkpoint.path) / STATE).read_text())
    except (ValueError, OSError) as error:
        raise CheckpointDamaged(f"it cannot be loaded: {error}") from error
    return state


def part_files(checkpoint: CheckpointRef) -> list[str]:
    """The files that the tensors of a checkpoint are in, in order.

    Raises:
        CheckpointDamaged: its manifest lacks one.
    """
    found = sorted(name for name in checkpoint.manifest if _PART.fullmatch(name))
    if not found or found != [part_name(n, len(found)) for n in range(len(found))]:
        raise CheckpointDamaged(
            f"its manifest does not list every part, but {', '.join(found) or 'none'}"
        )
    return found


def read_tensors(checkpoint: CheckpointRef) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint that was verified, of all its parts. Those of a model in shards are
    left in pieces: a rank reads them by ``workers/ranks/train/pieces.py``.

    Raises:
        CheckpointDamaged: a part is missing, or no part is what it should be.
    """
    tensors: dict[str, torch.Tensor] = {}
    try:
        for name in part_files(checkpoint):
            tensors |= load_file(Path(checkpoint.path) / name)
    except (SafetensorError, ValueError, OSError) as error:
        raise CheckpointDamaged(f"it cannot be loaded: {error}") from error
    return tensors


def verify(checkpoint: CheckpointRef) -> None:
    """Compare a checkpoint with its committed manifest.

    Raises:
        CheckpointDamaged: a file is missing, or differs from it.
    """
    folder = Path(checkpoint.path)
    if STATE not in checkpoint.manifest:
        raise CheckpointDamaged(f"its manifest does not list {STATE}")
    for name, expected in checkpoint.manifest.items():
        if Path(name).name != name:
            raise CheckpointDamaged(f"its manifest names '{name}', which is no plain file name")
        file = folder / name
        try:
            size = file.stat().st_size
            if size != expected.size:
                raise CheckpointDamaged(f"{name} has {size} bytes and had {expected.size}")
            if digest(file).sha256 != expected.sha256:
                raise CheckpointDamaged(f"{name} has another SHA-256 than when it was written")
        except OSError as error:
            raise CheckpointDamaged(f"{name} cannot be read: {error.strerror}") from error


def digest(path: Path) -> FileDigest:
    """Size and SHA-256 of a file."""
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return FileDigest(size=os.fstat(file.fileno()).st_size, sha256=sha256)


def place(aside: Path, target: Path) -> None:
    """Put what was written ``aside`` (a file or a folder beside ``target``) in place, durably.

    Contents are synced before the rename and the parent after it: a crash in between can only
    leave the old state, never a name with half a content.
    """
    if aside.is_dir():
        for parent, _, files in os.walk(aside):
            for name in files:
                _sync(Path(parent) / name)
            _sync(Path(parent))
    else:
        _sync(aside)
    aside.rename(target)
    _sync(target.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
