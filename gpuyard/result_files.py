"""Results of a batch job as one file here: whole, or not there at all.

Parquet comes from the service as it is, since the client is installed without pyarrow.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from gpuyard.streams import Order
from gpuyard.transport import Transport
from shared.errors import DataError, InvalidRequest, Unavailable

if TYPE_CHECKING:
    from gpuyard.calls.outputs import OutputCalls

_MAGIC = b"PAR1"
"""Begins and ends each Parquet file."""


def is_parquet(path: Path) -> bool:
    return path.suffix.lower() in (".parquet", ".pq")


def download(
    client: OutputCalls,
    transport: Transport,
    job_id: str,
    target: Path,
    *,
    follow: bool,
    order: Order,
) -> int:
    """See ``OutputCalls.download_results``."""
    if not is_parquet(target):
        return _write_jsonl(client, job_id, target, follow=follow, order=order)
    if order != "input":
        raise InvalidRequest(
            "a Parquet file is in input order",
            param="order",
            hint="Leave the order out, or write JSONL.",
        )
    if follow:
        client.wait(job_id, raise_on_failure=False)
    return _fetch_parquet(transport, job_id, target)


def _write_jsonl(
    client: OutputCalls, job_id: str, target: Path, *, follow: bool, order: Order
) -> int:
    count = 0
    with _appearing(target) as file:
        for row in client.results(job_id, follow=follow, order=order):
            line = json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n"
            file.write(line.encode())
            count += 1
    return count


def _fetch_parquet(transport: Transport, job_id: str, target: Path) -> int:
    """From the start again when the connection breaks: the file is made anew for each answer."""
    pauses = transport.pauses()
    path = f"/v1/jobs/{job_id}/results"
    while True:
        try:
            with (
                _appearing(target) as file,
                transport.stream(path, params={"format": "parquet"}) as answer,
            ):
                end = b""
                for piece in answer.iter_bytes():
                    file.write(piece)
                    end = (end + piece)[-len(_MAGIC) :]
                # A service that stops ends its streams properly.
                if end != _MAGIC:
                    raise Unavailable(f"the results of {job_id} broke off")
                return int(answer.headers["X-Rows-Done"])
        except Unavailable as error:
            pauses.after(error)


@contextmanager
def _appearing(target: Path) -> Iterator[BinaryIO]:
    """A file beside ``target`` that takes its place once all of it is written."""
    part = target.with_name(f".{target.name}.part")
    try:
        with part.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(target)
    except OSError as error:
        # That of a connection is no OSError here: the transport has made it Unavailable.
        raise DataError(f"cannot write {target}: {error.strerror}", param=str(target)) from None
    finally:
        part.unlink(missing_ok=True)
