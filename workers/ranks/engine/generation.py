"""Text generation by continuous batching: the scheduler of rows over a model runner.

A step admits waiting rows into free slots (their prompts are computed together), then decodes one
token for every active row. A finished row leaves at once and the last active row moves into the
hole, so that the active rows are always those of slots ``0 .. n-1``.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from shared.rows import result, row_error
from shared.specs import Generation
from workers.ranks.engine.computation import Step
from workers.ranks.engine.device import is_out_of_memory, release_unused
from workers.ranks.engine.models import LoadedModel
from workers.ranks.engine.prompts import Prompt
from workers.ranks.engine.runners import Runner
from workers.ranks.engine.sampling import next_tokens
from workers.ranks.engine.text import Detokenizer

PREFILL_TOKENS = {"cpu": 1024, "cuda": 16_384}
"""Padded prompt tokens computed in one pass: bounds both memory and how long a step takes."""


@dataclass(slots=True, eq=False)
class ActiveRow:
    """A row on its way: its prompt, and what was generated so far."""

    prompt: Prompt
    generated: list[int] = field(default_factory=list)

    @property
    def tokens(self) -> list[int]:
        return [*self.prompt.ids, *self.generated]

    @property
    def position(self) -> int:
        """Where the newest token will be written; as many tokens are in the cache."""
        return len(self.prompt.ids) + len(self.generated) - 1


class TextGeneration:
    """See :class:`workers.ranks.engine.computation.Computation`.

    Args:
        cache_bytes: what the rows' caches may take together. A row alone is always tried.
    """

    def __init__(
        self, loaded: LoadedModel, runner: Runner, sampling: Generation, cache_bytes: int
    ) -> None:
        self._runner = runner
        self._sampling = sampling
        self._cache_bytes = cache_bytes
        self._device = loaded.key.device
        self._prefill_tokens = PREFILL_TOKENS[self._device.type]
        self._end_tokens = end_tokens(loaded)
        self._detokenizer = Detokenizer(loaded.tokenizer, sampling.stop)
        self._waiting: deque[ActiveRow] = deque()
        self._active: list[ActiveRow] = []
        self._max_rows = runner.slots
        # Kept across a step that runs out of memory after some of its rows were finished.
        self._finished: list[dict[str, Any]] = []

    @property
    def busy(self) -> bool:
        return bool(self._waiting or self._active)

    @property
    def wants_rows(self) -> bool:
        return len(self._waiting) < self._runner.slots

    def add(self, prompts: Sequence[Prompt]) -> None:
        # Rows of similar length together: less padding in prefill, less masked memory in decode.
        ordered = sorted(prompts, key=lambda prompt: (-len(prompt.ids), prompt.row))
        self._waiting.extend(ActiveRow(prompt) for prompt in ordered)

    def step(self) -> Step:
        """Admit rows, then generate one token for each active row."""
        tokens = 0
        out_of_memory = False
        try:
            tokens = self._step()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            out_of_memory = True
        if out_of_memory:
            # Here the failed pass's tensors are gone: inside `except` the traceback holds them.
            self._start_over()
        results, self._finished = self._finished, []
        return Step(results, tokens)

    @torch.inference_mode()
    def _step(self) -> int:
        """The number of tokens generated."""
        tokens = 0
        if admitted := self._admit():
            first = len(self._active)
            self._active += admitted
            self._runner.reserve(max(self._reach(row) for row in self._active))
            logits = self._runner.prefill(first, [row.tokens for row in admitted])
            tokens += len(admitted)
            self._accept(first, logits)
        if self._active:
            tokens += len(self._active)
            logits = self._runner.decode(
                [row.generated[-1] for row in self._active], [row.position for row in self._active]
            )
            self._accept(0, logits)
        return tokens

    def _admit(self) -> list[ActiveRow]:
        """Take rows off the queue, in order, while slots, memory and the prefill budget last."""
        admitted: list[ActiveRow] = []
        width = 0
        reach = max((self._reach(row) for row in self._active), default=0)
        while self._waiting and len(self._active) + len(admitted) < self._max_rows:
            row = self._waiting[0]
            rows = len(self._active) + len(admitted) + 1
            reach = max(reach, self._reach(row))
            width = max(width, len(row.tokens))
            if rows > 1 and rows * reach * self._runner.bytes_per_position > self._cache_bytes:
                break
            if admitted and width * (len(admitted) + 1) > self._prefill_tokens:
                break
            admitted.append(self._waiting.popleft())
        return admitted

    def _reach(self, row: ActiveRow) -> int:
        """Tokens that the row has at the very most when it is finished."""
        return len(row.prompt.ids) + self._sampling.max_new_tokens

    def _accept(self, first: int, logits: torch.Tensor) -> None:
        """Choose a token for each active row from ``first`` on, and let the finished ones go."""
        rows = self._active[first:]
        chosen = next_tokens(
            logits, self._sampling, [(row.prompt.row, len(row.generated)) for row in rows]
        )
        finished: set[int] = set()
        for slot, (row, token) in enumerate(zip(rows, chosen, strict=True), start=first):
            if (output := self._output(row, token)) is not None:
                finished.add(slot)
                self._finished.append(
                    result(
                        row.prompt.row,
                        id=row.prompt.id,
                        output=output,
                        input_tokens=len(row.prompt.ids),
                        output_tokens=len(row.generated),
                    )
                )
        self._free(finished)

    def _output(self, row: ActiveRow, token: int) -> dict[str, str] | None:
        """Append a token to a row; its output if that finishes it. An end token counts as
        generated and is no text."""
        row.generated.append(token)
        if token in self._end_tokens:
            text = self._detokenizer.text(row.prompt.ids, row.generated[:-1])
            return {"text": text, "finish_reason": "stop"}
        before_stop = self._detokenizer.stopped(row.prompt.ids, row.generated)
        if before_stop is not None:
            return {"text": before_stop, "finish_reason": "stop"}
        if len(row.generated) >= self._sampling.max_new_tokens:
            text = self._detokenizer.text(row.prompt.ids, row.generated)
            return {"text": text, "finish_reason": "length"}
        return None

    def _free(self, finished: set[int]) -> None:
        for slot in sorted(finished, reverse=True):
            last = len(self._active) - 1
            # Going down, whatever is last here is a row that goes on, or this very one.
            if slot != last:
                row = self._active[last]
                self._runner.move(last, slot, row.position)
                self._active[slot] = row
            self._active.pop()

    def _start_over(self) -> None:
        """Go on with half the rows. What they generated so far is kept as part of the prompt."""
        rows = self._active
        self._active = []
        self._runner.reset()
        release_unused(self._device)
        if len(rows) == 1:
            # The culprit is found: the others may share the memory as before.
            self._max_rows = self._runner.slots
            row = rows[0]
            message = f"{self._reach(row)} tokens do not fit into the device's memory"
            self._finished.append(
                row_error(row.prompt.row, "out_of_memory", message, id=row.prompt.id)
            )
            return
        self._max_rows = max(1, len(rows) // 2)
        print(f"out of memory with {len(rows)} rows: going on with {self._max_rows}", flush=True)
        self._waiting.extendleft(reversed(rows))


def end_tokens(loaded: LoadedModel) -> frozenset[int]:
    """Every token that ends a generation, by generation_config, config or tokenizer."""
    generation_config = loaded.model.generation_config
    for ids in (
        generation_config.eos_token_id if generation_config is not None else None,
        loaded.model.config.get_text_config().eos_token_id,
        loaded.tokenizer.eos_token_id,
    ):
        if ids is not None:
            return frozenset(ids if isinstance(ids, list | tuple) else [ids])
    return frozenset()
