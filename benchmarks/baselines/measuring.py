"""What every baseline does alike. Standard library alone: it runs in the engine's own environment."""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Answers = list[list[int]]
"""Generated tokens of each request, in the order of the requests."""


@dataclass(frozen=True)
class Load:
    """The requests. All engines get the same end tokens and the same limit, and no other rule: the prompts
    are such that no answer is shorter than ``least`` by itself."""

    model: str
    """Folder, as ``from_pretrained`` takes it."""
    texts: list[str]
    ids: list[list[int]]
    pieces: list[list[str]]
    """The tokens' names."""
    end_tokens: list[int]
    least: int
    most: int
    """New tokens of a request."""

    def first(self, count: int) -> Load:
        cut = {name: getattr(self, name)[:count] for name in ("texts", "ids", "pieces")}
        return Load(**{**self.__dict__, **cut})


Compute = Callable[[Load], Answers]


def measure(doc: str, prepare: Callable[[Load, argparse.Namespace], Compute]) -> None:
    """The process of a baseline: load, warm up, compute all, and tell.

    Args:
        prepare: loads the engine, which is not counted. What it returns takes texts, or token ids where the
            engine takes no text, and gives the tokens.
    """
    parser = argparse.ArgumentParser(description=doc)
    parser.add_argument("--load", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--how", default="", help="of the ways of this engine, which")
    args = parser.parse_args()
    load = Load(**json.loads(args.load.read_text()))
    compute = prepare(load, args)
    compute(load.first(2))
    wall, cpu = time.perf_counter(), cpu_seconds()
    answers = compute(load)
    wall, cpu = time.perf_counter() - wall, cpu_seconds() - cpu
    answers = [up_to_end(answer, load.end_tokens) for answer in answers]
    told: dict[str, Any] = {"seconds": wall, "cpu_seconds": cpu, "answers": answers}
    args.out.write_text(json.dumps(told))


def up_to_end(tokens: list[int], ends: list[int]) -> list[int]:
    """An answer with the end token that it has, and nothing behind it."""
    known = set(ends)
    for place, token in enumerate(tokens):
        if token in known:
            return tokens[: place + 1]
    return tokens


def cpu_seconds() -> float:
    """Of this process and of the children that it has waited for."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime
