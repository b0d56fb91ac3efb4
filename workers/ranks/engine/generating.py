"""What all generation has in common: rows on their way, the next token of each, and when one is done."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from shared.rows import result, row_error
from shared.specs import Generation
from workers.ranks.engine.computation import Answered, Step
from workers.ranks.engine.constraints import Constraint, Constraints
from workers.ranks.engine.device import is_out_of_memory, release_unused
from workers.ranks.engine.likelihoods import Likelihoods, adjust
from workers.ranks.engine.models import LoadedModel
from workers.ranks.engine.parts import Parts, Piece
from workers.ranks.engine.prompts import Prompt
from workers.ranks.engine.sampling import Draw, next_tokens
from workers.ranks.engine.text import Detokenizer
from workers.ranks.engine.turns import Turns

ENCODE_TOKENS = {"cpu": 1024, "cuda": 16_384}
"""Padded prompt tokens computed in one pass: bounds both memory and how long a step takes."""
LATE_SEATS = 4
"""Rows in computation beyond the usual number, of attempts that have none there yet."""
_DETOKENIZERS = 256
"""Sets of stop strings that are kept prepared; rows may bring any number."""


class Answer:
    """The texts of one row of the input: one, or as many as it asks for."""

    def __init__(self, prompt: Prompt) -> None:
        self.prompt = prompt
        self.closed = False
        self._texts: dict[int, dict[str, Any]] = {}
        self._tokens = 0

    def add(self, sample: int, output: dict[str, Any], tokens: int) -> dict[str, Any] | None:
        """File a text; the row's result once it has all."""
        self._texts[sample] = output
        self._tokens += tokens
        n = self.prompt.generation.n
        if len(self._texts) < n:
            return None
        self.closed = True
        whole = dict(self._texts[0])
        if n > 1:
            whole["choices"] = [self._texts[k] for k in range(n)]
        return result(
            self.prompt.row,
            id=self.prompt.id,
            output=whole,
            input_tokens=len(self.prompt.ids),
            output_tokens=self._tokens,
        )

    def fail(self, code: str, message: str) -> dict[str, Any]:
        """The row's error. Its other texts are not wanted any more."""
        self.closed = True
        return row_error(self.prompt.row, code, message, id=self.prompt.id)


@dataclass(slots=True, eq=False)
class ActiveRow:
    """A text on its way: its prompt, and what was generated so far."""

    prompt: Prompt
    limit: int
    """Tokens that it may have."""
    answer: Answer
    sample: int = 0
    """Which of the row's texts."""
    start: tuple[int, ...] = ()
    """What the model's own output begins with; empty where it continues the prompt."""
    generated: list[int] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    constraint: Constraint | None = None
    """Where the text is under its schema, from its first token on."""

    @property
    def schema(self) -> str | None:
        return self.options.json_schema

    @property
    def options(self) -> Generation:
        return self.prompt.generation

    @property
    def tokens(self) -> list[int]:
        return [*self.prompt.ids, *self.generated]

    @property
    def read(self) -> list[int]:
        """What the next token follows, in one sequence."""
        return [*self.start, *self.generated] if self.start else self.tokens

    @property
    def position(self) -> int:
        """Where the newest token of a text that goes on will be written; as many are in the cache."""
        return len(self.prompt.ids) + len(self.generated) - 1

    @property
    def draw(self) -> Draw:
        name: int | str = "own" if self.prompt.own_seed else self.prompt.row
        if self.prompt.part:
            name = f"{name}:{self.prompt.part}"
        if self.sample:
            name = f"{name}.{self.sample}"
        return Draw(self.options, name, len(self.generated))


class Endings:
    """Says when a generation is over, and the output that it then has.

    Args:
        continues: the generated text goes on where the prompt ends; otherwise it is a text of its own.
        forced_end: the last token that fits is an end token, whatever the model wanted.
    """

    def __init__(self, loaded: LoadedModel, *, continues: bool, forced_end: bool = False) -> None:
        self._ends = end_tokens(loaded)
        self._tokenizer = loaded.tokenizer
        self._detokenizers: dict[tuple[str, ...], Detokenizer] = {}
        self._continues = continues
        self._forced_end = forced_end

    def tokens(self, row: ActiveRow) -> frozenset[int]:
        """Every token that ends a row's text."""
        own = row.options.stop_tokens
        return self._ends.union(own) if own else self._ends

    def output(self, row: ActiveRow) -> dict[str, Any] | None:
        """The output of a row if its newest token finishes it. An end token counts as generated and
        is no text."""
        before = row.prompt.ids if self._continues else ()
        full = len(row.generated) >= row.limit
        detokenizer = self._detokenizer(row.options.stop)
        if row.generated[-1] in self.tokens(row):
            text = detokenizer.text(before, row.generated[:-1])
            return _output(row, text, "length" if full and self._forced_end else "stop")
        if row.constraint is not None and row.constraint.done:
            return _output(row, detokenizer.text(before, row.generated), "stop")
        before_stop = detokenizer.stopped(before, row.generated)
        if before_stop is not None:
            return _output(row, before_stop, "stop")
        if full:
            return _output(row, detokenizer.text(before, row.generated), "length")
        return None

    def _detokenizer(self, stop: tuple[str, ...]) -> Detokenizer:
        if stop not in self._detokenizers:
            if len(self._detokenizers) >= _DETOKENIZERS:
                self._detokenizers.clear()
            self._detokenizers[stop] = Detokenizer(self._tokenizer, stop)
        return self._detokenizers[stop]


