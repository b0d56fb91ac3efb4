"""The ranks of the product, in processes that may take only so much memory."""

from __future__ import annotations

import os
import resource
from pathlib import Path

from tests.training.harness import SPARE_MEMORY_VARIABLE
from workers.ranks.train.reports import RankChannel

ENTRY = "--nursery-option=--entry=train=tests.workers.scarce:train"


def train(channel: RankChannel) -> int:
    """A training rank that may take as much as the variable says beyond what it has."""
    from workers.ranks.train import main

    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limit = in_use + int(os.environ[SPARE_MEMORY_VARIABLE])
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    return main(channel)
