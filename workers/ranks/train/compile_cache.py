"""Where compiled code is kept, so that the next attempt need not compile: ``<data>/cache/compiled/``.

What is in there is run. So it has to be this user's alone; and it is made for one kind of processor, so each
host has a folder of its own. Code may be tuned to the batch it was compiled with, so trainings share it
only where they compile with batches of one shape. Several ranks may use a folder at once: torch locks
what it writes, and puts it in place whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import socket
import stat
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from shared.messages import TrainAssignment

KEPT_SECONDS = 14 * 24 * 3600.0
"""A folder that no attempt asked for so long is deleted by the next one."""


@dataclass(frozen=True, slots=True)
class CompileCache:
    folder: Path
    private: bool
    """Nobody else will look for it."""


def open_cache(assignment: TrainAssignment, device: str, shapes: Any) -> CompileCache:
    """Have torch keep what it compiles from batches of ``shapes`` in the service's cache, or for the
    attempt alone where that cannot be written.

    Raises:
        OSError: there is no room in the attempt's own folder either.
    """
    versions = [torch.__version__, transformers.__version__]
    parts = json.dumps([device, shapes, versions], sort_keys=True)
    name = hashlib.sha256(parts.encode()).hexdigest()[:16]
    cache = None
    if assignment.cache_dir is not None:
        cache = _own(Path(assignment.cache_dir) / "compiled", name)
    if cache is None:
        private = Path(assignment.work_dir) / f"compiled-{assignment.rank}"
        private.mkdir(mode=0o700, parents=True, exist_ok=True)
        cache = CompileCache(private, private=True)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache.folder)
    os.environ.pop("TRITON_CACHE_DIR", None)  # it follows the other one
    return cache


def _own(parent: Path, name: str) -> CompileCache | None:
    host = re.sub(r"[^\w.-]", "_", socket.gethostname())
    mine = parent / f"{host}-{os.geteuid()}"
    try:
        parent.mkdir(exist_ok=True)
        mine.mkdir(mode=0o700, exist_ok=True)
        found = mine.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
            return None
        folder = mine / name
        folder.mkdir(mode=0o700, exist_ok=True)
        os.utime(folder)
        _tidy(mine)
    except OSError:
        return None
    return CompileCache(folder, private=False)


def _tidy(mine: Path) -> None:
    now = time.time()
    for folder in mine.iterdir():
        with suppress(OSError):
            if now - folder.stat().st_mtime > KEPT_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)