def _output(row: ActiveRow, text: str, reason: str) -> dict[str, Any]:
    output: dict[str, Any] = {"text": text, "finish_reason": reason}
    if row.options.logprobs is not None:
        output["logprobs"] = row.logprobs
    return output


class Generating(ABC):
    """See :class:`workers.ranks.engine.computation.Computation`. A way of generating adds how rows are
    admitted and computed: :meth:`advance` and :meth:`drop_rows`."""

    def __init__(self, loaded: LoadedModel, endings: Endings, most: int | None = None) -> None:
        """``most``: rows that the model can compute together; None: any number."""
        self.turns: Turns[ActiveRow] = Turns(lambda row: row.prompt.owner)
        self.device = loaded.key.device
        self._most = most
        self._memory_rows: int | None = None
        """Rows that memory has room for, once it has run out."""
        self._endings = endings
        self._likelihoods = Likelihoods(loaded.tokenizer)
        self._constraints = Constraints(loaded, end_tokens(loaded))
        # Kept across a step that runs out of memory after some of its rows were finished.
        self._finished: list[Answered] = []
        self._parts = Parts(unite_texts)

    @abstractmethod
    def advance(self) -> dict[str, int]:
        """Compute a little; how many tokens were generated for each owner. May run out of memory."""

    @abstractmethod
    def drop_rows(self) -> list[ActiveRow]:
        """Take the rows in computation out of it, and give their memory back."""

    @property
    @abstractmethod
    def active(self) -> list[ActiveRow]:
        """The rows in computation."""

    @abstractmethod
    def begin(self, prompt: Prompt, answer: Answer, sample: int) -> ActiveRow:
        """A text that has nothing yet."""

    def reach(self, row: ActiveRow) -> int:
        """Tokens that the row has at the very most when it is finished."""
        return len(row.prompt.ids) + row.limit

    def join(self, owner: str, rows: int) -> None:
        self.turns.join(owner, rows if self._most is None else min(rows, self._most))

    def leave(self, owner: str) -> None:
        for row in self.active:
            if row.prompt.owner == owner:
                row.answer.closed = True
        self.turns.leave(owner)
        self._parts.leave(owner)

    @property
    def max_rows(self) -> int:
        """Rows that may be in computation together."""
        bounds = (self.turns.largest, self._most, self._memory_rows)
        return min(bound for bound in bounds if bound is not None)

    @property
    def busy(self) -> bool:
        return bool(len(self.turns) or self.active or self._finished)

    def wants_rows(self, owner: str) -> bool:
        return self.turns.waiting(owner) < self.max_rows

    def has_room(self, rows: int) -> bool:
        """Whether the row whose turn it is may join ``rows`` others. One that would be the only one of
        its owner may take a seat beyond the usual number: a job of one row need not wait until some
        row of a long one ends."""
        row = self.turns.peek()
        if row is None:
            return False
        if rows < self.max_rows:
            return True
        late = (
            self._most is None and self._memory_rows is None and rows < self.max_rows + LATE_SEATS
        )
        return late and self.turns.inside(row.prompt.owner) == 0

    def add(self, prompts: Sequence[Prompt]) -> None:
        # Rows of similar length together: less padding, less masked memory in decode.
        for prompt in sorted(prompts, key=lambda prompt: (-len(prompt.ids), prompt.row)):
            answer = Answer(prompt)
            schema = prompt.generation.json_schema
            if schema is not None and (problem := self._constraints.problem(schema)) is not None:
                self._file(prompt, answer.fail("invalid_generation", f"schema: {problem}"))
                continue
            self.turns.add(
                self.begin(prompt, answer, sample) for sample in range(prompt.generation.n)
            )

    def step(self) -> Step:
        tokens: dict[str, int] = {}
        out_of_memory = False
        try:
            with torch.inference_mode():
                tokens = self.advance()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            out_of_memory = True
        if out_of_memory:
            # Here the failed pass's tensors are gone: inside `except` the traceback holds them.
            self._start_over()
        results, self._finished = self._finished, []
        return Step(results, tokens)

    def accept(self, rows: Sequence[ActiveRow], logits: torch.Tensor) -> set[int]:
        """Choose the next token of each row; the places of the rows that are finished by it, or not
        wanted any more.

        Args:
            logits: [rows, vocabulary].
        """
        ends = [self._endings.tokens(row) for row in rows]
        likely = self._constraints.apply(adjust(logits, rows, ends), rows)
        chosen = next_tokens(likely, [row.draw for row in rows])
        told = self._likelihoods.of(logits, chosen, [row.options.logprobs for row in rows])
        finished: set[int] = set()
        for place, (row, token) in enumerate(zip(rows, chosen, strict=True)):
            if self.take(row, token, told[place]):
                finished.add(place)
        for place in finished:
            self.turns.done(rows[place])
        return finished

    def take(self, row: ActiveRow, token: int, told: dict[str, Any] | None) -> bool:
        """File the next token of a row; whether the row is finished by it, or not wanted any more.

        Args:
            told: its log-probability and those of others, where the row asks for them.
        """
        row.generated.append(token)
        if told is not None:
            row.logprobs.append(told)
        if row.constraint is not None and not row.answer.closed:
            row.constraint.take(token)
            if (problem := row.constraint.problem) is not None:
                self._fail(row.answer, "invalid_generation", f"schema: {problem}")
        if row.answer.closed:
            return True
        output = self._endings.output(row)
        if output is None:
            return False
        whole = row.answer.add(row.sample, output, len(row.generated))
        if whole is not None:
            self._file(row.prompt, whole)
        return True

    def _start_over(self) -> None:
        """Go on with half the rows."""
        dropped = self.drop_rows()
        rows = [row for row in dropped if not row.answer.closed]
        for row in dropped:
            if row.answer.closed:
                self.turns.done(row)
        release_unused(self.device)
        if len(rows) == 1:
            # The culprit is found: the others may share the memory as before.
            self._memory_rows = None
            message = f"{self.reach(rows[0])} tokens do not fit into the device's memory"
            self._fail(rows[0].answer, "out_of_memory", message)
            self.turns.done(rows[0])
            return
        self._memory_rows = max(1, len(rows) // 2)
        print(f"out of memory with {len(rows)} rows: going on with {self._memory_rows}", flush=True)
        self.turns.give_back(rows)

    def _fail(self, answer: Answer, code: str, message: str) -> None:
        """End a row with an error; its other texts that wait are dropped."""
        self._file(answer.prompt, answer.fail(code, message))
        self.turns.drop(lambda row: row.answer is answer)

    def _file(self, prompt: Prompt, found: dict[str, Any]) -> None:
        if (whole := self._parts.file(prompt, found)) is not None:
            self._finished.append(Answered(prompt.owner, whole))


def unite_texts(pieces: Sequence[Piece]) -> dict[str, Any]:
    """What was written for the windows of a text: one below the other."""
    outputs = [piece.output for piece in pieces]
    whole = {**_united(outputs), "windows": len(pieces)}
    if "choices" in outputs[0]:
        choices = zip(*(output["choices"] for output in outputs), strict=True)
        whole["choices"] = [_united(choice) for choice in choices]
    return whole


def _united(outputs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    reasons = {output["finish_reason"] for output in outputs}
    whole: dict[str, Any] = {
        "text": "\n".join(output["text"] for output in outputs),
        "finish_reason": "length" if "length" in reasons else "stop",
    }
    if "logprobs" in outputs[0]:
        whole["logprobs"] = [entry for output in outputs for entry in output["logprobs"]]
    return whole


def count_by_owner(rows: Sequence[ActiveRow]) -> Counter[str]:
    """How many of the rows are whose."""
    return Counter(row.prompt.owner for row in rows)


def end_tokens(loaded: LoadedModel) -> frozenset[int]:
    """Every token that ends a generation, by generation_config, config or tokenizer."""
    generation_config = loaded.model.generation_config
    for ids in (
        generation_config.eos_token_id if generation_config is not None else None,
        loaded.model.config.get_text_config().eos_token_id,
        loaded.tokenizer.eos_token_id,
    ):
        if ids is not None:
            return frozenset(ids if isinstance(ids, list | tuple) else [ids])
    return frozenset()
