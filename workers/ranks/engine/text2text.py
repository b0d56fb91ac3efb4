"""One text for another: groups of rows that are read together and written in lockstep.

A step is one pass of the encoder over some of a group's sources, or one token for each of its rows.
A finished row leaves the group at once; the next group begins when the last row has left.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import LogitsProcessorList

from workers.ranks.engine.batching import plan_batches
from workers.ranks.engine.generating import (
    ENCODE_TOKENS,
    ActiveRow,
    Answer,
    Endings,
    Generating,
    count_by_owner,
    end_tokens,
)
from workers.ranks.engine.lockstep import CacheCost, LockstepDecoder, decoder_start
from workers.ranks.engine.models import LoadedModel
from workers.ranks.engine.padding import pad_rows
from workers.ranks.engine.prompts import Prompt
from workers.ranks.engine.rules import output_rules


class TextToText(Generating):
    """See :class:`workers.ranks.engine.computation.Computation`.

    Args:
        cache_bytes: what the rows' caches may take together. A row alone is always tried.
        decoder: passes over the rows of a group.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        cache_bytes: int,
        decoder: LockstepDecoder | None = None,
    ) -> None:
        self._config = loaded.model.generation_config
        self._most_new_tokens = _target_positions(loaded)
        forced = self._config is not None and self._config.forced_eos_token_id is not None
        endings = Endings(loaded, continues=False, forced_end=forced)
        super().__init__(loaded, endings, None if loaded.batches else 1)
        self._cost = loaded.cache_cost or CacheCost(0, 0, batches=True)
        self._cache_bytes = cache_bytes
        self._encode_tokens = ENCODE_TOKENS[self.device.type]
        self._start = decoder_start(loaded.model)
        self._pad = loaded.pad_token
        self._ends = sorted(end_tokens(loaded))
        self._decoder = decoder or LockstepDecoder(loaded.model, loaded.pad_token)
        self._rows: list[ActiveRow] = []
        self._passes: list[list[ActiveRow]] = []
        """Of the group, those that the encoder has not read yet."""
        self._rules = LogitsProcessorList()

    @property
    def active(self) -> list[ActiveRow]:
        return self._rows

    def advance(self) -> dict[str, int]:
        """Read some sources of the group, or generate one token for each of its rows."""
        if self._rows and all(row.answer.closed for row in self._rows):
            self._rows, self._passes = [], []
            self._decoder.reset()
        if not self._rows:
            self._begin_group()
        if not self._rows:
            return {}
        if self._passes:
            # Taken off only when it is done: a pass that runs out of memory starts the group over.
            self._decoder.encode([row.prompt.ids for row in self._passes[0]])
            self._passes.pop(0)
            return {}
        tokens = count_by_owner(self._rows)
        logits = self._decoder.decode(
            [row.generated[-1] if row.generated else self._start for row in self._rows]
        )
        self._release(self.accept(self._rows, self._ruled(logits.float())))
        return tokens

    def drop_rows(self) -> list[ActiveRow]:
        """They begin again from their sources, and with the same tokens: rows that meet later would
        not be at the same step."""
        rows, self._rows, self._passes = self._rows, [], []
        self._decoder.reset()
        for row in rows:
            row.generated.clear()
            row.logprobs.clear()
        return rows

    def begin(self, prompt: Prompt, answer: Answer, sample: int) -> ActiveRow:
        limit = min(prompt.generation.max_new_tokens, self._most_new_tokens)
        return ActiveRow(prompt, limit, answer, sample, start=(self._start,))

    def _begin_group(self) -> None:
        """Take rows off the queue, in order, while slots and memory last. Those of a group may write
        equally much: rules of the model look at how much that is."""
        group: list[ActiveRow] = []
        width = 0
        while len(group) < self.max_rows and (row := self.turns.peek()) is not None:
            if group and row.limit != group[0].limit:
                break
            width = max(width, len(row.prompt.ids))
            size = self._cost.of(len(group) + 1, width, row.limit)
            if group and size > self._cache_bytes:
                break
            group.append(self.turns.take())
        plan = plan_batches(
            [len(row.prompt.ids) for row in group],
            max_rows=len(group),
            max_tokens=self._encode_tokens,
        )
        self._passes = [[group[i] for i in batch] for batch in plan]
        self._rows = [row for batch in self._passes for row in batch]
        self._make_rules()

    def _release(self, finished: set[int]) -> None:
        if not finished:
            return
        kept = [place for place in range(len(self._rows)) if place not in finished]
        self._rows = [self._rows[place] for place in kept]
        if not kept:
            self._decoder.reset()
            return
        self._decoder.keep(kept)
        self._make_rules()

    def _make_rules(self) -> None:
        """Anew for other rows: some rules look at the sources."""
        sources, _ = pad_rows([row.prompt.ids for row in self._rows], self._pad, self.device)
        self._rules = output_rules(
            self._config, ends=self._ends, max_new_tokens=self._rows[0].limit, sources=sources
        )

    def _ruled(self, logits: torch.Tensor) -> torch.Tensor:
        if not self._rules:
            return logits
        so_far: Sequence[list[int]] = [[self._start, *row.generated] for row in self._rows]
        ruled: torch.Tensor = self._rules(torch.tensor(so_far, device=self.device), logits)  # type: ignore[arg-type]
        return ruled


def _target_positions(loaded: LoadedModel) -> int:
    """Tokens that the decoder can write; more is cut there, as if it had been asked for."""
    config = loaded.model.config.get_text_config()
    for name in ("max_decoder_position_embeddings", "max_position_embeddings"):
        if isinstance(positions := getattr(config, name, None), int):
            return positions
    return 1_000_000
