"""Text classification: sorted batches under a budget of padded tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from shared.rows import result, row_error
from workers.ranks.engine.batching import plan_batches
from workers.ranks.engine.computation import Step
from workers.ranks.engine.device import is_out_of_memory, release_unused
from workers.ranks.engine.models import LoadedModel
from workers.ranks.engine.prompts import Prompt

BATCH_TOKENS = {"cpu": 1024, "cuda": 32_768}
"""Padded tokens of a batch. Measured on CPU: more brings nothing, as padding grows with it."""

POOL_ROWS = 512
"""Rows that are sorted together: enough for even batches, few enough to commit often."""


class Classification:
    """See :class:`workers.ranks.engine.computation.Computation`."""

    def __init__(self, loaded: LoadedModel, *, batch_size: int, top_k: int) -> None:
        self._model = loaded.model
        self._device = loaded.key.device
        config = loaded.model.config
        self._labels = [name for _, name in sorted((config.id2label or {}).items())]
        self._top_k = min(top_k, len(self._labels))
        pad = config.pad_token_id if config.pad_token_id is not None else None
        self._pad = pad if pad is not None else (loaded.tokenizer.pad_token_id or 0)
        # Decoders find a row's last token by the pad token; one without can take no padding.
        finds_end_by_pad = pad is None and not hasattr(config, "type_vocab_size")
        self._max_rows = 1 if finds_end_by_pad else batch_size
        self._max_tokens = BATCH_TOKENS[self._device.type]
        self._pool: list[Prompt] = []
        self._batches: list[list[Prompt]] = []

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
        batch = self._batches.pop()
        try:
            scores = self._scores(batch)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        else:
            return Step(
                [self._result(prompt, row) for prompt, row in zip(batch, scores, strict=True)],
                sum(len(prompt.ids) for prompt in batch),
            )
        # Here the failed pass's tensors are gone: inside `except` the traceback holds them.
        return self._without_memory(batch)

    def _without_memory(self, batch: list[Prompt]) -> Step:
        release_unused(self._device)
        if len(batch) == 1:
            message = f"{len(batch[0].ids)} tokens do not fit into the device's memory"
            return Step([row_error(batch[0].row, "out_of_memory", message, id=batch[0].id)], 0)
        # Every later batch is as large: halve the budget for good.
        half = (len(batch) + 1) // 2
        self._max_tokens = min(self._max_tokens, half * len(batch[0].ids))
        print(f"out of memory with {len(batch)} rows: going on with {half}", flush=True)
        self._batches += [batch[half:], batch[:half]]
        return Step([], 0)

    @torch.inference_mode()
    def _scores(self, batch: list[Prompt]) -> list[list[float]]:
        width = max(len(prompt.ids) for prompt in batch)
        ids = torch.full((len(batch), width), self._pad, dtype=torch.long)
        mask = torch.zeros(len(batch), width, dtype=torch.long)
        for i, prompt in enumerate(batch):
            ids[i, : len(prompt.ids)] = torch.tensor(prompt.ids, dtype=torch.long)
            mask[i, : len(prompt.ids)] = 1
        output: Any = self._model(
            input_ids=ids.to(self._device), attention_mask=mask.to(self._device)
        )
        logits: torch.Tensor = output.logits.float()
        if self._model.config.problem_type == "multi_label_classification":
            logits = logits.sigmoid()
        elif self._model.config.problem_type != "regression":
            logits = logits.softmax(dim=-1)
        scores: list[list[float]] = logits.tolist()
        return scores

    def _result(self, prompt: Prompt, scores: list[float]) -> dict[str, Any]:
        if not all(map(math.isfinite, scores)):
            message = "the model's scores are not finite: its weights or the precision are at fault"
            return row_error(prompt.row, "not_finite", message, id=prompt.id)
        best = sorted(range(len(scores)), key=lambda i: (-scores[i], i))[: self._top_k]
        labels = [{"label": self._labels[i], "score": scores[i]} for i in best]
        output = {**labels[0], "labels": labels}
        return result(prompt.row, id=prompt.id, output=output, input_tokens=len(prompt.ids))
