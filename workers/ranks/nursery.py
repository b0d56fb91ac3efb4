"""The nursery: a pre-imported parent from which attempts are forked, one per host.

``python -m workers.ranks.nursery --socket PATH --tag TAG``. Imports what ranks need once (seconds),
then forks a supervised rank in milliseconds. Three rules make forking safe, and are checked before
it serves: it has one thread, it never made a CUDA call, and its environment kept the libraries from
starting thread pools.

It listens on a Unix socket (SOCK_SEQPACKET: one request or answer a packet, JSON) and answers

- ``{"kind", "env", "log_path", "abandoned_grace"}`` with two sockets attached, *control* and
  *channel*: forks the attempt's supervisor, which speaks on *control* from then on
  (``workers/tree.py``); ``{"supervisor": pid}``, or ``{"error": why}``.
- ``{"settle": true}``: ends what lost its supervisor; ``{"orphans": how many still live}``.

It is a subreaper: the processes of a supervisor that was killed become its children, and it ends
them at once. When the nursery itself is killed, running attempts go on without it.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import importlib
import json
import os
import selectors
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, cast

from workers.sweep import TREE_VARIABLE, orphans, reap_orphans
from workers.tree import (
    HELD_SIGNALS,
    AttemptRequest,
    SignalWatch,
    become_subreaper,
    die_with_parent,
    run_attempt,
    set_process_name,
    unix_address,
)

ENTRIES: Mapping[str, str] = {
    "train": "workers.ranks.train:main",
    "engine": "workers.ranks.engine:main",
    "measure": "workers.ranks.footprint:main",
}
"""What may be run: ``module:function``, called with the rank's ``Channel``."""

PRELOAD = (
    "numpy",
    "torch",
    "torch.distributed",
    "torch.nn.parallel",
    "torch.optim",
    "torch.utils.data",
    "safetensors.torch",
    "transformers",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.bert.modeling_bert",
    "transformers.models.bert.tokenization_bert",
    "transformers.models.llama.modeling_llama",
    "workers.channel",
)

ENVIRONMENT = {
    # Thread pools are sized when a library loads; ranks set their own number of threads later.
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # Lets torch.cuda.is_available() ask NVML: asking CUDA would break it in every forked rank.
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
}

_MAX_PACKET = 1 << 20
_RETRY_SECONDS = 1.0


def main(argv: Sequence[str] | None = None) -> None:
    """Preload, check, serve until SIGTERM."""
    options = _parse(argv)
    _require_environment({**ENVIRONMENT, TREE_VARIABLE: options.tag})
    if options.parent is not None:
        die_with_parent(options.parent, signal.SIGTERM)
    set_process_name("gpuyard-nursery")
    become_subreaper()
    began = time.monotonic()
    if options.preload:
        preload(options.entries.values())
    problem = why_not_forkable()
    if problem is not None:
        sys.exit(f"nursery: cannot fork ranks safely: {problem}")
    # Keeps the collector from touching, and so copying, the pages that forks share.
    gc.collect()
    gc.freeze()
    with Nursery(options.socket, options.entries) as nursery:
        print(f"nursery: ready after {time.monotonic() - began:.1f} s", file=sys.stderr, flush=True)
        nursery.serve()


def preload(entries: Iterable[str]) -> None:
    """Import what ranks need. An entry module that this installation does not have is skipped."""
    for name in PRELOAD:
        importlib.import_module(name)
    for entry in entries:
        module = entry.partition(":")[0]
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name != module:
                raise


def why_not_forkable() -> str | None:
    """What would make a fork of this process unsound; None when nothing does."""
    if (
        threads := len(list(Path("/proc/self/task").iterdir()))
    ) != 1 or threading.active_count() != 1:
        return f"{threads} threads run, and a fork would copy the locks they hold"
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return "CUDA is initialised, and works in no forked process after that"
    # Also seen when a library asked the driver behind torch's back: cuInit opens this device.
    for fd in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            if fd.readlink() == Path("/dev/nvidia-uvm"):
                return "the CUDA driver is initialised, and works in no forked process after that"
    return None


