"""One text for another by continuous batching: rows over the slots of an encoder-decoder.

A step reads the sources of rows whose turn it is, in one pass, and then generates one token for each row. A
finished row leaves at once and the last one moves into its slot, so that rows are always those of slots
``0 .. n-1``. Models that cannot be decoded so do it in groups (``groups.py``).
"""

from __future__ import annotations

import torch
from transformers import LogitsProcessorList

from workers.ranks.engine.crossing import CrossRunner, target_positions
from workers.ranks.engine.generating import (
    ENCODE_TOKENS,
    LATE_SEATS,
    ActiveRow,
    Answer,
    Endings,
    Generating,
    count_by_owner,
    end_tokens,
)
from workers.ranks.engine.lockstep import CacheCost, decoder_start
from workers.ranks.engine.models import LoadedModel
from workers.ranks.engine.prompts import Prompt
from workers.ranks.engine.rules import output_rules

_NO_LIMIT = 1_000_000


class FromSources(Generating):
    """What all text written for another has in common. A way of computing it adds the rest.

    Args:
        cache_bytes: what the rows' caches may take together. A row alone is always tried.
    """

    def __init__(self, loaded: LoadedModel, *, cache_bytes: int) -> None:
        self.config = loaded.model.generation_config
        forced = self.config is not None and self.config.forced_eos_token_id is not None
        endings = Endings(loaded, continues=False, forced_end=forced)
        super().__init__(loaded, endings, None if loaded.batches else 1)
        self.cost = loaded.cache_cost or CacheCost(0, 0, batches=True)
        self.cache_bytes = cache_bytes
        self.encode_tokens = ENCODE_TOKENS[self.device.type]
        self.start = decoder_start(loaded.model)
        self.ends = sorted(end_tokens(loaded))
        self._most_new_tokens = target_positions(loaded.model) or _NO_LIMIT

    def begin(self, prompt: Prompt, answer: Answer, sample: int) -> ActiveRow:
        limit = min(prompt.generation.max_new_tokens, self._most_new_tokens)
        return ActiveRow(prompt, limit, answer, sample, start=(self.start,))


class TextToText(FromSources):
    """See :class:`workers.ranks.engine.computation.Computation`.

    Args:
        runner: passes over the rows; None: one for this model.
    """

    def __init__(
        self, loaded: LoadedModel, *, cache_bytes: int, runner: CrossRunner | None = None
    ) -> None:
        super().__init__(loaded, cache_bytes=cache_bytes)
        self._runner = runner or make_runner(loaded)
        self._active: list[ActiveRow] = []
        self._joining: list[ActiveRow] = []
        """Taken from those that wait, and not active yet."""
        self._rules: dict[ActiveRow, LogitsProcessorList] = {}

    @property
    def active(self) -> list[ActiveRow]:
        return self._active

    def advance(self) -> dict[str, int]:
        """Read sources, then generate one token for each row."""
        closed = {place for place, row in enumerate(self._active) if row.answer.closed}
        for place in closed:
            self.turns.done(self._active[place])
        self._free(closed)
        if admitted := self._admit():
            first, seats = len(self._active), self._seats(admitted)
            self._keep_to_budget(seats, admitted)
            self._runner.encode(first, [row.prompt.ids for row in admitted], seats)
            self._active += admitted
            self._joining = []
            self._rules.update((row, self._rules_of(row)) for row in admitted)
        if not self._active:
            return {}
        tokens = count_by_owner(self._active)
        logits = self._runner.decode(
            [row.generated[-1] if row.generated else self.start for row in self._active],
            [len(row.generated) for row in self._active],
        )
        self._free(self.accept(self._active, self._ruled(logits.float())))
        return tokens

    def drop_rows(self) -> list[ActiveRow]:
        """They begin again from their sources, and write the same tokens."""
        rows = [*self._active, *self._joining]
        self._active, self._joining = [], []
        self._rules.clear()
        self._runner.reset()
        for row in rows:
            row.generated.clear()
            row.logprobs.clear()
        return rows

    def _admit(self) -> list[ActiveRow]:
        """Take rows whose turn it is, while seats, memory and the budget of a pass last."""
        admitted = self._joining = []
        width = 0
        source, written = self._reach(self._active)
        while self.has_room(rows := len(self._active) + len(admitted)):
            row = self.turns.peek()
            assert row is not None  # noqa: S101  (has_room looked)
            width = max(width, len(row.prompt.ids))
            source, written = max(source, len(row.prompt.ids)), max(written, row.limit)
            if rows and self.cost.of(rows + 1, source, written) > self.cache_bytes:
                break
            if admitted and width * (len(admitted) + 1) > self.encode_tokens:
                break
            admitted.append(self.turns.take())
        return admitted

    def _seats(self, admitted: list[ActiveRow]) -> int:
        """How many slots to have: as many as there are rows, and twice those there were where that is
        not enough, so that they rarely grow."""
        rows = [*self._active, *admitted]
        if len(rows) <= self._runner.slots:
            return len(rows)
        roomy = min(2 * self._runner.slots, self.max_rows + LATE_SEATS)
        if each := self.cost.of(1, *self._reach(rows)):
            roomy = min(roomy, self.cache_bytes // each)
        return max(len(rows), roomy)

    def _keep_to_budget(self, seats: int, admitted: list[ActiveRow]) -> None:
        """Cut the slots down to what is needed where they would grow beyond the budget: what was there for many
        short rows is not there for a few long ones as well, nor the other way round."""
        rows = [*self._active, *admitted]
        source, _ = self._reach(rows)
        written = max(len(row.generated) for row in rows) + 1
        lengths = (max(source, self._runner.capacity[0]), max(written, self._runner.capacity[1]))
        if self.cost.of(max(seats, self._runner.slots), *lengths) > self.cache_bytes:
            self._runner.resize(seats, source, written)

    def _reach(self, rows: list[ActiveRow]) -> tuple[int, int]:
        """The longest source, and the most tokens that any may write."""
        return (
            max((len(row.prompt.ids) for row in rows), default=0),
            max((row.limit for row in rows), default=0),
        )

    def _rules_of(self, row: ActiveRow) -> LogitsProcessorList:
        return output_rules(
            self.config,
            ends=self.ends,
            max_new_tokens=row.limit,
            sources=torch.tensor([row.prompt.ids], device=self.device),
        )

    def _ruled(self, logits: torch.Tensor) -> torch.Tensor:
        """Each row by itself: many rules look at how long the whole pass is, and rows differ in that."""
        for place, row in enumerate(self._active):
            if rules := self._rules[row]:
                so_far = torch.tensor([[self.start, *row.generated]], device=self.device)
                logits[place] = rules(so_far, logits[place : place + 1])[0]  # type: ignore[arg-type]
        return logits

    def _free(self, finished: set[int]) -> None:
        for slot in sorted(finished, reverse=True):
            last = len(self._active) - 1
            del self._rules[self._active[slot]]
            # Going down, whatever is last here is a row that goes on, or this very one.
            if slot != last:
                row = self._active[last]
                self._runner.move(last, slot, len(row.generated))
                self._active[slot] = row
            self._active.pop()
            self._runner.drop_last()


def make_runner(loaded: LoadedModel) -> CrossRunner:
    """For a model that :func:`workers.ranks.engine.crossing.measure_crossing` has proved."""
    return CrossRunner(loaded.model, loaded.pad_token, target_positions(loaded.model) or 1)
