"""What the ranks of these tests do: each function is an entry of the nursery under its own name.

A rank says that it is set up with a notice, so that no test has to guess when to strike.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, NoReturn

from shared.messages import Notice, Stop
from workers.channel import Channel, ChannelClosed


def exit_with_code(channel: Channel[Any]) -> int:
    return int(os.environ["CODE"])


def leave_by_sys_exit(channel: Channel[Any]) -> None:
    sys.exit("no such thing")


def raise_error(channel: Channel[Any]) -> None:
    raise ValueError("the loss went away")


def die_by_signal(channel: Channel[Any]) -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def report(channel: Channel[Any]) -> None:
    """Speak on every way out; what this process looks like from within goes over the channel."""
    print("to stdout")
    print("to stderr", file=sys.stderr)
    subprocess.run(["/bin/sh", "-c", "echo from a child"], check=True)
    torch = sys.modules.get("torch")
    facts = {
        "at": time.monotonic(),
        "env": dict(os.environ),
        "fds": _open_files(),
        "session_leader": os.getsid(0) == os.getpid(),
        "blocked_signals": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
        "sigterm_default": signal.getsignal(signal.SIGTERM) is signal.SIG_DFL,
        "threads": len(list(Path("/proc/self/task").iterdir())),
        "torch": torch is not None,
        "cuda_initialised": bool(torch and torch.cuda.is_initialized()),
        "stdin": os.read(0, 10).decode(),
    }
    _ready(channel, **facts)


def list_new_imports(channel: Channel[Any]) -> None:
    """What a small training step and a small generation import beyond what was preloaded."""
    before = set(sys.modules)
    import torch
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        BertConfig,
        LlamaConfig,
    )

    sizes: dict[str, Any] = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    bert = AutoModelForSequenceClassification.from_config(  # type: ignore[no-untyped-call]
        BertConfig(vocab_size=20, intermediate_size=8, **sizes)
    )
    optimizer = torch.optim.AdamW(bert.parameters())
    ids = torch.tensor([[1, 2, 3]])
    bert(input_ids=ids, labels=torch.tensor([0])).loss.backward()
    optimizer.step()
    llama = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
        LlamaConfig(vocab_size=20, intermediate_size=8, num_key_value_heads=2, **sizes)
    )
    llama.generate(ids, max_new_tokens=2, pad_token_id=0)
    _ready(channel, new=sorted(set(sys.modules) - before))


def obey(channel: Channel[Any]) -> int:
    """Wait for orders; SIGTERM ends it in good order, with 7."""

    def leave(*_: object) -> NoReturn:
        print("saved before leaving", flush=True)
        os._exit(7)

    signal.signal(signal.SIGTERM, leave)
    _ready(channel)
    while True:
        if isinstance(order := channel.receive(), Stop):
            channel.send(Notice(code="echo", message=order.reason))


def ignore_everything(channel: Channel[Any]) -> None:
    """Ignore SIGTERM and the end of the channel."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    _ready(channel)
    _sleep_for_ever()


def stop_itself(channel: Channel[Any]) -> None:
    _ready(channel)
    os.kill(os.getpid(), signal.SIGSTOP)


def leave_daemons(channel: Channel[Any]) -> int:
    """Return at once, with grandchildren left that detached themselves in every way."""
    _start_daemons()
    _ready(channel)
    return 0


def keep_daemons(channel: Channel[Any]) -> None:
    """Stay, deaf, with such grandchildren."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    _start_daemons()
    _ready(channel)
    _sleep_for_ever()


def fork_for_ever(channel: Channel[Any]) -> None:
    """Processes that fork and exit without end, each in a session of its own, and one that keeps
    starting children in its own group."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    for _ in range(2):
        if os.fork() == 0:
            while True:
                if os.fork():
                    os._exit(0)
                os.setsid()
    if os.fork() == 0:
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        while True:
            if os.fork() == 0:
                time.sleep(0.05)
                os._exit(0)
            time.sleep(0.002)
    _ready(channel)
    _sleep_for_ever()


def leave_a_thread_behind(channel: Channel[Any]) -> None:
    """End the main thread only: the process is shown as a zombie and still runs."""
    threading.Thread(target=_sleep_for_ever).start()
    _ready(channel)
    ctypes.CDLL(None).syscall(60 if os.uname().machine == "x86_64" else 93, 0)


def _start_daemons() -> None:
    # A plain child; one with its own session whose parent is gone; one that also runs another
    # program, with an empty environment; and one that is stopped.
    subprocess.Popen(["sleep", "1000"])
    _detach(_sleep_for_ever)
    _detach(lambda: os.execve("/bin/sleep", ["sleep", "1000"], {}))  # noqa: S606
    _detach(lambda: os.kill(os.getpid(), signal.SIGSTOP))


def _detach(run: Any) -> None:
    middle = os.fork()
    if middle == 0:
        os.setsid()
        if os.fork() == 0:
            for number in (signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)
            run()
            _sleep_for_ever()
        os._exit(0)
    os.waitpid(middle, 0)


def _ready(channel: Channel[Any], **data: Any) -> None:
    try:
        channel.send(Notice(code="ready", message="set up", data=data))
    except ChannelClosed:
        print("nobody listens")


def _open_files() -> list[str]:
    fds = list(Path("/proc/self/fd").iterdir())  # the one for this listing itself is gone by now
    return sorted(str(fd.readlink()) for fd in fds if fd.is_symlink())


def _sleep_for_ever() -> NoReturn:
    while True:
        time.sleep(1000)
