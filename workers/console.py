"""What the worker processes write to stderr."""

from __future__ import annotations

import logging
import sys


def configure(name: str) -> None:
    """Log lines of this process carry ``name``. Libraries speak up from warnings on."""
    logging.basicConfig(
        level=logging.INFO,
        stream=sys.stderr,
        format=f"%(asctime)s {name} %(levelname)s %(message)s",
    )
    for chatty in ("alembic", "celery", "kombu"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
