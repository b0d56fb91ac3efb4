"""Files of rows that the service keeps: named by what is in them, whole or not there."""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Iterable
from pathlib import Path


def write_once(path: Path, content: bytes) -> None:
    """Write aside, sync, rename: two submissions of the same rows write the same file."""
    if path.is_file():
        return
    with _Aside(path.parent) as aside:
        aside.write(content)
        aside.become(path)


def write_lines(folder: Path, lines: Iterable[bytes]) -> Path:
    """Write lines, one in memory at a time, into a file of ``folder`` that is named by its content."""
    digest = hashlib.sha256()
    with _Aside(folder) as aside:
        for line in lines:
            digest.update(line)
            aside.write(line)
        path = folder / f"{digest.hexdigest()}.jsonl"
        if not path.is_file():
            aside.become(path)
    return path


class _Aside:
    """A file under a name that nobody looks for, gone at the end unless it became another."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / f".{secrets.token_hex(8)}.part"

    def __enter__(self) -> _Aside:
        self._file = self._path.open("xb")
        return self

    def write(self, content: bytes) -> None:
        self._file.write(content)

    def become(self, path: Path) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._path.replace(path)

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._path.unlink(missing_ok=True)
