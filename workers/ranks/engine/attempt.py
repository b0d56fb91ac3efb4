"""One attempt at an inference job inside the engine: shards in, results of whole shards out."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from shared.errors import DataError, UnsupportedModel
from shared.messages import InferAssignment, Progress, Shard, ShardComputed, mark
from shared.rows import read_lines, row_error
from shared.specs import GENERATIVE
from workers.ranks.engine.costs import Costs
from workers.ranks.engine.device import peak_bytes, reset_peak
from workers.ranks.engine.inputs import Request, RowProblem, read_request
from workers.ranks.engine.pace import Pace
from workers.ranks.engine.sharing import Shared
from workers.ranks.engine.tasks import choose_encoder

OPENED_PER_STEP = 16
"""Shards opened between two looks at the channel, at most: they may be small, or all errors."""


@dataclass(slots=True)
class OpenShard:
    """A shard with rows in computation."""

    shard: Shard
    opened_at: float
    results: dict[int, dict[str, Any]] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        return len(self.results) == self.shard.rows


class Attempt:
    """The rows of one attempt on their way through a computation, which others may share.

    Shards are opened in the order of the orders, each as soon as the computation wants rows: rows of
    several shards share forward passes, so that no slot idles at a shard's end.
    """

    def __init__(self, assignment: InferAssignment, shared: Shared, warm: bool) -> None:
        self.id = assignment.attempt_id
        self.pace = Pace()
        self.shared = shared
        self._assignment = assignment
        self._loaded = shared.loaded
        self._warm = warm
        self._encoder = choose_encoder(assignment, shared.loaded)
        self._ordered: deque[Shard] = deque()
        self._open: dict[int, OpenShard] = {}
        self._known_rows = 0
        self._known_shards = 0
        self._reported_shards = 0
        self._errors = 0
        self._input_tokens = 0
        self._output_tokens = 0
        self._busy_seconds = 0.0
        self._costs = Costs()
        writes = assignment.spec.task in GENERATIVE
        self._counted = "output_tokens" if writes else "input_tokens"
        """The tokens of a row that its steps count."""
        reset_peak(self._loaded.key.device)

    @property
    def busy(self) -> bool:
        """Something is left to compute of what was ordered."""
        return bool(self._ordered or self._open)

    def order(self, shards: tuple[Shard, ...]) -> None:
        self._ordered.extend(shards)
        self._known_rows += sum(shard.rows for shard in shards)
        self._known_shards += len(shards)

    def feed(self) -> list[ShardComputed]:
        """Give the computation the rows that it wants; the shards that need none of it.

        Raises:
            DataError: the input file is gone, or is no longer the one that was submitted.
        """
        started = time.monotonic()
        reports: list[ShardComputed] = []
        for _ in range(OPENED_PER_STEP):
            if not self._ordered or not self.shared.computation.wants_rows(self.id):
                break
            reports += self._open_shard(self._ordered.popleft())
        self._busy_seconds += time.monotonic() - started
        return reports

    def take(
        self, results: list[dict[str, Any]], tokens: int, seconds: float
    ) -> list[ShardComputed]:
        """What a step of the computation brought for this attempt, with its share of the time; the
        shards that were completed by it."""
        self.pace.count(0, tokens)
        self._busy_seconds += seconds
        self._costs.spend(tokens, seconds)
        for result in results:
            used = result["usage"]
            used["device_seconds"] = round(self._costs.charge(used[self._counted]), 6)
        return self._record(results)

    def progress(self) -> Progress:
        return self.pace.report(self.id, self._known_rows)

    def summary(self, stopped: bool) -> dict[str, Any]:
        """What the attempt amounted to, for ``Done``."""
        return {
            "stopped": stopped,
            "load_seconds": 0.0 if self._warm else round(self._loaded.seconds, 3),
            "warm": self._warm,
            "engine": self._loaded.key.engine,
            "precision": precision_of(self._loaded.key.dtype),
            "rows": self.pace.rows,
            "errors": self._errors,
            "shards": self._reported_shards,
            "input_tokens": self._input_tokens,
            "output_tokens": self._output_tokens,
            "compute_seconds": round(self._busy_seconds, 3),
            "peak_memory_bytes": peak_bytes(self._loaded.key.device),
        }

    def _open_shard(self, shard: Shard) -> list[ShardComputed]:
        path = Path(self._assignment.input_path)
        self._open[shard.index] = OpenShard(shard, time.monotonic())
        try:
            lines = read_lines(path, shard)
        except OSError as error:
            raise DataError(
                f"the input file '{path.name}' cannot be read any more: {error.strerror}",
                param="input",
            ) from None
        except ValueError as error:
            raise DataError(
                str(error), param="input", code="input_changed", hint="Submit the job again."
            ) from None
        requests: list[Request] = []
        errors: list[dict[str, Any]] = []
        for row, line in lines:
            try:
                requests.append(read_request(row, line, self._assignment.spec))
            except RowProblem as problem:
                errors.append(row_error(row, problem.code, problem.message, id=problem.id))
        prompts, refused = self._encoder.encode(requests)
        self.shared.computation.add([replace(prompt, owner=self.id) for prompt in prompts])
        return self._record(errors + refused)

    def _record(self, results: list[dict[str, Any]]) -> list[ShardComputed]:
        """File results under their shards; the shards that are complete now."""
        for result in results:
            self._errors += result["error"] is not None
            self._input_tokens += result["usage"]["input_tokens"]
            self._output_tokens += result["usage"]["output_tokens"]
            self._shard_of(result["row"]).results[result["row"]] = result
        self.pace.count(len(results), 0)
        complete = [shard for shard in self._open.values() if shard.complete]
        return [self._close_shard(shard) for shard in complete]

    def _shard_of(self, row: int) -> OpenShard:
        for open_shard in self._open.values():
            first = open_shard.shard.first_row
            if first <= row < first + open_shard.shard.rows:
                return open_shard
        raise AssertionError(f"row {row} is of no open shard")

    def _close_shard(self, done: OpenShard) -> ShardComputed:
        del self._open[done.shard.index]
        self._reported_shards += 1
        results = tuple(done.results[row] for row in sorted(done.results))
        seconds = time.monotonic() - done.opened_at
        bad = sum(result["error"] is not None for result in results)
        rows_per_second, tokens_per_second = self.pace.rates()
        print(
            f"{mark(self.id)}shard {done.shard.index} done ({self._reported_shards} of {self._known_shards} ordered): "
            f"{len(results)} rows{f', {bad} with errors' if bad else ''} in {seconds:.1f} s; "
            f"now {rows_per_second:.1f} rows/s, {tokens_per_second:.0f} tokens/s",
            flush=True,
        )
        return ShardComputed(
            attempt_id=self.id, index=done.shard.index, results=results, seconds=seconds
        )


def precision_of(dtype: torch.dtype) -> str:
    """As a spec names it."""
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.int8: "int8"}[dtype]


def compute_dtype(assignment: InferAssignment) -> torch.dtype:
    """The precision asked for; ``auto`` is bf16 where the device has it.

    Raises:
        UnsupportedModel: int8, on a device that is no CPU.
    """
    precision = assignment.spec.precision
    if precision == "int8":
        if assignment.device.kind != "cpu":
            raise UnsupportedModel(
                f"precision int8 is for CPUs, and device '{assignment.device.id}' is none",
                param="precision",
                hint="Use precision bf16, or resources.accelerator cpu.",
                code="unsupported_precision",
            )
        return torch.int8
    if precision == "bf16" or (precision == "auto" and assignment.device.bf16):
        return torch.bfloat16
    return torch.float32
