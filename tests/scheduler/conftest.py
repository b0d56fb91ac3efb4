from __future__ import annotations

from collections.abc import Iterator

import pytest

from shared.store import Store


@pytest.fixture
def store(database: str) -> Iterator[Store]:
    """The job store on a fresh database."""
    found = Store(database)
    yield found
    found.close()
