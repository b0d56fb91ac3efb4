"""Ids: a readable prefix and a ULID, so that they sort by time and say what they are of."""

from __future__ import annotations

import secrets

from ulid import ULID

JOB, ATTEMPT, FILE, CHECKPOINT, ARTIFACT, KEY, WORKER, SWEEP = (
    "job",
    "att",
    "file",
    "ckpt",
    "art",
    "key",
    "wrk",
    "swp",
)


def new_id(prefix: str) -> str:
    """For instance ``job_01JD2V5N0W8R4QK7T9Y3ZB6XEM``."""
    return f"{prefix}_{ULID()}"


def is_id(text: str, prefix: str) -> bool:
    head, _, tail = text.partition("_")
    return head == prefix and len(tail) == 26 and tail.isalnum()


def new_secret() -> str:
    """An API key: 192 random bits, recognisable in a leak scan by its prefix."""
    return f"gy_{secrets.token_urlsafe(24)}"
