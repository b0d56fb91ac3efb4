"""A published model as a folder here: whole and checked, or not there at all."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from gpuyard import transfer
from gpuyard.transfer import OnBytes
from gpuyard.transport import Transport
from shared.errors import Conflict, DataError
from shared.views import ArtifactView


def fetch_folder(
    transport: Transport,
    job_id: str,
    files: Mapping[str, ArtifactView],
    target: Path,
    on_bytes: OnBytes | None,
) -> Path:
    """Make ``target`` a folder of ``files``, by their names in it.

    They are gathered in a folder beside it, which becomes ``target`` by one rename. What arrived of a
    fetch that was broken off lies there and is not fetched again. A ``target`` that holds these very
    files already is left as it is.

    Raises:
        Conflict: ``target`` is there, and is something else.
        DataError: it cannot be written.
        CorruptDownload: what arrived does not have the SHA-256 that it should have.
    """
    target = target.expanduser().absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        if target.is_dir() and _holds(target, files):
            return target
        raise Conflict(
            f"{target} is there already and is not this model",
            param=str(target),
            hint="Name a folder that does not exist yet, or remove this one.",
        )
    aside = target.with_name(f".{target.name}.{job_id}.fetching")
    total, before = sum(file.size for file in files.values()), 0
    for name, artifact in files.items():
        path = aside / name
        if not _is(path, artifact):
            moved = None if on_bytes is None else _from(before, total, on_bytes)
            transfer.download(transport, job_id, artifact, path, moved)
        before += artifact.size
    try:
        _drop_others(aside, files)
        aside.replace(target)
    except OSError as error:
        raise DataError(f"cannot write {target}: {error.strerror}", param=str(target)) from None
    return target


def _from(before: int, total: int, on_bytes: OnBytes) -> OnBytes:
    """Progress of one file as progress of all."""
    return lambda done, _: on_bytes(before + done, total)


def _holds(folder: Path, files: Mapping[str, ArtifactView]) -> bool:
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    return there == set(files) and all(_is(folder / name, file) for name, file in files.items())


def _is(path: Path, artifact: ArtifactView) -> bool:
    return (
        path.is_file()
        and path.stat().st_size == artifact.size
        and transfer.digest(path) == artifact.sha256
    )


def _drop_others(folder: Path, files: Mapping[str, ArtifactView]) -> None:
    """What an earlier fetch left that does not belong to the model: parts of files."""
    for path in folder.rglob("*"):
        if path.is_file() and path.relative_to(folder).as_posix() not in files:
            path.unlink()
        elif path.is_dir() and not any(n.startswith(f"{path.relative_to(folder)}/") for n in files):
            shutil.rmtree(path)
