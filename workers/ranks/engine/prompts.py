"""From requests to token ids, under the limits of model and job."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from shared.rows import row_error
from shared.specs import Generation, InferSpec
from workers.ranks.engine.inputs import Request, RowProblem
from workers.ranks.engine.windows import cut, frame_of, no_seams, seams

DEFAULTS = Generation()
AT_ONCE = 1 << 20
"""Characters that are tokenised together: a tokenizer takes some 150 bytes for each while it does."""


@dataclass(frozen=True, slots=True)
class Word:
    """A word of a prompt: where it is in its source (characters of a text, or the place in a list),
    and the first and the last of its tokens; None where it has none, or was cut away."""

    start: int
    end: int
    token: int | None
    last: int | None = None


@dataclass(frozen=True, slots=True)
class Prompt:
    """A row as the model takes it, or a part of one. ``source`` and ``words`` are there for the tasks
    whose output points back into the input."""

    row: int
    id: Any
    ids: tuple[int, ...]
    source: str | tuple[str, ...] = ""
    words: tuple[Word, ...] = ()
    types: tuple[int, ...] = ()
    """For each token which text of a pair it is of, where the model wants to know."""
    scored: tuple[int, ...] = ()
    """Places of the tokens whose likelihood is asked for."""
    part: int = 0
    parts: int | None = None
    """Which part of the row this is, and how many there are; None: it is the whole row."""
    generation: Generation = DEFAULTS
    """For the tasks that write text."""
    own_seed: bool = False
    """See :class:`workers.ranks.engine.inputs.Request`."""
    owner: str = ""
    """The attempt that it belongs to."""


class Encoder(Protocol):
    """Makes prompts of requests."""

    def encode(self, requests: Sequence[Request]) -> tuple[list[Prompt], list[dict[str, Any]]]:
        """Prompts, and results for the rows that got an error instead."""


class InputLimit:
    """How many tokens of input a row may have, and what is said about more.

    Args:
        context: tokens that the model takes.
        reserved: how many of them the output needs.
    """

    def __init__(self, spec: InferSpec, context: int, reserved: int = 0) -> None:
        self._context = context
        self._reserved = reserved
        self._own = spec.max_length
        self._cut = spec.too_long != "error"
        self.tokens = context - reserved
        if spec.max_length is not None:
            self.tokens = min(self.tokens, spec.max_length)

    def must_cut(self, tokens: int) -> bool:
        """Whether an input is cut to ``self.tokens``, or into windows of them; else it is taken whole.

        Raises:
            RowProblem: too_long.
        """
        if tokens <= self.tokens:
            return False
        if not self._cut or self.tokens < 1:
            raise RowProblem("too_long", self._why(tokens))
        return True

    def _why(self, tokens: int) -> str:
        if self.tokens == self._own:
            return f"the input has {tokens} tokens; max_length allows {self.tokens}"
        if self._reserved:
            return (
                f"the input has {tokens} tokens and max_new_tokens is {self._reserved}: together over "
                f"the model's context of {self._context}"
            )
        return f"the input has {tokens} tokens; the model takes {self._context}"


class PromptEncoder:
    """Tokenises the requests of one job.

    Args:
        context: tokens that a row may have; for text-generation with its output.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, spec: InferSpec, context: int) -> None:
        self._tokenizer = tokenizer
        self._spec = spec
        self._of_the_job = spec.sampling
        self._context = context
        self._continues = spec.task == "text-generation"
        self._limits: dict[int, InputLimit] = {}
        self._frame = frame_of(tokenizer) if spec.too_long == "split" else None

    def encode(self, requests: Sequence[Request]) -> tuple[list[Prompt], list[dict[str, Any]]]:
        """See :class:`Encoder`."""
        prompts: list[Prompt] = []
        errors: list[dict[str, Any]] = []
        texts: list[tuple[Request, str]] = []
        chats: list[tuple[Request, str]] = []
        for request in requests:
            try:
                if request.messages is not None:
                    chats.append((request, self._render(request.messages)))
                else:
                    texts.append((request, self._prepare(request.text or "")))
            except RowProblem as problem:
                errors.append(row_error(request.row, problem.code, problem.message, id=request.id))
        # A rendered chat has its special tokens from the template already.
        for group, add_special_tokens in ((texts, True), (chats, False)):
            for some in _few(group):
                encoded = self._tokenise([text for _, text in some], add_special_tokens)
                for (request, text), ids in zip(some, encoded, strict=True):
                    try:
                        prompts += self._prompts(request, text, ids)
                    except RowProblem as problem:
                        errors.append(
                            row_error(request.row, problem.code, problem.message, id=request.id)
                        )
        return prompts, errors

    def _prepare(self, text: str) -> str:
        """What is tokenised for a text."""
        return text

    def _prompts(self, request: Request, text: str, ids: list[int]) -> list[Prompt]:
        if self._frame is None or not self._limit(request).must_cut(len(ids)):
            return [self._prompt(request, text, self._fit(request, text, ids))]
        inside = self._frame.inside(ids)
        room = self._frame.room(self._limit(request).tokens)
        windows = cut(len(inside), room, self._seams(text))
        whole = self._prompt(request, text, [])
        return [
            replace(whole, ids=self._frame.around(inside[start:end]), part=part, parts=len(windows))
            for part, (start, end) in enumerate(windows)
        ]

    def _seams(self, text: str) -> Callable[[int], int]:
        if not self._tokenizer.is_fast:
            return no_seams
        encoded = self._tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        return seams(text, encoded["offset_mapping"])

    def _prompt(self, request: Request, text: str, ids: list[int]) -> Prompt:  # noqa: ARG002
        generation = self._options(request)
        return Prompt(
            request.row, request.id, tuple(ids), generation=generation, own_seed=request.own_seed
        )

    def _options(self, request: Request) -> Generation:
        return request.generation or self._of_the_job

    def _render(self, messages: list[dict[str, str]]) -> str:
        if not self._tokenizer.chat_template:
            raise RowProblem(
                "no_chat_template",
                "the model has no chat template: give a 'prompt' in place of 'messages'",
            )
        try:
            text = self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        except TemplateError as error:
            raise RowProblem(
                "invalid_messages", f"the model's chat template refuses them: {error}"
            ) from None
        except Exception as error:  # a template is a program of the model's author
            raise RowProblem(
                "invalid_messages", f"the model's chat template fails: {error!r}"
            ) from None
        return str(text)

    def _tokenise(self, texts: list[str], add_special_tokens: bool) -> list[list[int]]:
        if not texts:
            return []
        encoded = self._tokenizer(
            texts, add_special_tokens=add_special_tokens, truncation=False, verbose=False
        )
        ids: list[list[int]] = encoded["input_ids"]
        return ids

    def _limit(self, request: Request) -> InputLimit:
        reserved = self._options(request).max_new_tokens if self._continues else 0
        if reserved not in self._limits:
            self._limits[reserved] = InputLimit(self._spec, self._context, reserved)
        return self._limits[reserved]

    def _fit(self, request: Request, text: str, ids: list[int]) -> list[int]:
        if not ids:
            raise RowProblem("empty_text", "the text has no tokens for this model")
        if not self._limit(request).must_cut(len(ids)):
            return ids
        limit = self._limit(request).tokens
        if self._continues:
            # What comes last is what is continued. For messages that cuts the oldest ones.
            return ids[-limit:]
        # The tokenizer cuts by itself, so that the closing special token stays.
        cut: list[int] = self._tokenizer(text, truncation=True, max_length=limit)["input_ids"]
        return cut


def _few(group: Sequence[tuple[Request, str]]) -> Iterator[list[tuple[Request, str]]]:
    """The group in pieces of so many characters, or of one text that has more."""
    some: list[tuple[Request, str]] = []
    size = 0
    for request, text in group:
        if some and size + len(text) > AT_ONCE:
            yield some
            some, size = [], 0
        some.append((request, text))
        size += len(text)
    if some:
        yield some
