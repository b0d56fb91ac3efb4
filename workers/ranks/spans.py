"""Which tokens of a text are learned, where that is known by characters."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from shared.examples import Chat
from shared.records import BadRow
from workers.ranks.loading import LoadError

Span = tuple[int, int]
"""Characters of a text, from and up to."""
T = TypeVar("T")

_MARKS_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids and, for each, whether it is learned."""

    tokens: list[int]
    learned: NDArray[np.bool_]


def encode_spans(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    spans: Sequence[Sequence[Span]],
    *,
    special: bool,
) -> list[Encoded]:
    """Tokenise texts whole and mark the tokens that touch one of the text's spans.

    Whole, because that is how the tokens fall where a prompt and its answer meet: a token that holds
    characters of both is learned. ``special``: with the tokenizer's special tokens, never learned.

    Raises:
        LoadError: the tokenizer does not say which characters a token stands for.
    """
    if not texts:
        return []
    if not tokenizer.is_fast:
        raise LoadError(
            "model_unsuitable",
            "the model's tokenizer does not say where its tokens are in a text, which prompts and "
            "chats need",
            "Save it as a fast tokenizer (tokenizer.json), or train on plain text.",
        )
    encoded = tokenizer(
        list(texts),
        add_special_tokens=special,
        truncation=False,
        return_offsets_mapping=True,
        verbose=False,
    )
    pieces = zip(encoded["input_ids"], encoded["offset_mapping"], spans, strict=True)
    return [Encoded(ids, touching(offsets, chosen)) for ids, offsets, chosen in pieces]


def touching(offsets: Sequence[Span], spans: Sequence[Span]) -> NDArray[np.bool_]:
    """Whether each token shares a character with a span.

    Byte-level tokenizers leave white space out of their offsets, so that a token of nothing else is
    empty, at its own end: it belongs where it ends. A special token is empty at 0.
    """
    places = np.array(offsets, np.int64).reshape(-1, 2)
    begins, ends = places[:, 0], places[:, 1]
    learned = np.zeros(len(places), np.bool_)
    for first, last in spans:
        before_end = np.where(begins < ends, begins < last, ends <= last)
        learned |= (ends > first) & before_end
    return learned


def runs(learned: NDArray[np.bool_]) -> list[int]:
    """Where the runs of True begin and end, one after another: [begin, end, begin, end, ...]."""
    edges = np.diff(np.concatenate([[0], learned.astype(np.int8), [0]]))
    return [int(place) for place in np.flatnonzero(edges)]


def encode_chat(
    tokenizer: PreTrainedTokenizerBase, chat: Chat, *, last_only: bool = False
) -> Encoded:
    """A conversation as the model's chat template writes it; the assistant's turns are learned, each
    from after the words that prompt it to the end that the template gives it.

    A template that marks what is generated (``{% generation %}``) is taken at its word. With any other
    the conversation's beginnings are rendered: up to a turn with the prompt for it, and up to its end.

    Args:
        last_only: Of the assistant's turns only the last one is learned.

    Raises:
        BadRow: the template refuses the conversation, or writes a beginning otherwise when more follows.
        LoadError: as ``encode_spans``.
    """
    messages = [{"role": role, "content": content} for role, content in chat.turns]
    if _marks_generation(tokenizer):
        text, spans = _taken(lambda: _marked_spans(tokenizer, messages))
    else:
        text, spans = assistant_spans(messages, partial(_render, tokenizer))
    if last_only:
        spans = spans[-1:]
    # A rendered chat has its special tokens from the template already.
    return encode_spans(tokenizer, [text], [spans], special=False)[0]


def assistant_spans(
    messages: list[dict[str, str]], render: Callable[[list[dict[str, str]], bool], str]
) -> tuple[str, list[Span]]:
    """The whole conversation, and where in it the assistant's turns are.

    Args:
        render: Writes turns, with or without the prompt for the assistant's next one.

    Raises:
        BadRow: ``chat_template_inconsistent``.
    """
    whole = render(messages, False)
    spans: list[Span] = []
    for turn, message in enumerate(messages):
        if message["role"] != "assistant" or not message["content"].strip():
            continue
        before = render(messages[:turn], True)
        after = render(messages[: turn + 1], False)
        if not (whole.startswith(after) and after.startswith(before) and before != after):
            raise BadRow(
                "chat_template_inconsistent",
                "the model's chat template writes the beginning of the conversation in another way "
                f"when more turns follow (turn {turn + 1}): what the assistant says in it cannot "
                "be found",
                hint="Mark it in the template with {% generation %}, or give each answer a row of its "
                "own, as the last turn.",
            )
        spans.append((len(before), len(after)))
    return whole, spans


def _marks_generation(tokenizer: PreTrainedTokenizerBase) -> bool:
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    return isinstance(template, str) and _MARKS_GENERATION.search(template) is not None


def _marked_spans(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]
) -> tuple[str, list[Span]]:
    # Not by `return_assistant_tokens_mask`: it loses every turn from one on that begins with white
    # space, where the tokenizer leaves that out of its offsets.
    names: dict[str, Any] = dict(tokenizer.special_tokens_map)
    answer: Any = render_jinja_template(
        conversations=[messages],
        chat_template=tokenizer.get_chat_template(),
        return_assistant_tokens_mask=True,
        **names,
    )
    rendered, spans = answer
    return str(rendered[0]), [(int(begin), int(end)) for begin, end in spans[0]]


def _render(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], prompt: bool
) -> str:
    def render() -> str:
        return str(
            tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
        )

    return _taken(render)


def _taken(render: Callable[[], T]) -> T:
    try:
        return render()
    except Exception as error:  # a template is a program of the model's author
        lines = str(error).strip().splitlines()
        raise BadRow(
            "invalid_messages",
            "the model's chat template refuses the conversation: "
            + (lines[0] if lines else type(error).__name__)[:200],
            hint="Most templates want turns of user and assistant to alternate, the user first.",
        ) from None
