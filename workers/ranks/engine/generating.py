"""What all generation has in common: rows on their way, the next token of each, and when one is done."""

from __future__ import annotations

from abc import ABC, abstractmethod
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
from workers.ranks.engine.sampling import next_tokens
from workers.ranks.engine.text import Detokenizer

ENCODE_TOKENS = {"cpu": 1024, "cuda": 16_384}
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
        """Where the newest token of a text that goes on will be written; as many are in the cache."""
        return len(self.prompt.ids) + len(self.generated) - 1


class Endings:
    """Says when a generation is over, and the output that it then has.

    Args:
        continues: the generated text goes on where the prompt ends; otherwise it is a text of its own.
        forced_end: the last token that fits is an end token, whatever the model wanted.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        stop: Sequence[str],
        max_new_tokens: int,
        *,
        continues: bool,
        forced_end: bool = False,
    ) -> None:
        self._ends = end_tokens(loaded)
        self._detokenizer = Detokenizer(loaded.tokenizer, stop)
        self._max_new_tokens = max_new_tokens
        self._continues = continues
        self._forced_end = forced_end

    def output(self, row: ActiveRow) -> dict[str, str] | None:
        """The output of a row if its newest token finishes it. An end token counts as generated and
        is no text."""
        before = row.prompt.ids if self._continues else ()
        full = len(row.generated) >= self._max_new_tokens
        if row.generated[-1] in self._ends:
            text = self._detokenizer.text(before, row.generated[:-1])
            reason = "length" if full and self._forced_end else "stop"
            return {"text": text, "finish_reason": reason}
        before_stop = self._detokenizer.stopped(before, row.generated)
        if before_stop is not None:
            return {"text": before_stop, "finish_reason": "stop"}
        if full:
            text = self._detokenizer.text(before, row.generated)
            return {"text": text, "finish_reason": "length"}
        return None


class Generating(ABC):
    """See :class:`workers.ranks.engine.computation.Computation`. A way of generating adds how rows are
    admitted and computed: :meth:`advance` and :meth:`drop_rows`."""

    def __init__(
        self, loaded: LoadedModel, sampling: Generation, endings: Endings, slots: int
    ) -> None:
        self.waiting: deque[ActiveRow] = deque()
        self.device = loaded.key.device
        self.max_rows = slots
        self._slots = slots
        self._sampling = sampling
        self._endings = endings
        # Kept across a step that runs out of memory after some of its rows were finished.
        self._finished: list[dict[str, Any]] = []

    @abstractmethod
    def advance(self) -> int:
        """Compute a little; the number of tokens generated. May run out of memory."""

    @abstractmethod
    def drop_rows(self) -> list[ActiveRow]:
        """Take the rows in computation out of it, and give their memory back."""

    @property
    @abstractmethod
    def active(self) -> list[ActiveRow]:
        """The rows in computation."""

    @abstractmethod
    def reach(self, row: ActiveRow) -> int:
        """Tokens that the row has at the very most when it is finished."""

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.active)

    @property
    def wants_rows(self) -> bool:
        return len(self.waiting) < self._slots

    def add(self, prompts: Sequence[Prompt]) -> None:
        # Rows of similar length together: less padding, less masked memory in decode.
        ordered = sorted(prompts, key=lambda prompt: (-len(prompt.ids), prompt.row))
        self.waiting.extend(ActiveRow(prompt) for prompt in ordered)

    def step(self) -> Step:
        tokens = 0
        out_of_memory = False
        try:
            with torch.inference_mode():
                tokens = self.advance()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            out_of_memory = True
        if out_of_memory:
            # Here the failed pass's tensors are gone: inside `except` the traceback holds them.
            self._start_over()
        results, self._finished = self._finished, []
        return Step(results, tokens)

    def accept(self, rows: Sequence[ActiveRow], logits: torch.Tensor) -> set[int]:
        """Choose the next token of each row; the places of the rows that are finished by it.

        Args:
            logits: [rows, vocabulary].
        """
        chosen = next_tokens(
            logits, self._sampling, [(row.prompt.row, len(row.generated)) for row in rows]
        )
        finished: set[int] = set()
        for place, (row, token) in enumerate(zip(rows, chosen, strict=True)):
            row.generated.append(token)
            if (output := self._endings.output(row)) is not None:
                finished.add(place)
                self._finished.append(
                    result(
                        row.prompt.row,
                        id=row.prompt.id,
                        output=output,
                        input_tokens=len(row.prompt.ids),
                        output_tokens=len(row.generated),
                    )
                )
        return finished

    def _start_over(self) -> None:
        """Go on with half the rows."""
        rows = self.drop_rows()
        release_unused(self.device)
        if len(rows) == 1:
            # The culprit is found: the others may share the memory as before.
            self.max_rows = self._slots
            row = rows[0]
            message = f"{self.reach(row)} tokens do not fit into the device's memory"
            self._finished.append(
                row_error(row.prompt.row, "out_of_memory", message, id=row.prompt.id)
            )
            return
        self.max_rows = max(1, len(rows) // 2)
        print(f"out of memory with {len(rows)} rows: going on with {self.max_rows}", flush=True)
        self.waiting.extendleft(reversed(rows))


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
