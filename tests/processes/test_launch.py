"""Launching a rank: what it gets, what is reported of its end, and what is refused."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shared.messages import Notice, Stop
from tests.stack import eventually
from workers.launch import Exit, LaunchFailed, RankProcess, launch
from workers.sweep import children, read_stat


@pytest.mark.parametrize("code", [0, 3, 255])
def test_exit_code_is_reported(yard: Any, code: int) -> None:
    rank = yard.launch("exit_with_code", CODE=str(code))
    assert rank.wait(30) == Exit(code, None)
    assert rank.poll() == rank.end(grace=5) == Exit(code, None)


def test_signal_is_reported(yard: Any) -> None:
    assert yard.launch("die_by_signal").wait(30) == Exit(None, signal.SIGSEGV)


def test_exception_becomes_exit_1_and_a_traceback_in_the_log(yard: Any) -> None:
    assert yard.launch("raise_error").wait(30) == Exit(1, None)
    log = yard.log.read_text()
    assert "ValueError: the loss went away" in log
    assert "entries.py" in log


def test_sys_exit_with_a_message(yard: Any) -> None:
    assert yard.launch("leave_by_sys_exit").wait(30) == Exit(1, None)
    assert yard.log.read_text() == "no such thing\n"


def test_rank_gets_env_log_and_clean_process(
    yard: Any, ready: Callable[[RankProcess], dict[str, Any]]
) -> None:
    yard.log.write_text("from before\n")
    rank = yard.launch("report", CUDA_VISIBLE_DEVICES="GPU-1234", HELLO="wörld")
    facts = ready(rank)
    assert rank.wait(30) == Exit(0, None)
    lines = ["from before", "to stdout", "to stderr", "from a child"]
    assert yard.log.read_text().splitlines() == lines
    assert facts["env"]["CUDA_VISIBLE_DEVICES"] == "GPU-1234"
    assert facts["env"]["HELLO"] == "wörld"
    assert facts["env"]["GPUYARD_TREE"] == yard.tag
    assert facts["session_leader"]
    assert facts["sigterm_default"]
    assert facts["blocked_signals"] == []
    assert facts["threads"] == 1
    assert facts["stdin"] == ""
    # Its own log twice, /dev/null and the channel: nothing of the nursery or the supervisor.
    assert [fd for fd in facts["fds"] if not fd.startswith("socket:")] == [
        "/dev/null",
        str(yard.log),
        str(yard.log),
    ]
    assert len(facts["fds"]) == 4


def test_channel_speaks_both_ways(
    yard: Any, ready: Callable[[RankProcess], dict[str, Any]]
) -> None:
    with yard.launch("obey") as rank:
        ready(rank)
        rank.channel.send(Stop(reason="hello"))
        echo = rank.channel.receive(timeout=30)
        assert isinstance(echo, Notice)
        assert echo.message == "hello"
        assert rank.poll() is None


def test_launch_waits_for_the_nursery(empty_yard: Any) -> None:
    found: list[Exit | None] = []

    def run() -> None:
        found.append(empty_yard.launch("exit_with_code", CODE="4").wait(30))

    thread = threading.Thread(target=run)
    thread.start()
    empty_yard.start()
    thread.join(30)
    assert found == [Exit(4, None)]


def test_without_nursery_launch_says_so(empty_yard: Any) -> None:
    with pytest.raises(LaunchFailed, match=r"within 0\.3 s.*nursery\.sock") as caught:
        empty_yard.launch("exit_with_code", timeout=0.3)
    assert caught.value.hint


def test_kinds_that_are_not_allowed_are_refused(yard: Any) -> None:
    with pytest.raises(LaunchFailed, match="kind 'os:system' is none of train, engine"):
        yard.launch("os:system")
    assert yard.launch("exit_with_code", CODE="0").wait(30) == Exit(0, None)


def test_log_that_cannot_be_written_is_named(yard: Any, tmp_path: Path) -> None:
    log = tmp_path / "missing" / "rank.log"
    with pytest.raises(LaunchFailed, match=f"cannot write the log {log}: No such file"):
        launch(yard.socket, "exit_with_code", env={}, log_path=log, timeout=10)


def test_socket_path_longer_than_unix_allows(empty_yard: Any) -> None:
    empty_yard.socket = empty_yard.folder / ("x" * 120) / "nursery.sock"
    empty_yard.start()
    assert empty_yard.launch("exit_with_code", CODE="2").wait(30) == Exit(2, None)


def test_socket_is_for_its_owner_only(yard: Any) -> None:
    eventually(yard.socket.exists)
    assert yard.socket.stat().st_mode & 0o777 == 0o600


def test_many_launches_leak_neither_fds_nor_zombies(yard: Any) -> None:
    assert yard.launch("exit_with_code", CODE="0").wait(30)  # the nursery is up from here on
    nursery = yard.nurseries[0].pid
    yard.ranks.pop().close()
    eventually(lambda: children(nursery) == [])

    def fds() -> tuple[int, int]:
        mine, theirs = Path("/proc/self/fd"), Path(f"/proc/{nursery}/fd")
        return len(list(mine.iterdir())), len(list(theirs.iterdir()))

    before = fds()
    for number in range(50):
        rank = yard.launch("exit_with_code", CODE=str(number))
        assert rank.end(grace=10).lost is False
        rank.close()
    yard.ranks.clear()
    # Fewer is fine: the nursery may not have closed the first connection when it was counted.
    eventually(
        lambda: children(nursery) == [] and all(a <= b for a, b in zip(fds(), before, strict=True))
    )
    assert yard.living() == set()


def test_launches_at_the_same_time(yard: Any) -> None:
    ends: dict[int, Exit | None] = {}

    def run(code: int) -> None:
        ends[code] = yard.launch("exit_with_code", CODE=str(code)).wait(20)

    threads = [threading.Thread(target=run, args=(code,)) for code in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert ends == {code: Exit(code, None) for code in range(8)}


def test_nursery_ends_with_its_parent(empty_yard: Any) -> None:
    """In a process between, which is killed."""
    middle = os.fork()
    if middle == 0:
        os.chdir(Path(__file__).parents[2])
        command = empty_yard.command("--no-preload", "--parent", str(os.getpid()))
        os.spawnv(os.P_WAIT, command[0], command)  # noqa: S606
        os._exit(0)
    eventually(empty_yard.socket.exists)
    (nursery,) = children(middle)
    os.kill(middle, signal.SIGKILL)
    os.waitpid(middle, 0)
    eventually(lambda: (stat := read_stat(nursery)) is None or not stat.lives)
