"""Text generation by continuous batching: the scheduler of rows over a model runner.

A step admits waiting rows into free slots (their prompts are computed together), then decodes one
token for every active row. A finished row leaves at once and the last active row moves into the
hole, so that the active rows are always those of slots ``0 .. n-1``. What the prompt of a row begins with
is copied where another row had it computed (``prefixes.py``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

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
from workers.ranks.engine.prefixes import LEAST, SHARE, Prefix, Prefixes, common
from workers.ranks.engine.prompts import Prompt
from workers.ranks.engine.runners import Runner


@dataclass(slots=True)
class Admitted:
    """A row that comes into computation."""

    row: ActiveRow
    prefix: Prefix | None
    known: int
    """Tokens that are taken from the prefix."""
    lends: int = 0
    """Tokens of its beginning that a row which waits could use."""


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
        self._joining: list[Admitted] = []
        """Taken from those that wait, and not active yet."""
        self._prefixes = Prefixes(int(cache_bytes * SHARE), runner.bytes_per_position)

    @property
    def active(self) -> list[ActiveRow]:
        return self._active

    def advance(self) -> dict[str, int]:
        """Admit rows, then generate one token for each active row."""
        closed = {place for place, row in enumerate(self._active) if row.answer.closed}
        for place in closed:
            self.turns.done(self._active[place])
        self._free(closed)
        tokens: Counter[str] = Counter()
        if admitted := self._admit():
            first = len(self._active)
            rows = [each.row for each in admitted]
            self._active += rows
            self._joining = []
            reach = max(self.reach(row) for row in self._active)
            self._runner.reserve(reach, self._seats(reach))
            logits = self._prefill(first, admitted)
            tokens += count_by_owner(rows)
            self._free({first + place for place in self.accept(rows, logits)})
        if self._active:
            tokens += count_by_owner(self._active)
            logits = self._runner.decode(
                [row.generated[-1] for row in self._active], [row.position for row in self._active]
            )
            self._free(self.accept(self._active, logits))
        return tokens

    def drop_rows(self) -> list[ActiveRow]:
        """What they generated so far is kept, as part of the prompt."""
        rows = [*self._active, *(each.row for each in self._joining)]
        self._active, self._joining = [], []
        self._prefixes.clear()
        self._runner.reset()
        return rows

    def begin(self, prompt: Prompt, answer: Answer, sample: int) -> ActiveRow:
        return ActiveRow(prompt, prompt.generation.max_new_tokens, answer, sample)

    def _admit(self) -> list[Admitted]:
        """Take rows whose turn it is, while slots, memory and the prefill budget last; those that are
        computed whole come first."""
        admitted = self._joining = []
        width = 0
        reach = max((self.reach(row) for row in self._active), default=0)
        while self.has_room(rows := len(self._active) + len(admitted)):
            row = self.turns.peek()
            assert row is not None  # noqa: S101  (has_room looked)
            tokens = row.tokens
            prefix, known = self._known(tokens)
            if self._borrows(tokens, known, admitted):
                break
            reach = max(reach, self.reach(row))
            width = max(width, len(tokens) - known)
            needed = (rows + 1) * reach * self._runner.bytes_per_position + self._prefixes.bytes
            if rows and needed > self._cache_bytes:
                break
            if admitted and width * (len(admitted) + 1) > self._prefill_tokens:
                break
            admitted.append(Admitted(self.turns.take(), prefix, known))
        return sorted(admitted, key=lambda each: each.known > 0)

    def _known(self, tokens: Sequence[int]) -> tuple[Prefix | None, int]:
        """What is known of a prompt's beginning: stored, or in the slot of a row that begins alike."""
        prefix, known = self._prefixes.longest(tokens)
        for slot, row in enumerate(self._active):
            shared = common(row.prompt.ids, tokens, known + LEAST)
            if self._prefixes.fits(shared):
                states = self._runner.read(slot, shared)
                prefix, known = Prefix(tuple(tokens[:shared]), states), shared
                self._prefixes.add(prefix)
        return prefix, known

    def _borrows(self, tokens: Sequence[int], known: int, admitted: Sequence[Admitted]) -> bool:
        """Whether a row waits a step, as one that is admitted now computes the beginning of its prompt."""
        for other in admitted:
            shared = common(other.row.prompt.ids, tokens, known + LEAST)
            if self._prefixes.fits(shared):
                other.lends = max(other.lends, shared)
                return True
        return False

    def _prefill(self, first: int, admitted: Sequence[Admitted]) -> torch.Tensor:
        """Last logits [rows, vocabulary] of the prompts in the slots from ``first`` on."""
        whole = sum(each.known == 0 for each in admitted)
        prompts = [each.row.tokens for each in admitted]
        logits: list[torch.Tensor] = []
        if whole:
            logits.append(self._runner.prefill(first, prompts[:whole]))
        if whole < len(admitted):
            for slot, each in enumerate(admitted[whole:], first + whole):
                assert each.prefix is not None  # noqa: S101  (something is known of it)
                self._runner.write(slot, each.prefix.states, each.known)
            known = [each.known for each in admitted[whole:]]
            logits.append(self._runner.prefill(first + whole, prompts[whole:], known))
        for slot, each in enumerate(admitted, first):
            if each.lends:
                states = self._runner.read(slot, each.lends)
                self._prefixes.add(Prefix(tuple(each.row.tokens[: each.lends]), states))
        return torch.cat(logits)

    def _seats(self, reach: int) -> int:
        """How many slots to have: as many as there are rows; and where that is more than there were, as many
        as those that wait will want as well, so that they rarely grow: growing copies them all."""
        needed = len(self._active)
        if needed <= self._runner.slots:
            return needed
        usual = self.max_rows if needed <= self.max_rows else self.max_rows + LATE_SEATS
        roomy = min(max(2 * self._runner.slots, needed + len(self.turns)), usual)
        if row_bytes := reach * self._runner.bytes_per_position:
            roomy = min(roomy, (self._cache_bytes - self._prefixes.bytes) // row_bytes)
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
