"""Which files and folders of this machine a spec may name."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from shared.errors import DataError, PathNotAllowed
from shared.settings import Settings

FILES = "files"
"""Folder of uploads below the data folder."""
INLINE = "inline"
"""Folder of rows that came inside a spec, or are those of another job, below the data folder."""
CONVERTED = "converted"
"""Folder of the rows of batch jobs whose files are no JSONL, below the data folder."""


def data_roots(settings: Settings) -> tuple[Path, ...]:
    """Folders whose files may be named by path: the operator's, uploads, and inline rows."""
    return (*settings.data_roots, settings.data / FILES, settings.data / INLINE)


def allowed_data_file(settings: Settings, text: str, *, param: str) -> Path:
    """The file behind an absolute path, links followed, if it lies in an allowed folder.

    Raises:
        PathNotAllowed: it lies outside, or the path is not absolute.
        DataError: it does not exist, or is no readable file.
    """
    if "\0" in text or not Path(text).is_absolute():
        raise DataError(
            f"{param}: '{printable(text)}' is neither an uploaded file's id nor an absolute path",
            param=param,
            hint="Upload the file (`gpuyard files upload PATH`) and use the id it gets.",
        )
    path = resolved(Path(text))
    # Asked first, so that the answer tells nothing about files outside the allowed folders.
    if path is None or not inside(path, data_roots(settings)):
        named = ", ".join(str(root) for root in settings.data_roots) or "none are opened"
        raise PathNotAllowed(
            f"{param}: '{printable(text)}' lies outside the folders that jobs may read",
            param=param,
            hint=f"Upload the file, or let the operator add its folder to GPUYARD_DATA_ROOTS ({named}).",
        )
    return readable_file(path, shown=text, param=param)


def readable_file(path: Path, *, shown: str, param: str) -> Path:
    """``path`` if it is a file that this process can read.

    Raises:
        DataError: says what is wrong with it.
    """
    try:
        if not path.is_file():
            what = "is a folder, not a file" if path.is_dir() else "does not exist"
            raise DataError(f"{param}: '{printable(shown)}' {what}", param=param)
        with path.open("rb"):
            return path
    except OSError as error:
        raise DataError(
            f"{param}: '{printable(shown)}' cannot be read: {error.strerror}",
            param=param,
            hint="The service reads it as its own user; see the file's permissions.",
        ) from None


def resolved(path: Path) -> Path | None:
    """``path`` with links and ``..`` followed; None if that cannot be done."""
    try:
        return path.resolve()
    except (OSError, RuntimeError, ValueError):
        return None


def inside(path: Path, roots: Iterable[Path]) -> bool:
    """Whether a resolved path lies below one of ``roots``, whose own links are followed as well."""
    return any(path != root and path.is_relative_to(root) for root in map(Path.resolve, roots))


def printable(text: str, limit: int = 200) -> str:
    """What a user wrote, fit for a message."""
    shown = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
    return shown if len(shown) <= limit else shown[:limit] + "…"
