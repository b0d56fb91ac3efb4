"""Checkpoints on disk: whole or not there, without pickle, and verified before they are believed.

A checkpoint is a folder with ``state.safetensors`` (tensors), ``state.json`` (all else) and
``manifest.json`` (size and SHA-256 of the other two). It is written aside, synced and renamed into
place, so that death at any moment leaves either all of it or a hidden folder that nobody reads.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from shared.messages import CheckpointRef, FileDigest

TENSORS = "state.safetensors"
STATE = "state.json"
MANIFEST = "manifest.json"
_ASIDE = ".writing-"


class CheckpointDamaged(Exception):
    """The checkpoint is not what was once written; the message says what differs."""


@dataclass(frozen=True, slots=True)
class Written:
    """A checkpoint that is durable: what ``CheckpointWritten`` reports."""

    step: int
    path: Path
    manifest: dict[str, FileDigest]
    seconds: float


def write(
    folder: Path, step: int, tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any]
) -> Written:
    """Write a checkpoint of ``step`` into ``folder``, durably; returns once it is on disk.

    Args:
        folder: Holds the checkpoints; made where it is missing.
        tensors: On the CPU, contiguous, none sharing memory with another.
        state: What JSON can hold.

    Raises:
        OSError, SafetensorError: it could not be written; nothing of it is in place.
    """
    began = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    name = f"step-{step:08d}"
    aside = folder / f"{_ASIDE}{name}"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        save_file(dict(tensors), aside / TENSORS)
        (aside / STATE).write_text(json.dumps(state, indent=1, sort_keys=True) + "\n")
        manifest = {file: digest(aside / file) for file in (TENSORS, STATE)}
        sizes = {file: entry.model_dump() for file, entry in manifest.items()}
        (aside / MANIFEST).write_text(json.dumps(sizes, indent=1) + "\n")
        place(aside, folder / name)
    except BaseException:
        # A disk that is full must not stay full of what will never be finished.
        shutil.rmtree(aside, ignore_errors=True)
        raise
    return Written(step, folder / name, manifest, time.monotonic() - began)


def read(checkpoint: CheckpointRef) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Verify a checkpoint against its committed manifest and load it: (tensors, state).

    Raises:
        CheckpointDamaged: a file is missing, or differs from the manifest.
    """
    verify(checkpoint)
    folder = Path(checkpoint.path)
    try:
        return load_file(folder / TENSORS), json.loads((folder / STATE).read_text())
    except (SafetensorError, ValueError, OSError) as error:
        raise CheckpointDamaged(f"it cannot be loaded: {error}") from error


def read_state(checkpoint: CheckpointRef) -> dict[str, Any]:
    """Verify a checkpoint and load all but its tensors.

    Raises:
        CheckpointDamaged: a file is missing, or differs from the manifest.
    """
    verify(checkpoint)
    try:
        state: dict[str, Any] = json.loads((Path(checkpoint.path) / STATE).read_text())
    except (ValueError, OSError) as error:
        raise CheckpointDamaged(f"it cannot be loaded: {error}") from error
    return state


def verify(checkpoint: CheckpointRef) -> None:
    """Compare a checkpoint with its committed manifest.

    Raises:
        CheckpointDamaged: a file is missing, or differs from it.
    """
    folder = Path(checkpoint.path)
    if not {TENSORS, STATE} <= set(checkpoint.manifest):
        raise CheckpointDamaged(f"its manifest does not list {TENSORS} and {STATE}")
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


class CheckpointWriter:
    """Makes checkpoints durable on a thread of its own while training goes on.

    At most one is in the making: a second ``submit`` waits for the first. A failed write ends the
    training at the next ``submit`` or ``close``, as training on without checkpoints is not what
    was asked for.

    It deletes nothing: only the worker knows which checkpoints are committed, and what was written
    while Postgres was slow must not push out the last one that counts.
    """

    def __init__(self, folder: Path, written: Callable[[Written], None]) -> None:
        """``written`` is called on the writer's thread once a checkpoint is durable."""
        self._folder = folder
        self._written = written
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def submit(
        self, step: int, tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any]
    ) -> None:
        """Write in the background. The caller must not change ``tensors`` afterwards.

        Raises:
            Exception: what the write before this one failed with.
        """
        self.close()
        self._thread = threading.Thread(
            target=self._run, args=(step, tensors, state), name="checkpoint-writer", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Wait for the write in the making.

        Raises:
            Exception: what it failed with.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _run(
        self, step: int, tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any]
    ) -> None:
        try:
            self._written(write(self._folder, step, tensors, state))
        except BaseException as error:
            self._error = error
