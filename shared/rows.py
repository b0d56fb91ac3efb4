"""The rows of a batch job: how the input is cut into shards, and the form of one result.

Input is JSONL, one row a line; blank lines are no rows. Files of other formats are made JSONL when the
job is submitted (``scheduler/submission/converting.py``). A result is one object::

    {"row": 17, "id": <the row's own "id", if it has one>,
     "output": {...} | null,
     "error": {"code", "message"} | null,
     "usage": {"input_tokens": n, "output_tokens": m, "device_seconds": s}}

Exactly one of ``output`` and ``error`` is null. ``device_seconds`` is the row's part of the steps that it was
computed in (``workers/ranks/engine/costs.py``); it is not there where no step was. ``output`` by task:

text-generation, text2text, summarization
    ``{"text", "finish_reason"}``; the reason is "stop" (an end token or a stop string) or "length".
text-classification
    ``{"label", "score", "labels": [{"label", "score"}, ...]}``, best first, ``top_k_labels`` of them.
token-classification
    For a row of words ``{"tags": [...], "scores": [...], "entities": [...]}`` with a tag and its
    probability for each word, both null for a word that was cut away or that the tokenizer makes no
    token of. For a text ``{"entities": [...]}``. An entity is ``{"label", "score", "start", "end", "text"}``:
    ``start`` and ``end`` count *characters of a text* and *words of a row of words*, the end excluded;
    the score is the mean over its words. Labels with prefixes (B-, I-) are read as conlleval does;
    without prefixes (parts of speech) each word is an entity of its own. ``O`` is none. With
    ``aggregation: none`` each token of a text (each word of a row of words) that is not ``O`` is an
    entity, its label with its prefix.
fill-mask
    ``{"masks": [{"tokens": [{"token", "score"}, ...]}, ...], "text"}``: for each mask the ``top_k_labels``
    likeliest tokens, as the tokenizer writes them (a leading space is part of one), and the text with
    the best of each. A mask that was cut away is null and stays in the text.
scoring
    ``{"logprob", "tokens", "mean", "perplexity"}``: the sum of the log-probabilities (natural logarithm) of
    the tokens that count, how many they are, their mean, and e to the power of minus that. With
    ``token_logprobs`` also ``"token_logprobs": [{"token", "id", "logprob"}, ...]`` of the same tokens.
reranking
    For ``documents`` ``{"scores": [...], "ranking": [...]}``: a score for each in its order, and their places
    from the best on, ``top_n`` of them. For ``text`` ``{"score"}``.
embeddings
    ``{"embedding": [...], "dimensions": n}``, to 8 decimals, of length 1 unless ``normalize`` is off. With
    ``encoding: base64`` the embedding is a string: base64 of its numbers as float32, little-endian.

The output of a row that was too long and was split also has ``"windows"``, how many there were.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from shared.messages import Shard

MAX_LINE_BYTES = 8 * 1024 * 1024
REFUSED = "\0refused"
"""The column of a row that could not be taken from a file of another format: its error."""


def refused_row(code: str, message: str, *, id: Any = None) -> dict[str, Any]:
    """A row in place of one that could not be read; its error is the result."""
    return {"id": id, REFUSED: {"code": code, "message": message}}


def cut_into_shards(
    path: Path, shard_rows: int, on_row: Callable[[int, bytes], None] | None = None
) -> Iterator[Shard]:
    """Cut a JSONL file into shards of ``shard_rows`` rows. Reads it once, a line at a time.

    Only the line structure is looked at: a line that is no JSON is that row's error, later.

    Args:
        on_row: Is shown each row, as its number and its line.
    """
    index = first = rows = start = offset = 0
    with path.open("rb") as file:
        for line in file:
            if line.strip():
                if on_row is not None:
                    on_row(first + rows, line)
                rows += 1
            offset += len(line)
            if rows == shard_rows:
                yield Shard(
                    index=index, first_row=first, rows=rows, offset=start, length=offset - start
                )
                index, first, rows, start = index + 1, first + rows, 0, offset
    if rows:
        yield Shard(index=index, first_row=first, rows=rows, offset=start, length=offset - start)


def read_lines(path: Path, shard: Shard) -> list[tuple[int, bytes]]:
    """The raw rows of a shard as (row number, line without its end)."""
    with path.open("rb") as file:
        file.seek(shard.offset)
        data = file.read(shard.length)
    lines = [line.strip() for line in data.split(b"\n") if line.strip()]
    if len(lines) != shard.rows:
        raise ValueError(
            f"shard {shard.index} of {path.name} has {len(lines)} rows and had {shard.rows} when the "
            "job was submitted: the input file was changed"
        )
    return [(shard.first_row + i, line) for i, line in enumerate(lines)]


def find_row(path: Path, shard: Shard, row: int) -> int:
    """Where in the file row ``row`` of the input begins, which is in this shard: a byte.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is not the one that the shard was cut from.
    """
    offset, number = shard.offset, shard.first_row - 1
    with path.open("rb") as file:
        file.seek(shard.offset)
        while offset < shard.offset + shard.length and (line := file.readline()):
            number += bool(line.strip())
            if number == row:
                return offset
            offset += len(line)
    raise ValueError(f"{path.name} has no row {row} any more: the input file was changed")


def result(
    row: int,
    *,
    id: Any = None,
    output: dict[str, Any] | None = None,
    input_tokens: int = 0,
    output_tokens: int = 0,
) -> dict[str, Any]:
    usage = {"input_tokens": input_tokens, "output_tokens": output_tokens}
    return {"row": row, "id": id, "output": output, "error": None, "usage": usage}


def row_error(row: int, code: str, message: str, *, id: Any = None) -> dict[str, Any]:
    return {
        "row": row,
        "id": id,
        "output": None,
        "error": {"code": code, "message": message},
        "usage": {"input_tokens": 0, "output_tokens": 0},
    }


def pack_results(results: Iterable[dict[str, Any]]) -> bytes:
    """Results of a shard as the store keeps them: gzipped JSONL, the same bytes for the same rows."""
    lines = "".join(
        json.dumps(r, ensure_ascii=False, separators=(",", ":")) + "\n" for r in results
    )
    return gzip.compress(lines.encode(), compresslevel=5, mtime=0)


def renumber(lines: bytes, numbers: Sequence[int]) -> bytes:
    """Results as JSONL with other row numbers; their first field, as ``pack_results`` writes them."""
    told = []
    for line, number in zip(lines.splitlines(keepends=True), numbers, strict=True):
        _, comma, rest = line.partition(b",")
        told.append(b'{"row":%d' % number + comma + rest)
    return b"".join(told)


def failed_rows(data: bytes) -> Iterator[int]:
    """Numbers of the rows of a packed shard that have an error."""
    for line in unpack_results(data).splitlines():
        result = json.loads(line)
        if result["error"] is not None:
            yield result["row"]


def unpack_results(data: bytes) -> bytes:
    """The JSONL of a packed shard."""
    return gzip.decompress(data)
