"""Rows that come inside a spec: kept as a file, named by what is in it.

The stored spec names the file instead of carrying the rows, so that reading a queue of jobs does not
mean reading all their rows. Named by content, the same rows make the same spec: an idempotency key
that is repeated meets its own job.
"""

from __future__ import annotations

import hashlib
import json

from scheduler.submission.paths import INLINE
from shared.settings import Settings
from shared.specs import InferSpec


def rows_to_file(spec: InferSpec, settings: Settings) -> tuple[InferSpec, bytes | None]:
    """The spec with ``input`` in place of ``rows``, and what is to be written there.

    Nothing is written yet; None where the spec has no rows.
    """
    if spec.rows is None:
        return spec, None
    # ASCII escapes keep also what UTF-8 cannot hold: a lone surrogate is that row's error, later.
    content = "".join(json.dumps(row) + "\n" for row in spec.rows).encode()
    path = settings.data / INLINE / f"{hashlib.sha256(content).hexdigest()}.jsonl"
    return spec.model_copy(update={"rows": None, "input": str(path)}), content
