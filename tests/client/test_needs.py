"""How the command line says what a job needs, and how that was found."""

from __future__ import annotations

import pytest

from gpuyard.cli.render import needs
from shared.resolved import Requirements


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ("user", "1 device · 3 GiB each"),
        ("estimate", "1 device · 3 GiB each, estimated"),
        ("measured", "1 device · 3 GiB each, measured without weights"),
        ("remembered", "1 device · 3 GiB each, remembered from earlier runs"),
    ],
)
def test_it_says_how_the_memory_was_found(found: str, said: str) -> None:
    wanted = Requirements(
        devices=1,
        accelerator="auto",
        memory_bytes=3 * 1024**3,
        memory_from=found,  # type: ignore[arg-type]
    )
    assert needs(wanted.model_dump(mode="json")) == said
