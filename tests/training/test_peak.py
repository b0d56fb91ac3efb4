"""What a rank says it took at most."""

from __future__ import annotations

from pathlib import Path

import torch

from shared.messages import Done
from tests.training.harness import Gang, make_assignment
from workers.ranks.train.device import Compute

MB = 1_000_000


def test_every_rank_says_its_peak(
    bert: Path, train_file: Path, validation_file: Path, tmp_path: Path
) -> None:
    gang = Gang(
        make_assignment(
            tmp_path, bert, train_file, ranks=2, validation=validation_file, epochs=1, batch_size=32
        )
    )
    gang.run()
    reports = gang.of(Done)
    assert len(reports) == 2
    for report in reports:
        peak = report.summary["peak_memory_bytes"]
        assert 50 * MB < peak < 2000 * MB


def test_the_peak_is_kept_and_what_came_before_is_forgotten() -> None:
    high, after, later = Compute(torch.device("cpu"), "gloo", None), 0, 0
    held = torch.ones(50 * MB // 4)
    del held
    high.watch_memory()
    after = high.peak_memory() or 0
    block = torch.ones(80 * MB // 4)
    del block
    later = high.peak_memory() or 0
    assert after > 0
    assert 60 * MB < later - after < 110 * MB
