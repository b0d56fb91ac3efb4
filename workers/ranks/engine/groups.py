"""One text for another in groups: rows that are read together and written in lockstep.

For models that cannot be decoded over slots (``text2text.py``). A step is one pass of the encoder over some
of a group's sources, or one token for each of its rows. A finished row leaves the group at once; the next
group begins when the last row has left.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import LogitsProcessorList

from workers.ranks.engine.batching import plan_batches
from workers.ranks.engine.generating import ActiveRow, count_by_owner
from workers.ranks.engine.lockstep import LockstepDecoder
from workers.ranks.engine.models import LoadedModel
from workers.ranks.engine.padding import pad_rows
from workers.ranks.engine.rules import output_rules
from workers.ranks.engine.text2text import FromSources


class TextInGroups(FromSources):
    """See :class:`workers.ranks.engine.computation.Computation`.

    Args:
        decoder: passes over the rows of a group; None: one for this model.
    """

    def __init__(
        self, loaded: LoadedModel, *, cache_bytes: int, decoder: LockstepDecoder | None = None
    ) -> None:
        super().__init__(loaded, cache_bytes=cache_bytes)
        self._pad = loaded.pad_token
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
            [row.generated[-1] if row.generated else self.start for row in self._rows]
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

    def _begin_group(self) -> None:
        """Take rows off the queue, in order, while slots and memory last. Those of a group may write
        equally much: rules of the model look at how much that is."""
        group: list[ActiveRow] = []
        width = 0
        while len(group) < self.max_rows and (row := self.turns.peek()) is not None:
            if group and row.limit != group[0].limit:
                break
            width = max(width, len(row.prompt.ids))
            size = self.cost.of(len(group) + 1, width, row.limit)
            if group and size > self.cache_bytes:
                break
            group.append(self.turns.take())
        plan = plan_batches(
            [len(row.prompt.ids) for row in group],
            max_rows=len(group),
            max_tokens=self.encode_tokens,
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
            self.config, ends=self.ends, max_new_tokens=self._rows[0].limit, sources=sources
        )

    def _ruled(self, logits: torch.Tensor) -> torch.Tensor:
        if not self._rules:
            return logits
        so_far: Sequence[list[int]] = [[self.start, *row.generated] for row in self._rows]
        ruled: torch.Tensor = self._rules(torch.tensor(so_far, device=self.device), logits)  # type: ignore[arg-type]
        return ruled
