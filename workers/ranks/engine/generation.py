"""Text generation by continuous batching: the scheduler of rows over a model runner.

A step admits waiting rows into free slots (their prompts are computed together), then decodes one
token for every active row. A finished row leaves at once and the last active row moves into the
hole, so that the active rows are always those of slots ``0 .. n-1``.
"""

from __future__ import annotations

from workers.ranks.engine.generating import (
    ENCODE_TOKENS,
    ActiveRow,
    Answer,
    Endings,
    Generating,
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
        super().__init__(loaded, Endings(loaded, continues=True), runner.slots)
        self._runner = runner
        self._cache_bytes = cache_bytes
        self._prefill_tokens = ENCODE_TOKENS[self.device.type]
        self._active: list[ActiveRow] = []

    @property
    def active(self) -> list[ActiveRow]:
        return self._active

    def advance(self) -> int:
        """Admit rows, then generate one token for each active row."""
        tokens = 0
        if admitted := self._admit():
            first = len(self._active)
            self._active += admitted
            self._runner.reserve(max(self.reach(row) for row in self._active))
            logits = self._runner.prefill(first, [row.tokens for row in admitted])
            tokens += len(admitted)
            self._free({first + place for place in self.accept(admitted, logits)})
        if self._active:
            tokens += len(self._active)
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
        """Take rows off the queue, in order, while slots, memory and the prefill budget last."""
        admitted: list[ActiveRow] = []
        width = 0
        reach = max((self.reach(row) for row in self._active), default=0)
        while self.waiting and len(self._active) + len(admitted) < self.max_rows:
            row = self.waiting[0]
            rows = len(self._active) + len(admitted) + 1
            reach = max(reach, self.reach(row))
            width = max(width, len(row.tokens))
            if rows > 1 and rows * reach * self._runner.bytes_per_position > self._cache_bytes:
                break
            if admitted and width * (len(admitted) + 1) > self._prefill_tokens:
                break
            admitted.append(self.waiting.popleft())
        return admitted

    def _free(self, finished: set[int]) -> None:
        for slot in sorted(finished, reverse=True):
            last = len(self._active) - 1
            # Going down, whatever is last here is a row that goes on, or this very one.
            if slot != last:
                row = self._active[last]
                self._runner.move(last, slot, row.position)
                self._active[slot] = row
            self._active.pop()
