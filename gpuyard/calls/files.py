"""Calls about uploaded files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from gpuyard import transfer
from gpuyard.addresses import suffix_of
from gpuyard.calls.base import PAGE, Calls
from gpuyard.transfer import OnBytes
from shared.views import FileView

KNOWN_FILES = 5 * PAGE
"""How many of the newest uploads are looked through for one with the same content."""


class FileCalls(Calls):
    """``_uploaded``: ids of files that the service has, by content and kind of name."""

    _uploaded: dict[tuple[str, str], str]

    def upload(self, path: str | Path, on_bytes: OnBytes | None = None) -> FileView:
        """Upload a file and return it as the service keeps it; its ``id`` goes into specs.

        Raises:
            DataError: it cannot be read, or changed meanwhile.
            PayloadTooLarge: it is over the service's cap.
        """
        path = Path(path)
        sha256 = transfer.digest(path)
        file = transfer.upload(self._transport, path, sha256, on_bytes)
        self._uploaded[sha256, suffix_of(file.name)] = file.id
        return file

    def files(self) -> Iterator[FileView]:
        """Uploaded files, newest first."""
        return self._pages("/v1/files", FileView)

    def _uploaded_id(self, path: Path, on_bytes: OnBytes | None) -> str:
        """The id under which the service has the content of ``path`` under a name of its kind;
        uploads it if it has not. The suffix says how the service reads a file."""
        sha256 = transfer.digest(path)
        wanted = sha256, suffix_of(path.name)
        if wanted not in self._uploaded:
            for place, file in enumerate(self.files()):
                # Also makes a repeated submission the same spec, as an idempotency key demands.
                if (file.sha256, suffix_of(file.name)) == wanted:
                    self._uploaded[wanted] = file.id
                if wanted in self._uploaded or place >= KNOWN_FILES:
                    break
        if wanted not in self._uploaded:
            file = transfer.upload(self._transport, path, sha256, on_bytes)
            self._uploaded[wanted] = file.id
        return self._uploaded[wanted]
