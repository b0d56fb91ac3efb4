"""Whatever a rank started and whoever is killed: no process of the tree remains."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shared.messages import Notice, Stop
from tests.stack import eventually
from workers.launch import Exit, RankProcess
from workers.sweep import ProcessId, children, descendants, read_stat, sweep

ROOT = Path(__file__).parents[2]
Ready = Callable[[RankProcess], dict[str, Any]]


def tree_of(rank: RankProcess) -> list[ProcessId]:
    """The processes that live right now, those with a clean environment included."""
    pids = [rank.supervisor.pid, *descendants(rank.supervisor.pid)]
    return [found for pid in pids if (found := ProcessId.of(pid)) is not None]


def nothing_lives(tree: list[ProcessId]) -> bool:
    return not any(process.lives() for process in tree)


def test_rank_may_leave_in_good_order(yard: Any, ready: Ready) -> None:
    rank = yard.launch("obey")
    ready(rank)
    assert rank.end(grace=10) == Exit(7, None)
    assert yard.log.read_text() == "saved before leaving\n"
    assert not rank.supervisor.lives()
    assert yard.living() == set()


def test_rank_that_ignores_sigterm_is_killed_after_the_grace(yard: Any, ready: Ready) -> None:
    rank = yard.launch("ignore_everything")
    ready(rank)
    began = time.monotonic()
    assert rank.end(grace=0.5) == Exit(None, signal.SIGKILL)
    assert time.monotonic() - began >= 0.5
    assert yard.living() == set()


def test_stopped_rank_is_killed(yard: Any, ready: Ready) -> None:
    rank = yard.launch("stop_itself")
    ready(rank)
    eventually(lambda: (stat := read_stat(rank.pid)) and stat.state == "T")
    assert rank.end(grace=0.2) == Exit(None, signal.SIGKILL)
    assert yard.living() == set()


def test_detached_and_stopped_grandchildren_are_killed(yard: Any, ready: Ready) -> None:
    rank = yard.launch("keep_daemons")
    ready(rank)
    tree = tree_of(rank)
    assert len(tree) == 6  # supervisor, rank, and four that the rank started
    assert rank.end(grace=0.2) == Exit(None, signal.SIGKILL, swept=4)
    assert nothing_lives(tree)
    assert yard.living() == set()


def test_what_a_rank_leaves_behind_is_swept_when_it_exits(yard: Any, ready: Ready) -> None:
    rank = yard.launch("leave_daemons")
    ready(rank)
    assert rank.wait(30) == Exit(0, None, swept=4)
    rank.end(grace=0)
    assert yard.living() == set()


def test_processes_that_keep_forking_are_caught(yard: Any, ready: Ready) -> None:
    rank = yard.launch("fork_for_ever")
    ready(rank)
    end = rank.end(grace=0.2)
    assert end.signal == signal.SIGKILL
    assert end.swept >= 2
    assert not end.lost
    assert yard.living() == set()


def test_process_whose_main_thread_ended_counts_as_living(yard: Any, ready: Ready) -> None:
    rank = yard.launch("leave_a_thread_behind")
    ready(rank)
    eventually(lambda: (stat := read_stat(rank.pid)) and stat.state == "Z")
    assert rank.rank.lives()
    assert rank.poll() is None
    assert rank.end(grace=0.2).signal in (signal.SIGTERM, signal.SIGKILL)
    assert not rank.rank.lives()


def test_a_second_order_shortens_the_grace(yard: Any, ready: Ready) -> None:
    rank = yard.launch("ignore_everything")
    ready(rank)
    rank._control.sendall(b"end 60\n")
    assert rank.wait(0.2) is None
    assert rank.end(grace=0) == Exit(None, signal.SIGKILL)


def test_supervisor_ends_its_tree_on_sigterm(yard: Any, ready: Ready) -> None:
    rank = yard.launch("keep_daemons")
    ready(rank)
    os.kill(rank.supervisor.pid, signal.SIGTERM)
    assert rank.wait(30) == Exit(None, signal.SIGKILL, swept=4)
    rank.end(grace=0)
    assert yard.living() == set()


@pytest.mark.chaos
def test_worker_killed(yard: Any) -> None:
    """The process that holds control and channel gets SIGKILL."""
    code = (
        "import json, sys, time\n"
        "from pathlib import Path\n"
        "from workers.launch import launch\n"
        "rank = launch(Path(sys.argv[1]), 'keep_daemons', env={}, log_path=Path(sys.argv[2]),\n"
        "              abandoned_grace=1.0)\n"
        "rank.channel.receive()\n"
        "print(rank.supervisor.pid, flush=True)\n"
        "time.sleep(1000)\n"
    )
    command = [sys.executable, "-c", code, str(yard.socket), str(yard.log)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as worker:
        assert worker.stdout is not None
        supervisor = int(worker.stdout.readline())
        tree = [ProcessId.of(pid) for pid in (supervisor, *descendants(supervisor))]
        assert len(tree) == 6
        worker.kill()
    eventually(lambda: nothing_lives([p for p in tree if p]) and not yard.living())


@pytest.mark.chaos
def test_supervisor_killed(yard: Any, ready: Ready) -> None:
    rank = yard.launch("keep_daemons")
    ready(rank)
    tree = tree_of(rank)
    rank.supervisor.kill()
    end = rank.wait(5)
    assert end == Exit(None, None, lost=True)
    assert rank.end(grace=5) == end
    assert nothing_lives(tree)
    assert yard.living() == set()


@pytest.mark.chaos
def test_supervisor_killed_and_nobody_asks(yard: Any, ready: Ready) -> None:
    """The nursery alone sees to it that the orphans go."""
    rank = yard.launch("keep_daemons")
    ready(rank)
    tree = tree_of(rank)
    rank.supervisor.kill()
    eventually(lambda: nothing_lives(tree))
    eventually(lambda: children(yard.nurseries[0].pid) == [])


@pytest.mark.chaos
def test_supervisor_killed_over_processes_that_keep_forking(yard: Any, ready: Ready) -> None:
    rank = yard.launch("fork_for_ever")
    ready(rank)
    rank.supervisor.kill()
    assert rank.end(grace=1).lost
    assert yard.living() == set()


@pytest.mark.chaos
def test_other_attempts_survive_the_orphans_of_one(yard: Any, ready: Ready) -> None:
    healthy, broken = yard.launch("obey"), yard.launch("keep_daemons")
    ready(healthy)
    ready(broken)
    broken.supervisor.kill()
    assert broken.end(grace=1).lost
    healthy.channel.send(Stop(reason="still there?"))
    assert isinstance(healthy.channel.receive(timeout=30), Notice)
    assert healthy.end(grace=10) == Exit(7, None)


@pytest.mark.chaos
def test_stuck_supervisor_is_done_without(
    yard: Any, ready: Ready, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.launch.MARGIN", 0.5)
    rank = yard.launch("keep_daemons")
    ready(rank)
    tree = tree_of(rank)
    os.kill(rank.supervisor.pid, signal.SIGSTOP)
    assert rank.end(grace=0.2) == Exit(None, None, lost=True)
    assert nothing_lives(tree)
    assert yard.living() == set()


@pytest.mark.chaos
def test_nursery_killed_during_a_run(yard: Any, ready: Ready) -> None:
    rank = yard.launch("obey")
    ready(rank)
    yard.nurseries[0].kill()
    yard.nurseries[0].wait()
    rank.channel.send(Stop(reason="still there?"))
    assert isinstance(rank.channel.receive(timeout=30), Notice)
    assert rank.poll() is None
    # A new nursery takes over the socket, and lets what the old one started alone.
    yard.start()
    assert yard.launch("exit_with_code", CODE="0").wait(20) == Exit(0, None)
    assert rank.end(grace=10) == Exit(7, None)
    assert yard.living() == set()


@pytest.mark.chaos
def test_everything_killed_then_sweep(yard: Any, ready: Ready) -> None:
    rank, other = yard.launch("keep_daemons"), yard.launch("ignore_everything")
    ready(rank)
    ready(other)
    trees = tree_of(rank) + tree_of(other)
    spared = subprocess.Popen(["sleep", "1000"], env={"GPUYARD_TREE": yard.tag + "-another"})
    excluded = subprocess.Popen(["sleep", "1000"], env={"GPUYARD_TREE": yard.tag})
    try:
        # In an order in which no one can clean up: the nursery, then the supervisors.
        for pid in (yard.nurseries[0].pid, rank.supervisor.pid, other.supervisor.pid):
            os.kill(pid, signal.SIGKILL)
        eventually(lambda: not rank.rank.lives() and not other.rank.lives())
        assert len(yard.living()) >= 3 + 1  # daemons that nobody is left to end
        assert sweep(yard.tag, exclude={excluded.pid}) >= 3
        # One daemon cast off its environment with its parents: only a subreaper finds that one.
        assert len([process for process in trees if process.lives()]) <= 1
        assert yard.living() == {excluded.pid}
        assert spared.poll() is None
        assert sweep(yard.tag, exclude={excluded.pid}) == 0
    finally:
        for process in (spared, excluded):
            process.kill()
            process.wait()
        for left in trees:
            left.kill()


@pytest.mark.chaos
def test_sweep_alone_ends_a_running_yard(yard: Any, ready: Ready) -> None:
    rank = yard.launch("keep_daemons")
    ready(rank)
    tree = tree_of(rank)
    assert sweep(yard.tag) >= 1  # the nursery too; some end by themselves, with their parent
    assert nothing_lives(tree)
    assert yard.nurseries[0].wait(5) == -signal.SIGKILL


@pytest.mark.chaos
def test_host_manager_reaps_what_lost_supervisor_and_nursery(empty_yard: Any) -> None:
    """In a process that is a subreaper as the host manager is, with a nursery below it."""
    code = """
