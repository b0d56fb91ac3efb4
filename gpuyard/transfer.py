"""Files up and down: streamed, checked by SHA-256, and never half there."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO
from urllib.parse import quote

from gpuyard.errors import CorruptDownload
from gpuyard.transport import Transport
from shared.errors import DataError, Unavailable
from shared.views import ArtifactView, FileView

OnBytes = Callable[[int, int], None]
"""Called with (bytes done, bytes in all)."""
CHUNK = 1024 * 1024


def digest(path: Path) -> str:
    """SHA-256 of a file, hex.

    Raises:
        DataError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}", param=str(path)) from None


def upload(transport: Transport, path: Path, sha256: str, on_bytes: OnBytes | None) -> FileView:
    """Send a file, from the start again if the connection breaks.

    Raises:
        DataError: it changed while it was read.
        PayloadTooLarge: it is over the service's cap.
    """
    size = path.stat().st_size

    def body() -> Iterator[bytes]:
        with path.open("rb") as file:
            yield from _pieces(file, path, size, on_bytes)

    answer = transport.request(
        "POST",
        "/v1/files",
        params={"name": path.name},
        body=body,
        headers={
            "Content-Length": str(size),
            "Content-Type": "application/octet-stream",
            "X-Content-SHA256": sha256,
        },
    )
    file = transport.read(answer, FileView)
    if file.sha256 != sha256:
        raise _changed(path)
    return file


def _changed(path: Path) -> DataError:
    return DataError(
        f"{path} changed while it was uploaded",
        param=str(path),
        hint="Upload it again once nothing writes to it.",
    )


def _pieces(file: BinaryIO, path: Path, size: int, on_bytes: OnBytes | None) -> Iterator[bytes]:
    done = 0
    if on_bytes:
        on_bytes(0, size)
    # No more than announced, also of a file that grows: its digest tells afterwards.
    while piece := file.read(min(CHUNK, size - done)):
        yield piece
        done += len(piece)
        if on_bytes:
            on_bytes(done, size)
    if done < size:
        raise _changed(path)


def download(
    transport: Transport,
    job_id: str,
    artifact: ArtifactView,
    target: Path,
    on_bytes: OnBytes | None,
) -> Path:
    """Fetch a deliverable to ``target``, which appears whole or not at all.

    What arrived before a broken connection is kept beside it as ``.part``, also for a later call,
    and is not fetched again.

    Raises:
        CorruptDownload: the content is not what the service says it is.
    """
    part = target.with_name(f".{target.name}.{artifact.sha256[:12]}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        resumed = part.exists()
        _fetch(transport, job_id, artifact, part, on_bytes)
        if digest(part) != artifact.sha256 and resumed:
            part.unlink()
            _fetch(transport, job_id, artifact, part, on_bytes)
        if digest(part) != artifact.sha256:
            part.unlink()
            raise CorruptDownload(
                f"{artifact.name} arrived with another SHA-256 than the service has for it",
                param=artifact.name,
                hint="Try again; if it stays so, the file on the service's disk was changed.",
            )
        part.replace(target)
    except OSError as error:
        raise DataError(f"cannot write {target}: {error.strerror}", param=str(target)) from None
    return target


def _fetch(
    transport: Transport, job_id: str, artifact: ArtifactView, part: Path, on_bytes: OnBytes | None
) -> None:
    pauses = transport.pauses()
    path = f"/v1/jobs/{job_id}/artifacts/{quote(artifact.name)}"
    while True:
        have = part.stat().st_size if part.exists() else 0
        if on_bytes:
            on_bytes(have, artifact.size)
        if have >= artifact.size and part.exists():
            return
        # Uncompressed, since a range counts the bytes of the file.
        headers = {"Accept-Encoding": "identity"}
        if have:
            headers["Range"] = f"bytes={have}-"
        broken = Unavailable(f"the download of {artifact.name} ended early")
        try:
            with transport.stream(path, headers=headers) as answer:
                mode = "ab" if answer.status_code == 206 else "wb"
                have = have if mode == "ab" else 0
                with part.open(mode) as file:
                    # An empty file has no bytes to wait for, and is there once it was opened.
                    for piece in answer.iter_raw(CHUNK):
                        file.write(piece)
                        have += len(piece)
                        pauses.reset()
                        if on_bytes:
                            on_bytes(have, artifact.size)
            if have >= artifact.size:
                return
        except Unavailable as error:
            broken = error
        pauses.after(broken)
