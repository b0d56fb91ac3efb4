"""What a rank prints, from its log file to the store."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from shared.messages import MARK

log = logging.getLogger(__name__)

CHUNK = 64 * 1024
"""Bytes of one row of the store, at most."""


class LogTail:
    """Ships complete lines from where the file ended when this was made, up to ``limit`` bytes.

    ``write`` takes the text and says whether it still counts. ``attempt_id``: of a log that several attempts
    share, lines that begin with the mark of another one are left out; see :data:`shared.messages.MARK`.
    """

    def __init__(
        self,
        path: Path,
        limit: int,
        write: Callable[[str], bool],
        attempt_id: str | None = None,
    ) -> None:
        self.path = path
        self._attempt_id = attempt_id
        self._limit = limit
        self._write = write
        self._offset = path.stat().st_size if path.exists() else 0
        self._shipped = 0

    def ship(self, *, all: bool = False) -> bool:
        """Ship what is new; with ``all`` also a last line without its end. False: stale.

        What ``write`` raises leaves the place where it was: the same text is shipped next time.
        """
        while self._shipped < self._limit:
            data = self._read()
            whole = data if all or len(data) == CHUNK else data[: data.rfind(b"\n") + 1]
            if len(whole) == CHUNK:
                # Cut long output at a line; a line longer than a chunk is cut where it may be.
                whole = whole[: whole.rfind(b"\n") + 1] or _whole_characters(whole)
            if not whole:
                return True
            last = self._shipped + len(whole) >= self._limit
            if last:
                whole = whole[: self._limit - self._shipped]
            text = self._mine(whole.decode(errors="replace"))
            if last:
                text += f"\n[more than {self._limit} bytes: the rest is only in {self.path}]\n"
            if text and not self._write(text):
                return False
            self._offset += len(whole)
            self._shipped += len(whole)
        return True

    def _mine(self, text: str) -> str:
        if self._attempt_id is None:
            return text
        lines = text.splitlines(keepends=True)
        found = [(MARK.match(line), line) for line in lines]
        return "".join(
            line[mark.end() :] if mark else line
            for mark, line in found
            if mark is None or mark[1] == self._attempt_id
        )

    def _read(self) -> bytes:
        try:
            with self.path.open("rb") as file:
                if file.seek(0, 2) < self._offset:
                    self._offset = 0  # an engine began its log anew
                file.seek(self._offset)
                return file.read(CHUNK)
        except FileNotFoundError:
            return b""
        except OSError as error:
            log.warning("cannot read %s: %s", self.path, error.strerror)
            return b""


def _whole_characters(data: bytes) -> bytes:
    """Without the beginning of a UTF-8 character at the end."""
    for cut in range(1, 4):
        if data[-cut] & 0xC0 == 0xC0:
            return data[:-cut]
    return data
