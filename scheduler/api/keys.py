"""Which API keys are valid, remembered for a few seconds."""

from __future__ import annotations

import hashlib
import threading
import time

from shared.store import Store
from shared.store.keys import find_key

CACHE_SECONDS = 3.0
"""How long a key that was found is trusted without asking again; so long a revoked one may live."""
_CACHE_SIZE = 4096


class KeyCache:
    """Ids of valid keys by the digest of the key, for a few seconds. Threads share it."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._found: dict[bytes, tuple[str, float]] = {}

    def key_id(self, key: str) -> str | None:
        """The id of a valid key, or None.

        Raises:
            Unavailable: Postgres cannot be reached and the key is not known here.
        """
        digest, now = hashlib.sha256(key.encode()).digest(), time.monotonic()
        with self._lock:
            found = self._found.get(digest)
        if found is not None and found[1] > now:
            return found[0]
        row = self._store.call(find_key, key)
        with self._lock:
            if row is None:
                self._found.pop(digest, None)
                return None
            if len(self._found) >= _CACHE_SIZE:
                self._found.clear()
            self._found[digest] = (row.id, now + CACHE_SECONDS)
        return row.id
