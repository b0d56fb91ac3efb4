"""Encoder-type tasks: sorted batches under a budget of padded tokens, one forward pass a step.

What a task makes of a pass is in its own module: ``classification``, ``tagging``, ``masks``, ``embeddings``,
``scoring``, ``reranking``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from shared.rows import result, row_error
from workers.ranks.engine.batching import plan_batches
from workers.ranks.engine.computation import Answered, Step
from workers.ranks.engine.device import is_out_of_memory, release_unused
from workers.ranks.engine.fused import first_alone
from workers.ranks.engine.models import LoadedModel
from workers.ranks.engine.padding import pad_rows
from workers.ranks.engine.parts import Parts, Piece
from workers.ranks.engine.prompts import Prompt
from workers.ranks.engine.turns import Turns

BATCH_TOKENS = {"cpu": 1024, "cuda": 32_768}
"""Padded tokens of a batch. Measured on CPU: more brings nothing, as padding grows with it."""

POOL_ROWS = 512
"""Rows that are sorted together: enough for even batches, few enough to commit often."""
LATE_ROWS = 32
"""Rows that go ahead of planned ones, of an attempt that has none planned."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of one pass, right-padded. ``ids``, ``mask`` and, of pairs, ``types`` are [rows, width] on the
    device."""

    prompts: list[Prompt]
    ids: torch.Tensor
    mask: torch.Tensor
    types: torch.Tensor | None = None

    @property
    def padded(self) -> bool:
        """Some rows are shorter than others."""
        return len({len(prompt.ids) for prompt in self.prompts}) > 1


class SortedPasses(ABC):
    """See :class:`workers.ranks.engine.computation.Computation`. A task adds :meth:`read`."""

    def __init__(self, loaded: LoadedModel) -> None:
        self._model = loaded.model
        self._device = loaded.key.device
        self._pad = loaded.pad_token
        self._most = None if loaded.batches else 1
        self.looks_at_first = False
        """Of what the encoder says of a row, the task uses the first token's alone."""
        self._max_tokens = BATCH_TOKENS[self._device.type]
        self._turns: Turns[Prompt] = Turns(lambda prompt: prompt.owner)
        self._parts = Parts(self.unite)
        self._batch_sizes: dict[str, int] = {}
        self._batches: list[list[Prompt]] = []
        """Planned, the next one last."""
        self._ahead: list[list[Prompt]] = []
        """Those that go before them."""
        self._owed = 0
        """Tokens to be computed of the planned ones before others may go ahead again."""

    @abstractmethod
    def read(self, batch: Batch) -> Sequence[dict[str, Any] | None]:
        """Compute a batch: the output of each row, None where the model's numbers are not finite. Of a
        prompt that is a part of its row, what :meth:`unite` makes the row's output of. May run out of
        memory."""

    def unite(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        """The output of a row out of those of its parts, in order."""
        raise NotImplementedError("the rows of this task have no parts")

    def join(self, owner: str, rows: int) -> None:
        self._batch_sizes[owner] = rows
        self._turns.join(owner, POOL_ROWS)

    def leave(self, owner: str) -> None:
        self._turns.leave(owner)
        self._parts.leave(owner)
        del self._batch_sizes[owner]
        self._batches, self._ahead = (
            [kept for batch in batches if (kept := [p for p in batch if p.owner != owner])]
            for batches in (self._batches, self._ahead)
        )

    @property
    def busy(self) -> bool:
        return bool(self._batches or self._ahead or len(self._turns))

    def wants_rows(self, owner: str) -> bool:
        return self._turns.waiting(owner) + self._turns.inside(owner) < POOL_ROWS

    def add(self, prompts: Sequence[Prompt]) -> None:
        self._turns.add(prompts)

    def step(self) -> Step:
        """Compute one batch."""
        if not self._batches and not self._ahead:
            self._owed = 0
            self._batches = self._plan(POOL_ROWS)
        elif self._owed <= 0 and self._somebody_is_late():
            late = self._plan(LATE_ROWS)
            self._ahead += late
            self._owed = sum(len(p.ids) for batch in late for p in batch)
        prompts = self._ahead.pop() if self._ahead else self._next_planned()
        if not prompts:
            return Step([], {})
        try:
            outputs = self._compute(prompts)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        else:
            return self._done(
                [_result(prompt, row) for prompt, row in zip(prompts, outputs, strict=True)],
                prompts,
            )
        # Here the failed pass's tensors are gone: inside `except` the traceback holds them.
        return self._without_memory(prompts)

    def _somebody_is_late(self) -> bool:
        """Whether the attempt whose turn it is has none of the rows that are planned: a job of one row
        does not wait for hundreds of another."""
        first = self._turns.peek()
        return first is not None and self._turns.inside(first.owner) == 0

    def _next_planned(self) -> list[Prompt]:
        prompts = self._batches.pop() if self._batches else []
        self._owed -= sum(len(prompt.ids) for prompt in prompts)
        return prompts

    def _plan(self, most: int) -> list[list[Prompt]]:
        """Batches of the ``most`` rows whose turn it is, the next one last."""
        pool: list[Prompt] = []
        while len(pool) < most and self._turns.peek() is not None:
            pool.append(self._turns.take())
        plan = plan_batches(
            [len(p.ids) for p in pool], max_rows=self._max_rows(pool), max_tokens=self._max_tokens
        )
        return [[pool[i] for i in batch] for batch in reversed(plan)]

    def _max_rows(self, pool: Sequence[Prompt]) -> int:
        most = max((self._batch_sizes[owner] for owner in {p.owner for p in pool}), default=1)
        return most if self._most is None else min(most, self._most)

    def _done(self, results: Sequence[dict[str, Any]], prompts: Sequence[Prompt]) -> Step:
        tokens: Counter[str] = Counter()
        for prompt in prompts:
            self._turns.done(prompt)
            tokens[prompt.owner] += len(prompt.ids)
        answers = [
            Answered(prompt.owner, whole)
            for prompt, found in zip(prompts, results, strict=True)
            if (whole := self._parts.file(prompt, found)) is not None
        ]
        return Step(answers, tokens)

    def forward(self, batch: Batch) -> Any:
        """The model's output for a batch."""
        inputs = {"input_ids": batch.ids}
        if batch.types is not None:
            inputs["token_type_ids"] = batch.types
        if batch.padded:
            # Otherwise there is nothing to mask, and not every model takes a mask.
            inputs["attention_mask"] = batch.mask
        with first_alone(self._model, on=self.looks_at_first):
            return self._model(**inputs)

    @torch.inference_mode()
    def _compute(self, prompts: list[Prompt]) -> Sequence[dict[str, Any] | None]:
        ids, mask = pad_rows([prompt.ids for prompt in prompts], self._pad, self._device)
        types = None
        if prompts[0].types:
            types, _ = pad_rows([prompt.types for prompt in prompts], 0, self._device)
        return self.read(Batch(prompts, ids, mask, types))

    def _without_memory(self, prompts: list[Prompt]) -> Step:
        release_unused(self._device)
        if len(prompts) == 1:
            message = f"{len(prompts[0].ids)} tokens do not fit into the device's memory"
            error = row_error(prompts[0].row, "out_of_memory", message, id=prompts[0].id)
            return self._done([error], prompts)
        # Every later batch is as large: halve the budget for good.
        half = (len(prompts) + 1) // 2
        self._max_tokens = min(self._max_tokens, half * len(prompts[0].ids))
        print(f"out of memory with {len(prompts)} rows: going on with {half}", flush=True)
        self._ahead += [prompts[half:], prompts[:half]]
        return Step([], {})


def _result(prompt: Prompt, output: dict[str, Any] | None) -> dict[str, Any]:
    if output is None:
        message = "the model's scores are not finite: its weights or the precision are at fault"
        return row_error(prompt.row, "not_finite", message, id=prompt.id)
    return result(prompt.row, id=prompt.id, output=output, input_tokens=len(prompt.ids))
