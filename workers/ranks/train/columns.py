"""The columns of tokenised examples, in memory or as files that are mapped, and how they are made.

A folder of columns holds one raw little-endian array a file and ``manifest.json`` with the size of each.
Mapped read-only, its pages are shared by all ranks of a host and need not fit into memory.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from workers.ranks.train.examples import Examples, Ragged

MANIFEST = "manifest.json"
FORMAT = 1
_FLUSHED_TOGETHER = 1 << 16
"""Numbers of a column that are held back from its file."""
_TYPES = {"i": "<i4", "q": "<i8", "d": "<f8", "b": "|b1"}
_FOLDER: ContextVar[Path | None] = ContextVar("folder of columns", default=None)


class ColumnsDamaged(Exception):
    """The folder is not what was once written; the message says what differs."""


@contextmanager
def collected_in(folder: Path) -> Iterator[None]:
    """Within, the one ``Collector`` that is made writes into ``folder``, which is empty.

    Not a parameter of it, because between here and there are the tasks, which are not to know.
    """
    token = _FOLDER.set(folder)
    try:
        yield
    finally:
        _FOLDER.reset(token)


class Collector:
    """Gathers examples one by one into ``Examples``: in memory, or on disk within ``collected_in``."""

    def __init__(self) -> None:
        self._folder = _FOLDER.get()
        self._columns: dict[str, _Column] = {}
        self._lists: list[str] = []
        self._numbers: list[str] = []
        for name, code in (("lengths", "i"), ("weights", "q"), ("cut", "b")):
            self._column(name, code)

    def add(
        self,
        lists: Mapping[str, Sequence[int]],
        *,
        length: int,
        weight: int = 1,
        cut: bool = False,
        numbers: Mapping[str, float] | None = None,
    ) -> None:
        """One example: its lists of integers, and one number for each further column. All examples
        have the same columns.

        Raises:
            OSError: the folder cannot be written.
        """
        columns = self._columns
        for name, items in lists.items():
            if f"{name}.values" not in columns:
                self._lists.append(name)
                self._column(f"{name}.values", "i")
                self._column(f"{name}.ends", "q")
            columns[f"{name}.values"].extend(items)
            columns[f"{name}.ends"].extend((columns[f"{name}.values"].count,))
        for name, number in (numbers or {}).items():
            if f"{name}.numbers" not in columns:
                self._numbers.append(name)
                self._column(f"{name}.numbers", "d")
            columns[f"{name}.numbers"].extend((number,))
        columns["lengths"].extend((length,))
        columns["weights"].extend((weight,))
        columns["cut"].extend((cut,))

    def done(self) -> Examples:
        """Raises OSError where the folder cannot be written."""
        arrays = {name: column.done() for name, column in self._columns.items()}
        if self._folder is None:
            return _examples(arrays, self._lists, self._numbers)
        manifest = {
            "format": FORMAT,
            "examples": len(arrays["lengths"]),
            "lists": self._lists,
            "numbers": self._numbers,
            "files": {
                name: {"type": column.type, "size": array.nbytes}
                for (name, column), array in zip(
                    self._columns.items(), arrays.values(), strict=True
                )
            },
        }
        (self._folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
        return _examples(arrays, self._lists, self._numbers, folder=self._folder)

    def _column(self, name: str, code: str) -> None:
        self._columns[name] = _Column(code, self._folder and self._folder / name)


def map_columns(folder: Path) -> Examples:
    """The examples of a folder that ``Collector`` wrote, mapped.

    Raises:
        FileNotFoundError: there is no such folder.
        ColumnsDamaged: it is not whole.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        if manifest["format"] != FORMAT:
            raise ColumnsDamaged(f"it is of format {manifest['format']}, not {FORMAT}")
        for name, entry in manifest["files"].items():
            size = (folder / name).stat().st_size
            if size != entry["size"]:
                raise ColumnsDamaged(f"{name} has {size} bytes and had {entry['size']}")
        arrays = {name: _map(folder / name, e["type"]) for name, e in manifest["files"].items()}
        return _examples(arrays, manifest["lists"], manifest["numbers"], folder=folder)
    except FileNotFoundError as error:
        if not folder.is_dir():
            raise
        raise ColumnsDamaged(f"{Path(error.filename).name} is missing") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ColumnsDamaged(f"it cannot be read: {error}") from None


class _Column:
    """One array in the making. In a file, only its end is in memory."""

    def __init__(self, code: str, path: Path | None) -> None:
        self.type = _TYPES[code]
        self.count = 0
        self._path = path
        self._file: BinaryIO | None = None if path is None else path.open("xb")
        self._items: array[Any] = array(code)

    def extend(self, items: Sequence[Any]) -> None:
        self._items.extend(items)
        self.count += len(items)
        if self._file is not None and len(self._items) >= _FLUSHED_TOGETHER:
            self._flush(self._file)

    def done(self) -> NDArray[Any]:
        if self._file is None or self._path is None:
            return np.asarray(self._items).astype(self.type, copy=False)
        self._flush(self._file)
        self._file.close()
        return _map(self._path, self.type)

    def _flush(self, file: BinaryIO) -> None:
        file.write(np.asarray(self._items).astype(self.type, copy=False).tobytes())
        del self._items[:]


def _map(path: Path, type: str) -> NDArray[Any]:
    # Nothing cannot be mapped. As a plain array: slicing a np.memmap takes several times as long.
    if not path.stat().st_size:
        return np.zeros(0, type)
    return np.memmap(path, type, mode="r").view(np.ndarray)


def _examples(
    arrays: Mapping[str, NDArray[Any]],
    lists: Sequence[str],
    numbers: Sequence[str],
    folder: Path | None = None,
) -> Examples:
    return Examples(
        {name: Ragged(arrays[f"{name}.values"], arrays[f"{name}.ends"]) for name in lists},
        {name: arrays[f"{name}.numbers"] for name in numbers},
        lengths=arrays["lengths"],
        weights=arrays["weights"],
        cut=arrays["cut"].astype(np.bool_, copy=False),
        folder=folder,
    )
