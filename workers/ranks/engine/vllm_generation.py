"""Text generation by vLLM: whose row is next, and where a text ends, is ours to say; vLLM computes the tokens.

So turns, stop strings, text and results are those of our own engine. Randomness is vLLM's, from a seed that belongs
to the row.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from typing import Any

from workers.ranks.engine.computation import Answered
from workers.ranks.engine.generating import ActiveRow, Answer, Endings, Generating
from workers.ranks.engine.likelihoods import token_entry
from workers.ranks.engine.models import LoadedModel
from workers.ranks.engine.prompts import Prompt
from workers.ranks.engine.vllm_process import Tokens, VllmProcess

WAIT = 0.05
"""Seconds that a step waits for tokens: what a cancel may wait."""


class VllmGeneration(Generating):
    """See :class:`workers.ranks.engine.computation.Computation`."""

    def __init__(self, loaded: LoadedModel, process: VllmProcess) -> None:
        super().__init__(loaded, Endings(loaded, continues=True))
        self._tokenizer = loaded.tokenizer
        self._process = process
        self._rows: dict[int, ActiveRow] = {}
        """Those that vLLM computes, by their number."""

    @property
    def active(self) -> list[ActiveRow]:
        return list(self._rows.values())

    def begin(self, prompt: Prompt, answer: Answer, sample: int) -> ActiveRow:
        return ActiveRow(prompt, prompt.generation.max_new_tokens, answer, sample)

    def drop_rows(self) -> list[ActiveRow]:
        rows = self.active
        self._forget(list(self._rows))
        return rows

    def add(self, prompts: Sequence[Prompt]) -> None:
        takes = []
        for prompt in prompts:
            if prompt.generation.json_schema is None:
                takes.append(prompt)
                continue
            problem = "schema: engine vllm is not given one; use engine gpuyard"
            failed = Answer(prompt).fail("invalid_generation", problem)
            self._finished.append(Answered(prompt.owner, failed))
        super().add(takes)

    def advance(self) -> dict[str, int]:
        """Hand over rows whose turn it is, and take what was computed meanwhile."""
        self._forget([number for number, row in self._rows.items() if row.answer.closed])
        while self.has_room(len(self._rows)):
            row = self.turns.take()
            number = next(self._process.numbers)
            self._rows[number] = row
            self._process.add(number, row.prompt.ids, self._options(row))
        tokens: Counter[str] = Counter()
        if not self._rows:
            return tokens
        for brought in self._process.take(WAIT):
            row_or_none = self._rows.get(brought.number)
            if row_or_none is not None:
                tokens[row_or_none.prompt.owner] += self._append(row_or_none, brought)
        return tokens

    def _append(self, row: ActiveRow, brought: Tokens) -> int:
        """File new tokens of a row, as far as its text goes; how many those were."""
        if brought.refused is not None:
            self._fail(row.answer, "engine_refused", f"vLLM: {brought.refused[:300]}")
            self._done(brought.number, row)
            return 0
        for count, token in enumerate(brought.ids, 1):
            told = (
                None if brought.logprobs is None else self._told(row, brought.logprobs[count - 1])
            )
            if self.take(row, token, told):
                self._done(brought.number, row, running=not brought.finished)
                return count
        if brought.finished:
            message = f"vLLM ended the text after {len(row.generated)} tokens and gives no reason"
            self._fail(row.answer, "engine_failed", message)
            self._done(brought.number, row)
        return len(brought.ids)

    def _done(self, number: int, row: ActiveRow, *, running: bool = False) -> None:
        del self._rows[number]
        self.turns.done(row)
        if running:
            self._process.drop([number])

    def _forget(self, numbers: list[int]) -> None:
        if numbers:
            self._process.drop(numbers)
        for number in numbers:
            self.turns.done(self._rows.pop(number))

    def _options(self, row: ActiveRow) -> dict[str, Any]:
        options = row.options
        return {
            "max_tokens": row.limit,
            "min_tokens": min(options.min_new_tokens, row.limit),
            "temperature": options.temperature,
            "top_p": options.top_p,
            "top_k": options.top_k or 0,
            "repetition_penalty": options.repetition_penalty,
            "seed": _seed(row) if options.temperature else None,
            # All ends are ours, its own are off: a model's folder may name others.
            "ignore_eos": True,
            "stop_token_ids": sorted(self._endings.tokens(row)),
            "logprobs": options.logprobs,
        }

    def _told(self, row: ActiveRow, entries: Sequence[tuple[int, float]]) -> dict[str, Any]:
        own, *likeliest = (token_entry(self._tokenizer, *entry) for entry in entries)
        return {**own, "top": likeliest[: row.options.logprobs or 0]}


def _seed(row: ActiveRow) -> int:
    draw = row.draw
    digest = hashlib.blake2b(f"{draw.options.seed}/{draw.row}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
