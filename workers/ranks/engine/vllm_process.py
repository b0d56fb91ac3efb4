"""A vLLM of an environment of its own, as a process that computes rows of tokens."""

from __future__ import annotations

import itertools
import json
import os
import queue
import subprocess
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from shared.errors import UnsupportedModel

_SERVER = Path(__file__).with_name("vllm_server.py")
_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
_GPU_SHARE = 0.85
"""Of a GPU's memory, for weights and caches."""
_CPU_CACHE_GIB = "4"
"""For caches on a CPU, where the operator has not set VLLM_CPU_KVCACHE_SPACE."""
VLLM_FAILED = "engine_failed"
"""The code of a model that vLLM does not load."""
_OURS = frozenset({"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "LD_PRELOAD"})
"""Variables that are about our interpreter, not about vLLM's."""


class EngineGone(Exception):
    """The process ended by itself."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """What a step of vLLM brought for one row."""

    number: int
    ids: tuple[int, ...]
    logprobs: tuple[tuple[tuple[int, float], ...], ...] | None
    """Of each token: its own, then the likeliest ones; None where they were not asked for."""
    finished: bool
    refused: str | None = None
    """Why vLLM does not compute the row."""


class VllmProcess:
    """Loads a model at construction.

    Raises:
        UnsupportedModel: vLLM does not load the model; says why.
    """

    def __init__(
        self, python: Path, folder: str, dtype: torch.dtype, device: torch.device, context: int
    ) -> None:
        self._process = subprocess.Popen(
            [str(python), str(_SERVER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=_environment(os.environ),
        )
        self.numbers = itertools.count()
        """For rows, each once: tokens of a row that was dropped may come late."""
        self._messages: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        threading.Thread(target=self._read, name="vllm", daemon=True).start()
        load: dict[str, Any] = {
            "model": folder,
            "dtype": _DTYPES[dtype],
            "max_model_len": context,
            "max_logprobs": 21,
        }
        if device.type == "cuda":
            load["gpu_memory_utilization"] = _GPU_SHARE
        try:
            self._send(load)
            answer = self._next(None) or {}
        except EngineGone as error:
            answer = {"failed": str(error)}
        if "failed" in answer:
            self.close()
            raise UnsupportedModel(
                f"vLLM cannot load model '{Path(folder).name}': {str(answer['failed'])[:400]}",
                param="engine",
                hint="Use engine gpuyard. vLLM's own log is in that of the engine.",
                code=VLLM_FAILED,
            )

    def add(self, number: int, tokens: Sequence[int], options: Mapping[str, Any]) -> None:
        """Compute a row, to which its ``number`` alone belongs.

        Raises:
            EngineGone: see there; so do the others.
        """
        self._send({"add": number, "tokens": list(tokens), "options": dict(options)})

    def drop(self, numbers: Sequence[int]) -> None:
        """Compute these rows no further. Tokens of theirs may still be on their way."""
        self._send({"drop": list(numbers)})

    def take(self, seconds: float) -> list[Tokens]:
        """What came since the last call; waits up to so long for the first of it."""
        found: list[Tokens] = []
        message = self._next(seconds)
        while message is not None:
            found += _tokens(message)
            message = self._next(0)
        return found

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()

    def _send(self, message: dict[str, Any]) -> None:
        assert self._process.stdin is not None  # noqa: S101
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        except OSError:
            raise self._end() from None

    def _next(self, seconds: float | None) -> dict[str, Any] | None:
        try:
            message = (
                self._messages.get_nowait() if seconds == 0 else self._messages.get(timeout=seconds)
            )
        except queue.Empty:
            return None
        if message is None:
            raise self._end()
        return message

    def _read(self) -> None:
        assert self._process.stdout is not None  # noqa: S101
        for line in self._process.stdout:
            self._messages.put(json.loads(line))
        self._messages.put(None)

    def _end(self) -> EngineGone:
        return EngineGone(f"vLLM ended by itself (exit status {self._process.wait()})")


def _environment(ours: Mapping[str, str]) -> dict[str, str]:
    theirs = {name: value for name, value in ours.items() if name not in _OURS}
    theirs.setdefault("VLLM_CPU_KVCACHE_SPACE", _CPU_CACHE_GIB)
    return theirs


def _tokens(message: dict[str, Any]) -> list[Tokens]:
    if "refused" in message:
        return [Tokens(message["refused"], (), None, finished=True, refused=str(message["why"]))]
    return [
        Tokens(
            number,
            tuple(ids),
            None if told is None else tuple(tuple((t, p) for t, p in each) for each in told),
            finished,
        )
        for number, ids, told, finished in message["rows"]
    ]
