"""What befalls a process while it writes the token cache: run by ``in_another_process``."""

from __future__ import annotations

import os
import resource
from pathlib import Path

from workers.ranks.train.columns import Collector
from workers.ranks.train.examples import Examples
from workers.ranks.train.token_cache import TokenCache

KEY = "0" * 64


def collect(count: int) -> Examples:
    collected = Collector()
    collected.add({"tokens": [1] * count}, length=count)
    return collected.done()


def die_while_adding(folder: Path) -> None:
    def die() -> Examples:
        collect(200_000)
        os._exit(9)

    TokenCache(folder, lambda _code, _message: None).add(KEY, die)


def add_on_a_full_disk(folder: Path) -> str:
    # Stands for it: no file may grow beyond this.
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    try:
        TokenCache(folder, lambda _code, _message: None).add(KEY, lambda: collect(200_000))
    except OSError as error:
        return type(error).__name__
    return "written"
