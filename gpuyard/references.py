"""The files that a spec refers to, and putting uploaded ones in their place."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

FIELDS = (("data", "train"), ("data", "validation"), ("input",))
"""Where a spec names a file."""
_UPLOADED = re.compile(r"file_[0-9A-Za-z]{26}")


def named_files(spec: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], str]]:
    """(field, reference) for each file that is named and not uploaded yet."""
    for field in FIELDS:
        value: Any = spec
        for part in field:
            value = value.get(part) if isinstance(value, Mapping) else None
        if isinstance(value, str) and not _UPLOADED.fullmatch(value):
            yield field, value


def local_file(reference: str, bases: Sequence[Path] = ()) -> Path | None:
    """The file of this machine that a reference means: from here, or else from one of ``bases``."""
    for base in (Path(), *bases):
        path = base / Path(reference).expanduser()
        try:
            if path.is_file():
                return path
        except (OSError, ValueError):
            continue  # too long for a path, or with a NUL: the service says what is wrong with it
    return None


def with_uploads(
    spec: Mapping[str, Any], upload: Callable[[Path], str], bases: Sequence[Path] = ()
) -> dict[str, Any]:
    """A copy in which each file that exists here is replaced by the id that ``upload`` gives it.

    What does not exist here stays: it may be a path on the service's own disk.
    """
    result = copy.deepcopy(dict(spec))
    for field, reference in list(named_files(result)):
        path = local_file(reference, bases)
        if path is not None:
            owner = result
            for part in field[:-1]:
                owner = owner[part]
            owner[field[-1]] = upload(path)
    return result
