"""Encoder-type tasks: sorted batches under a budget of padded tokens, one forward pass a step.

What a task makes of a pass is in its own module: ``classification``, ``tagging``, ``masks``, ``embeddings``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from shared.rows import result, row_error
from workers.ranks.engine.batching import plan_batches
from workers.ranks.engine.computation import Step
from workers.ranks.engine.device import is_out_of_memory, release_unused
from workers.ranks.engine.models import LoadedModel
from workers.ranks.engine.padding import pad_rows
from workers.ranks.engine.prompts import Prompt

BATCH_TOKENS = {"cpu": 1024, "cuda": 32_768}
"""Padded tokens of a batch. Measured on CPU: more brings nothing, as padding grows with it."""

POOL_ROWS = 512
"""Rows that are sorted together: enough for even batches, few enough to commit often."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of one pass, right-padded. ``ids`` and ``mask`` are [rows, width] on the device."""

    prompts: list[Prompt]
    ids: torch.Tensor
    mask: torch.Tensor


class SortedPasses(ABC):
    """See :class:`workers.ranks.engine.computation.Computation`. A task adds :meth:`read`."""

    def __init__(self, loaded: LoadedModel, *, batch_size: int) -> None:
        self._model = loaded.model
        self._device = loaded.key.device
        self._pad = loaded.pad_token
        self._max_rows = batch_size if loaded.batches else 1
        self._max_tokens = BATCH_TOKENS[self._device.type]
        self._pool: list[Prompt] = []
        self._batches: list[list[Prompt]] = []

    @abstractmethod
    def read(self, batch: Batch) -> Sequence[dict[str, Any] | None]:
        """Compute a batch: the output of each row, None where the model's numbers are not finite.
        May run out of memory."""

    @property
    def busy(self) -> bool:
        return bool(self._pool or self._batches)

    @property
    def wants_rows(self) -> bool:
        return not self._batches and len(self._pool) < POOL_ROWS

    def add(self, prompts: Sequence[Prompt]) -> None:
        self._pool.extend(prompts)

    def step(self) -> Step:
        """Compute one batch."""
        if not self._batches:
            plan = plan_batches(
                [len(p.ids) for p in self._pool],
                max_rows=self._max_rows,
                max_tokens=self._max_tokens,
            )
            self._batches = [[self._pool[i] for i in batch] for batch in reversed(plan)]
            self._pool = []
        prompts = self._batches.pop()
        try:
            outputs = self._compute(prompts)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        else:
            return Step(
                [_result(prompt, row) for prompt, row in zip(prompts, outputs, strict=True)],
                sum(len(prompt.ids) for prompt in prompts),
            )
        # Here the failed pass's tensors are gone: inside `except` the traceback holds them.
        return self._without_memory(prompts)

    def forward(self, batch: Batch) -> Any:
        """The model's output for a batch."""
        if len(batch.prompts) == 1:
            # Without padding there is nothing to mask, and not every model takes a mask.
            return self._model(input_ids=batch.ids)
        return self._model(input_ids=batch.ids, attention_mask=batch.mask)

    @torch.inference_mode()
    def _compute(self, prompts: list[Prompt]) -> Sequence[dict[str, Any] | None]:
        ids, mask = pad_rows([prompt.ids for prompt in prompts], self._pad, self._device)
        return self.read(Batch(prompts, ids, mask))

    def _without_memory(self, prompts: list[Prompt]) -> Step:
        release_unused(self._device)
        if len(prompts) == 1:
            message = f"{len(prompts[0].ids)} tokens do not fit into the device's memory"
            return Step([row_error(prompts[0].row, "out_of_memory", message, id=prompts[0].id)], 0)
        # Every later batch is as large: halve the budget for good.
        half = (len(prompts) + 1) // 2
        self._max_tokens = min(self._max_tokens, half * len(prompts[0].ids))
        print(f"out of memory with {len(prompts)} rows: going on with {half}", flush=True)
        self._batches += [prompts[half:], prompts[:half]]
        return Step([], 0)


def _result(prompt: Prompt, output: dict[str, Any] | None) -> dict[str, Any]:
    if output is None:
        message = "the model's scores are not finite: its weights or the precision are at fault"
        return row_error(prompt.row, "not_finite", message, id=prompt.id)
    return result(prompt.row, id=prompt.id, output=output, input_tokens=len(prompt.ids))
