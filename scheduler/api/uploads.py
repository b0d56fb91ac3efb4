"""An upload on its way to disk: streamed, counted, hashed, and kept only when it is whole.

Written aside, synced, renamed into place; the row is inserted last. So a file that has a row is
complete, and what was cut off leaves nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from fastapi import Request
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.concurrency import run_in_threadpool

from scheduler.api.bodies import read_body
from scheduler.submission.paths import FILES, INLINE
from shared import ids
from shared.errors import InvalidRequest, PayloadTooLarge, UploadIncomplete
from shared.settings import Settings

_BLOCK = 1024 * 1024
_MULTIPART_OVERHEAD = 64 * 1024
_MAX_NAME = 255
_TOO_LARGE = "Split it, or let the operator raise GPUYARD_MAX_UPLOAD_BYTES."
ABANDONED_AFTER = 3600.0


@dataclass(frozen=True, slots=True)
class Received:
    """A complete upload in its place; ``path`` is relative to the data folder."""

    id: str
    name: str
    size: int
    sha256: str
    path: str


async def receive_file(request: Request, settings: Settings, name: str | None) -> Received:
    """Take the body, raw or as the one file of a multipart form.

    Args:
        request: Its ``X-Content-SHA256`` is compared, if there is one.
        settings: Data folder and size cap.
        name: What the file is called; in a form, the file's own name counts otherwise.

    Raises:
        PayloadTooLarge, UploadIncomplete: nothing was kept.
        InvalidRequest: a form without a file, or a name that is none.
    """
    wanted = request.headers.get("x-content-sha256")
    if wanted is not None and not re.fullmatch(r"[0-9a-fA-F]{64}", wanted):
        raise InvalidRequest("X-Content-SHA256 must be 64 hex digits", param="X-Content-SHA256")
    limit = settings.max_upload_bytes
    form = _Form.of(request)
    if name is not None:
        _check_name(name)
    id = ids.new_id(ids.FILE)
    writer = await run_in_threadpool(_Writer.create, settings.data / FILES, id)
    try:
        if form is None:
            async for chunk in read_body(request, limit, "the file", _TOO_LARGE):
                await writer.write(chunk)
        else:
            async for chunk in form.file(
                read_body(request, limit + _MULTIPART_OVERHEAD, "the form", _TOO_LARGE)
            ):
                await writer.write(chunk)
                if writer.size > limit:
                    raise PayloadTooLarge(
                        f"the file is larger than the {limit} bytes that the service takes",
                        hint=_TOO_LARGE,
                    )
        sha256 = await writer.digest()
        if wanted is not None and wanted.lower() != sha256:
            raise UploadIncomplete(
                f"the file that arrived has SHA-256 {sha256}, not {wanted}; nothing was kept",
                param="X-Content-SHA256",
                hint="Send it again.",
            )
        called = name or (form.filename if form else None) or "upload"
        suffix = PurePosixPath(called).suffix
        stored = id + (suffix if re.fullmatch(r"\.[A-Za-z0-9]{1,10}", suffix) else "")
        await run_in_threadpool(writer.keep, stored)
    except BaseException:
        # Also when the server ends and cancels this task: nothing half-written may stay.
        writer.drop()
        raise
    return Received(id, called, writer.size, sha256, f"{FILES}/{stored}")


def discard(settings: Settings, received: Received) -> None:
    """Delete an upload whose row was refused."""
    (settings.data / received.path).unlink(missing_ok=True)


def sweep_abandoned(settings: Settings, older_than: float = ABANDONED_AFTER) -> int:
    """Delete what a process that was killed left half-written: how many files.

    By age, because other API processes may share the folder and be writing right now.
    """
    swept = 0
    for folder in (settings.data / FILES, settings.data / INLINE):
        for aside in folder.glob(".*.part"):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - aside.stat().st_mtime > older_than:
                    aside.unlink()
                    swept += 1
    return swept


def _check_name(name: str) -> None:
    if not 0 < len(name) <= _MAX_NAME or not name.isprintable() or "/" in name or "\\" in name:
        raise InvalidRequest(
            f"name must be a file's name: 1 to {_MAX_NAME} printable characters without slashes",
            param="name",
        )


class _Writer:
    """A file that is being written aside."""

    def __init__(self, folder: Path, aside: Path, file: BinaryIO) -> None:
        self._folder, self._aside, self._file = folder, aside, file
        self._buffer = bytearray()
        self._sha256 = hashlib.sha256()
        self.size = 0

    @classmethod
    def create(cls, folder: Path, id: str) -> _Writer:
        folder.mkdir(parents=True, exist_ok=True)
        aside = folder / f".{id}.part"
        return cls(folder, aside, aside.open("xb"))

    async def write(self, chunk: bytes) -> None:
        self.size += len(chunk)
        self._buffer += chunk
        if len(self._buffer) >= _BLOCK:
            await run_in_threadpool(self._flush)

    async def digest(self) -> str:
        await run_in_threadpool(self._flush)
        return self._sha256.hexdigest()

    def _flush(self) -> None:
        self._file.write(self._buffer)
        self._sha256.update(self._buffer)
        self._buffer.clear()

    def keep(self, name: str) -> None:
        """Sync and rename; the name lasts once the folder is synced as well."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._aside.replace(self._folder / name)
        folder = os.open(self._folder, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def drop(self) -> None:
        self._file.close()
        self._aside.unlink(missing_ok=True)


@dataclass(slots=True)
class _Form:
    """The first file of a multipart form, as it streams by; other fields are passed over."""

    boundary: bytes
    filename: str | None = None
    _header: bytearray = field(default_factory=bytearray)
    _value: bytearray = field(default_factory=bytearray)
    _named: str | None = None
    _in_file: bool = False
    _seen: bool = False
    _ended: bool = False
    _out: bytearray = field(default_factory=bytearray)

    @classmethod
    def of(cls, request: Request) -> _Form | None:
        """None where the body is the file itself."""
        kind, options = parse_options_header(request.headers.get("content-type"))
        if kind != b"multipart/form-data":
            return None
        boundary = options.get(b"boundary")
        if not boundary:
            raise InvalidRequest("the form has no boundary", param="Content-Type")
        return cls(boundary)

    async def file(self, body: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """The bytes of the file.

        Raises:
            InvalidRequest: no multipart, or no file in it.
            UploadIncomplete: the closing boundary never came.
        """
        parser = MultipartParser(
            self.boundary,
            {
                "on_part_begin": self._part_begins,
                "on_header_field": lambda data, start, end: self._header.extend(data[start:end]),
                "on_header_value": lambda data, start, end: self._value.extend(data[start:end]),
                "on_header_end": self._header_ends,
                "on_headers_finished": self._part_starts,
                "on_part_data": self._data,
                "on_part_end": self._part_ends,
                "on_end": self._ends,
            },
        )
        async for chunk in body:
            try:
                parser.write(chunk)
            except ValueError as error:
                raise InvalidRequest(f"the form cannot be read: {error}") from None
            if self._out:
                yield bytes(self._out)
                self._out.clear()
        if not self._ended:
            raise UploadIncomplete("the form ended in its middle; nothing was kept")
        if not self._seen:
            raise InvalidRequest(
                "the form has no file",
                param="file",
                hint="Send it as a field with a filename, or as the plain body with ?name=.",
            )

    def _part_begins(self) -> None:
        self._named = None

    def _header_ends(self) -> None:
        if self._header.lower() == b"content-disposition":
            _, options = parse_options_header(bytes(self._value))
            if b"filename" in options:
                self._named = options[b"filename"].decode(errors="replace")
        self._header.clear()
        self._value.clear()

    def _part_starts(self) -> None:
        if self._named is not None and not self._seen:
            self._in_file = self._seen = True
            # Browsers of old sent whole paths: only the last part is the name.
            name = self._named.replace("\\", "/").rpartition("/")[2]
            self.filename = "".join(c for c in name if c.isprintable())[:_MAX_NAME] or None

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._in_file:
            self._out += data[start:end]

    def _part_ends(self) -> None:
        self._in_file = False

    def _ends(self) -> None:
        self._ended = True
