"""Text generation by continuous batching: the scheduler of rows over a model runner.

A step admits waiting rows into free slots (their prompts are computed together), then decodes one
token for every active row. A finished row leaves at once and the last active row moves into the
hole, so that the active rows are always those of slots ``0 .. n-1``.
"""

from __future__ import annotations

from collections import Counter

from workers.ranks.engine.generating import (
    ENCODE_TOKENS,
    LATE_SEATS,
    ActiveRow,
    Answer,
    Endings,
    Generating,
    count_by_owner,
)
from workers.ranks.engine.models import LoadedModel
from workers.ranks.engine.prompts import Prompt
from workers.ranks.engine.runners import Runner


class TextGeneration(Generating):
    """See :class:`workers.ranks.engine.computation.Computation`.

    Args:
        cache_bytes: what the rows' caches may take together. A row alone is always tried.
    """

    def __init__(self, loaded: LoadedModel, runner: Runner, cache_bytes: int) -> None:
        super().__init__(loaded, Endings(loaded, continues=True), runner.most)
        self._runner = runner
        self._cache_bytes = cache_bytes
        self._prefill_tokens = ENCODE_TOKENS[self.device.type]
        self._active: list[ActiveRow] = []

    @property
    def active(self) -> list[ActiveRow]:
        return self._active

    def advance(self) -> dict[str, int]:
        """Admit rows, then generate one token for each active row."""
        self._free({place for place, row in enumerate(self._active) if row.answer.closed})
        tokens: Counter[str] = Counter()
        if admitted := self._admit():
            first = len(self._active)
            self._active += admitted
            reach = max(self.reach(row) for row in self._active)
            self._runner.reserve(reach, self._seats(reach))
            logits = self._runner.prefill(first, [row.tokens for row in admitted])
            tokens += count_by_owner(admitted)
            self._free({first + place for place in self.accept(admitted, logits)})
        if self._active:
            tokens += count_by_owner(self._active)
            logits = self._runner.decode(
                [row.generated[-1] for row in self._active], [row.position for row in self._active]
            )
            self._free(self.accept(self._active, logits))
        return tokens

    def drop_rows(self) -> list[ActiveRow]:
        """What they generated so far is kept, as part of the prompt."""
        rows, self._active = self._active, []
        self._runner.reset()
        return rows

    def begin(self, prompt: Prompt, answer: Answer, sample: int) -> ActiveRow:
        return ActiveRow(prompt, prompt.generation.max_new_tokens, answer, sample)

    def _admit(self) -> list[ActiveRow]:
        """Take rows whose turn it is, while slots, memory and the prefill budget last."""
        admitted: list[ActiveRow] = []
        width = 0
        reach = max((self.reach(row) for row in self._active), default=0)
        while self.has_room(rows := len(self._active) + len(admitted)):
            row = self.turns.peek()
            assert row is not None  # noqa: S101  (has_room looked)
            reach = max(reach, self.reach(row))
            width = max(width, len(row.tokens))
            if rows and (rows + 1) * reach * self._runner.bytes_per_position > self._cache_bytes:
                break
            if admitted and width * (len(admitted) + 1) > self._prefill_tokens:
                break
            admitted.append(self.turns.take())
        return admitted

    def _seats(self, reach: int) -> int:
        """How many slots to have: as many as there are rows, and twice those there were where that is
        not enough, so that they rarely grow."""
        needed = len(self._active)
        if needed <= self._runner.slots:
            return needed
        roomy = min(2 * self._runner.slots, self.max_rows + LATE_SEATS)
        if row_bytes := reach * self._runner.bytes_per_position:
            roomy = min(roomy, self._cache_bytes // row_bytes)
        return max(needed, roomy)

    def _free(self, finished: set[int]) -> None:
        for slot in sorted(finished, reverse=True):
            last = len(self._active) - 1
            # Going down, whatever is last here is a row that goes on, or this very one.
            if slot != last:
                row = self._active[last]
                self._runner.move(last, slot, row.position)
                self._active[slot] = row
            self._active.pop()