class Nursery:
    """The server. Single-threaded; every request is answered at once."""

    def __init__(self, path: Path, entries: Mapping[str, str]) -> None:
        self._entries = entries
        self._supervisors: set[int] = set()
        self._watch = SignalWatch(*HELD_SIGNALS)
        self._listener = _listen(path)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(self._watch, selectors.EVENT_READ)

    def serve(self) -> None:
        """Until SIGTERM or SIGINT. Running attempts go on."""
        orphans_left = False
        while True:
            for key, _ in self._selector.select(_RETRY_SECONDS if orphans_left else None):
                if key.fileobj is self._listener:
                    connection, _ = self._listener.accept()
                    self._selector.register(connection, selectors.EVENT_READ)
                elif key.fileobj is self._watch:
                    if self._watch.take() & {signal.SIGTERM, signal.SIGINT}:
                        return
                else:
                    self._answer(cast(socket.socket, key.fileobj))
            # Every time, as SIGCHLD is what brought us here most often. The kernel hands over the
            # orphans of a supervisor before it signals the supervisor's death.
            orphans_left = self._settle() > 0

    def _answer(self, connection: socket.socket) -> None:
        fds: list[int] = []
        try:
            data, fds, _, _ = socket.recv_fds(connection, _MAX_PACKET, 2)
            if not data:
                self._selector.unregister(connection)
                connection.close()
                return
            request = json.loads(data)
            answer: dict[str, int | str]
            if "settle" in request:
                answer = {"orphans": self._settle()}
            else:
                answer = {"supervisor": self._fork_attempt(request, fds)}
        except (KeyError, TypeError, ValueError, OSError) as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        finally:
            for fd in fds:
                os.close(fd)
        # Never wait for a client: one that does not read misses its answer.
        with contextlib.suppress(OSError):
            connection.send(json.dumps(answer).encode(), socket.MSG_DONTWAIT)

    def _fork_attempt(self, request: dict[str, Any], fds: Sequence[int]) -> int:
        """Raises: ValueError: what is wrong with the request."""
        if (kind := request["kind"]) not in self._entries:
            raise ValueError(f"kind {kind!r} is none of {', '.join(self._entries)}")
        if len(fds) != 2:
            raise ValueError(f"{len(fds)} sockets came with the request, not control and channel")
        attempt = AttemptRequest(
            rank_main=functools.partial(_run_entry, self._entries[kind], dict(request["env"])),
            log_path=Path(request["log_path"]),
            abandoned_grace=float(request["abandoned_grace"]),
        )
        sys.stdout.flush()
        sys.stderr.flush()
        # A signal that arrives between the fork and the child's own handlers would be lost.
        signal.pthread_sigmask(signal.SIG_BLOCK, HELD_SIGNALS)
        try:
            pid = os.fork()
            if pid == 0:
                self._be_supervisor(attempt, fds)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD_SIGNALS)
        self._supervisors.add(pid)
        return pid

    def _be_supervisor(self, attempt: AttemptRequest, fds: Sequence[int]) -> NoReturn:
        """In the fork: keep the two sockets, drop what is the nursery's."""
        try:
            control, channel = (socket.socket(fileno=os.dup(fd)) for fd in fds)
            for fd in fds:
                os.close(fd)
            self.close()
            run_attempt(attempt, control=control, channel=channel)
        finally:
            os._exit(1)  # whatever was raised, there is one server only

    def _settle(self) -> int:
        """Wait for dead supervisors and end their orphans; how many orphans still live."""
        for pid in list(self._supervisors):
            if os.waitpid(pid, os.WNOHANG)[0]:
                self._supervisors.discard(pid)
        reap_orphans(self._supervisors, limit=2.0)
        return len(orphans(self._supervisors))

    def close(self) -> None:
        """Also called in every fork: no attempt keeps the nursery's sockets."""
        for key in list(self._selector.get_map().values()):
            if key.fileobj is not self._watch:
                cast(socket.socket, key.fileobj).close()
        self._selector.close()
        self._watch.close()

    def __enter__(self) -> Nursery:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _run_entry(entry: str, env: Mapping[str, str], sock: socket.socket) -> int | None:
    """In the rank: the environment first, since CUDA reads it once."""
    os.environ.update(env)
    # Imported here: they are preloaded, and a nursery without preloading should start at once.
    from shared.messages import ToRank
    from workers.channel import Channel

    module, _, function = entry.partition(":")
    run: Callable[[Any], int | None] = getattr(importlib.import_module(module), function)
    return run(Channel(sock, ToRank))


def _listen(path: Path) -> socket.socket:
    """Take the place of an earlier nursery that was killed; the host manager runs one at a time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    before = os.umask(0o177)  # who can connect can run code as this user
    try:
        with unix_address(path) as address:
            listener.bind(address)
    finally:
        os.umask(before)
    listener.listen(64)
    return listener


def _require_environment(wanted: Mapping[str, str]) -> None:
    """Start over with these variables set, unless they are.

    ``/proc/PID/environ``, where ``sweep`` looks for the tag, shows what a process was *started*
    with; and thread pools must not exist before their variables do.
    """
    if any(os.environ.get(name) != value for name, value in wanted.items()):
        os.execve(sys.executable, sys.orig_argv, {**os.environ, **wanted})  # noqa: S606 - ourselves


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("workers.ranks.nursery", description=__doc__)
    parser.add_argument("--socket", type=Path, required=True, help="where to listen")
    parser.add_argument("--tag", required=True, help=f"value of {TREE_VARIABLE} for all forks")
    parser.add_argument(
        "--entry",
        action="append",
        default=[],
        metavar="NAME=MODULE:FUNCTION",
        help="one more thing that may be run",
    )
    parser.add_argument("--no-preload", dest="preload", action="store_false")
    parser.add_argument(
        "--parent",
        type=int,
        metavar="PID",
        help="end with this process, whose main thread started this one",
    )
    options = parser.parse_args(argv)
    options.entries = {**ENTRIES, **dict(entry.split("=", 1) for entry in options.entry)}
    return options


if __name__ == "__main__":
    main()
