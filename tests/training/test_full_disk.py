"""Checkpoints of two ranks when something goes wrong in the middle: a full disk, a rank that dies."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shared.lifecycle import FailureClass
from shared.messages import UNFINISHED, CheckpointWritten, Done, Progress, Report
from tests.training.harness import Gang, make_assignment
from workers.attempt.folders import AttemptFolder
from workers.ranks.checkpoint import begin, part_name, read_state

OPTIONS: dict[str, Any] = {"epochs": 3, "batch_size": 16, "learning_rate": 3e-3}
EVERY_5: dict[str, Any] = {"every_steps": 5, "every_seconds": None}


MOUNT = 'mount -t tmpfs -o size=1m tmpfs "$0"'


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """The checkpoint folder of an attempt in ``tmp_path / "work"``, with room for a few of them."""
    folder = tmp_path / "work" / "checkpoints"
    folder.parent.mkdir()
    with contextlib.ExitStack() as stack:
        if os.geteuid() == 0:
            stack.enter_context(mounted(folder))
        else:
            disk = stack.enter_context(mounted_in_a_namespace(tmp_path / "disk"))
            folder.symlink_to(disk)
        yield folder


@contextlib.contextmanager
def mounted(folder: Path) -> Iterator[None]:
    """A small disk on ``folder``, as root may make one."""
    folder.mkdir()
    done = subprocess.run(["sh", "-c", MOUNT, str(folder)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no small disk may be mounted here: {done.stderr.strip()}")
    yield
    subprocess.run(["umount", str(folder)], check=True)


@contextlib.contextmanager
def mounted_in_a_namespace(folder: Path) -> Iterator[Path]:
    """The same for anybody: a process that is root in a namespace of its own mounts the disk there,
    and the kernel shows to the user whose process it is what that one sees. Where to find it."""
    folder.mkdir()
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    with subprocess.Popen(
        [*command, f"{MOUNT} && echo mounted && exec cat", str(folder)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    ) as holder:  # fmt: skip
        assert holder.stdin is not None and holder.stdout is not None
        said = holder.stdout.readline().strip()
        if said != "mounted":
            pytest.skip(f"neither root nor a user namespace to mount a small disk in: {said}")
        yield Path(f"/proc/{holder.pid}/root{folder}")
        holder.stdin.close()


def test_a_full_disk_ends_the_attempt_and_leaves_the_last_good_one(
    tmp_path: Path, bert: Path, train_file: Path, small_disk: Path
) -> None:
    first = Gang(
        make_assignment(tmp_path / "work", bert, train_file, ranks=2, checkpoint=EVERY_5, **OPTIONS)
    ).run()
    assert not first.of(Done)
    told = {rank: r for rank, r in first.reports if getattr(r, "code", None) == "disk_full"}
    failure = told[0]
    assert failure.failure_class is FailureClass.INFRASTRUCTURE
    assert "the worker's disk is full: a checkpoint or the model" in failure.message
    assert "checkpoint.keep" in failure.hint
    assert "Traceback" not in first.log.read_text()
    written = [report.step for report in first.of(CheckpointWritten)]
    assert written[:2] == [5, 10] and len(written) < 9, first.log.read_text()
    # What there was no room for is gone, and what there was before is whole.
    assert sorted(file.name for file in small_disk.iterdir()) == [f"step-{n:08d}" for n in written]
    for checkpoint in first.checkpoints:
        read_state(checkpoint)
    second = Gang(
        make_assignment(
            tmp_path / "2", bert, train_file, ranks=2, resume_from=first.checkpoints, **OPTIONS
        )
    ).run()
    assert second.done.summary["resumed_from"]["step"] == written[-1]
    whole = Gang(make_assignment(tmp_path / "3", bert, train_file, ranks=2, **OPTIONS)).run()
    assert second.weights == whole.weights


def test_a_failed_write_ends_the_attempt_at_the_next_step(
    tmp_path: Path, bert: Path, train_file: Path
) -> None:
    """And not only when the next checkpoint is due; on both ranks, whichever of them it was."""
    work = tmp_path / "work"
    stands_in_the_way = begin(work / "checkpoints", 5) / part_name(1, 2)
    stands_in_the_way.mkdir()
    gang = Gang(
        make_assignment(
            work, bert, train_file, ranks=2,
            checkpoint={"every_steps": 5, "every_seconds": None}, epochs=100_000, max_steps=10**9,
        )
    ).run()  # fmt: skip
    assert not gang.of(CheckpointWritten) and not gang.of(Done)
    assert not stands_in_the_way.exists()


def test_a_rank_that_dies_while_it_writes_leaves_nothing_that_counts(
    tmp_path: Path, bert: Path, train_file: Path
) -> None:
    folder = AttemptFolder(tmp_path, "job", 1)
    checkpoints = folder.path / "checkpoints"
    endless = {**OPTIONS, "epochs": 100_000, "checkpoint": EVERY_5}
    gang = Gang(make_assignment(folder.path, bert, train_file, ranks=2, **endless))

    def strike() -> None:
        """Stop rank 1 while a checkpoint is being written; kill it if its part was not there yet."""
        pid = gang.processes[1].pid
        assert pid is not None
        while gang.processes[1].is_alive():
            for aside in checkpoints.glob(f"{UNFINISHED}*"):
                os.kill(pid, signal.SIGSTOP)
                if aside.exists() and not (aside / part_name(1, 2)).exists():
                    struck.append(aside.name)
                    gang.kill(1)
                    return
                os.kill(pid, signal.SIGCONT)
            time.sleep(0.0002)

    struck: list[str] = []
    thread = threading.Thread(target=strike, daemon=True)

    def begin_to_watch(_rank: int, report: Report) -> None:
        if isinstance(report, Progress) and not thread.ident:
            thread.start()

    gang.run(on_report=begin_to_watch)
    assert gang.exit_code(1) == -9 and len(struck) == 1
    assert (gang.failed.failure_class, gang.failed.code) == (FailureClass.LOST_WORKER, "peer_lost")
    assert f"step-{max([0, *(r.step for r in gang.of(CheckpointWritten))]):08d}" < struck[0][9:]
    unfinished = [file.name for file in checkpoints.glob(f"{UNFINISHED}*")]
    assert unfinished == struck
    AttemptFolder(tmp_path, "job", 2).sweep()
    assert len(list(checkpoints.iterdir())) == len(gang.of(CheckpointWritten))
    for checkpoint in gang.checkpoints:
        read_state(checkpoint)