import json, os, signal, subprocess, sys, time
from pathlib import Path
from workers.launch import launch
from workers.sweep import children, reap_orphans
from workers.tree import become_subreaper
become_subreaper()
nursery = subprocess.Popen(json.loads(sys.argv[3]))
def start(kind):
    rank = launch(Path(sys.argv[1]), kind, env={}, log_path=Path(sys.argv[2]))
    rank.channel.receive()
    return rank
lost, healthy = start("keep_daemons"), start("obey")
nursery.kill()
nursery.wait()
lost.supervisor.kill()
deadline = time.monotonic() + 30
while lost.rank.lives() or len(children(os.getpid())) < 2:
    assert time.monotonic() < deadline
    time.sleep(0.01)
time.sleep(0.05)
killed = reap_orphans(known=set())
left = children(os.getpid())
assert left == [healthy.supervisor.pid], left
assert healthy.poll() is None
end = healthy.end(grace=10)
while children(os.getpid()):
    assert time.monotonic() < deadline
    reap_orphans(known=set())
print(json.dumps([killed, end.exit_code]))
"""
    arguments = [str(empty_yard.socket), str(empty_yard.log)]
    arguments.append(json.dumps(empty_yard.command("--no-preload")))
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    killed, exit_code = json.loads(done.stdout)
    assert killed >= 4 - 1
    assert exit_code == 7
    assert empty_yard.living() == set()
