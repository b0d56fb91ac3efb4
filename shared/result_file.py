"""Results of a batch job as a Parquet file, made piece by piece in memory that does not grow with it.

The columns are those of :func:`columns_of`: what an output of the task is made of, numbers and text as
such, an embedding as a list of float32, and what is nested as JSON. ``id`` is text: an id that is a string
as it is, any other as JSON.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

GROUP_ROWS = 8192
GROUP_BYTES = 4 * 1024 * 1024
"""A row group ends with so many rows, or so many bytes of JSON: what is held at a time."""

_FLOATS = pa.list_(pa.float32())
_SCORES = pa.list_(pa.float64())
_JSON = pa.large_string()
"""A column of this type is written as JSON; strings of other columns are ``pa.string()``."""
_GENERATED = {
    "text": pa.string(),
    "finish_reason": pa.string(),
    "choices": _JSON,
    "logprobs": _JSON,
}
_OUTPUTS: dict[str, dict[str, pa.DataType]] = {
    "text-generation": _GENERATED,
    "text2text": _GENERATED,
    "summarization": _GENERATED,
    "text-classification": {"label": pa.string(), "score": pa.float64(), "labels": _JSON},
    "token-classification": {"tags": _JSON, "scores": _JSON, "entities": _JSON},
    "fill-mask": {"text": pa.string(), "masks": _JSON},
    "scoring": {
        "logprob": pa.float64(),
        "tokens": pa.int64(),
        "mean": pa.float64(),
        "perplexity": pa.float64(),
        "token_logprobs": _JSON,
    },
    "reranking": {"score": pa.float64(), "scores": _SCORES, "ranking": pa.list_(pa.int32())},
    "embeddings": {"embedding": _FLOATS, "dimensions": pa.int32()},
}
_OTHER = "other_output"


def columns_of(task: str) -> dict[str, pa.DataType]:
    """Columns in order. ``other_output`` is the rest of an output as JSON, null where there is none."""
    return {
        "row": pa.int64(),
        "id": pa.string(),
        **_OUTPUTS.get(task, {}),
        _OTHER: _JSON,
        "error_code": pa.string(),
        "error_message": pa.string(),
        "input_tokens": pa.int64(),
        "output_tokens": pa.int64(),
        "device_seconds": pa.float64(),
    }


def parquet_pieces(task: str, lines: Iterable[bytes]) -> Iterator[bytes]:
    """The file over results as JSONL, in pieces of a row group each; ``lines`` are any number of whole
    lines at a time."""
    sink = _Sink()
    columns = columns_of(task)
    with pq.ParquetWriter(pa.PythonFile(sink, mode="w"), pa.schema(columns.items())) as writer:
        rows: list[dict[str, Any]] = []
        size = 0
        for block in lines:
            for line in block.splitlines():
                rows.append(_row(json.loads(line), columns))
                size += len(line)
                if len(rows) == GROUP_ROWS or size >= GROUP_BYTES:
                    _write_group(writer, rows)
                    yield sink.take()
                    rows, size = [], 0
        if rows:
            _write_group(writer, rows)
    yield sink.take()


def _write_group(writer: pq.ParquetWriter, rows: list[dict[str, Any]]) -> None:
    writer.write_batch(pa.RecordBatch.from_pylist(rows, schema=writer.schema))


def _row(result: dict[str, Any], columns: dict[str, pa.DataType]) -> dict[str, Any]:
    id, error = result["id"], result["error"] or {}
    row = {
        "row": result["row"],
        "id": id if id is None or isinstance(id, str) else _json(id),
        "error_code": error.get("code"),
        "error_message": error.get("message"),
        **result["usage"],
    }
    other = {}
    for name, value in (result["output"] or {}).items():
        kind = None if name in row or name == _OTHER else columns.get(name)
        if kind is None or not _is(value, kind):
            other[name] = value
        elif value is not None:
            row[name] = _json(value) if kind == _JSON else value
    row[_OTHER] = _json(other) if other else None
    return row


def _is(value: Any, kind: pa.DataType) -> bool:
    """Whether a value can stand in a column of this type; if not it is with the other ones."""
    if value is None or kind == _JSON:
        return True
    if kind == _FLOATS:
        return isinstance(value, list)
    return isinstance(value, str if kind == pa.string() else int | float)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


class _Sink:
    """A file that is only written to; what was written is taken and forgotten."""

    closed = False

    def __init__(self) -> None:
        self._pieces: list[bytes] = []

    def write(self, piece: bytes) -> int:
        self._pieces.append(bytes(piece))
        return len(piece)

    def flush(self) -> None:
        """Nothing is held back."""

    def take(self) -> bytes:
        pieces, self._pieces = self._pieces, []
        return b"".join(pieces)
