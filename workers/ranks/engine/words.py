"""Prompts of words: which token stands for which word of a row.

A row of words is tokenised as in training, each word by itself. In a text the words are those of the
tokenizer, parted also at white space, which some tokenizers do not part at.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from shared.rows import row_error
from shared.specs import InferSpec
from workers.ranks.engine.inputs import Request, RowProblem
from workers.ranks.engine.prompts import InputLimit, Prompt, Word
from workers.ranks.engine.windows import Frame, frame_of
from workers.ranks.engine.word_windows import cut_words


class WordEncoder:
    """See :class:`workers.ranks.engine.prompts.Encoder`.

    Args:
        tokenizer: a fast one: only they tell which token is of which word.
        context: tokens that a row may have.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, spec: InferSpec, context: int) -> None:
        self._tokenizer = tokenizer
        self._limit = InputLimit(spec, context)
        self._token_by_token = spec.aggregation == "none"
        self._frame = frame_of(tokenizer) if spec.too_long == "split" else None

    def encode(self, requests: Sequence[Request]) -> tuple[list[Prompt], list[dict[str, Any]]]:
        """See :class:`workers.ranks.engine.prompts.Encoder`."""
        prompts: list[Prompt] = []
        errors: list[dict[str, Any]] = []
        for request in requests:
            try:
                prompts += self._prompts(request)
            except RowProblem as problem:
                errors.append(row_error(request.row, problem.code, problem.message, id=request.id))
        return prompts, errors

    def _prompts(self, request: Request) -> list[Prompt]:
        source = request.words if request.words is not None else request.text or ""
        encoding = self._tokenise(source)
        too_long = self._limit.must_cut(len(encoding.ids))
        if too_long and self._frame is None:
            encoding = self._tokenise(source, truncation=True, max_length=self._limit.tokens)
        if isinstance(source, str):
            ids: Sequence[int | None] = encoding.word_ids
            if self._token_by_token:
                ids = [None if word is None else token for token, word in enumerate(ids)]
            words = words_of_text(source, ids, encoding.offsets)
        else:
            words = words_of_list(len(source), encoding.word_ids)
        if all(word.token is None for word in words):
            raise RowProblem("empty_text", "no word of the row has a token for this model")
        prompt = Prompt(request.row, request.id, tuple(encoding.ids), source, words)
        if not too_long or self._frame is None:
            return [prompt]
        return self._windows(prompt, self._frame)

    def _windows(self, whole: Prompt, frame: Frame) -> list[Prompt]:
        windows = cut_words(whole.words, frame.room(self._limit.tokens))
        return [
            replace(
                whole,
                ids=frame.around(whole.ids[window.first : window.last]),
                words=tuple(_behind(word, len(frame.before)) for word in window.words),
                part=part,
                parts=len(windows),
            )
            for part, window in enumerate(windows)
        ]

    def _tokenise(self, source: str | tuple[str, ...], **options: Any) -> Any:
        words = not isinstance(source, str)
        encoded = self._tokenizer(
            list(source) if words else source, is_split_into_words=words, verbose=False, **options
        )
        return encoded[0]


def _behind(word: Word, tokens: int) -> Word:
    """A word with so many tokens before its own first ones."""
    if word.token is None or word.last is None:
        return word
    return replace(word, token=word.token + tokens, last=word.last + tokens)


def words_of_list(count: int, word_ids: Sequence[int | None]) -> tuple[Word, ...]:
    """The words of a row of words, each at its place in the row.

    Args:
        word_ids: for each token its word; None for special tokens.
    """
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    for token, word in enumerate(word_ids):
        if word is not None:
            first.setdefault(word, token)
            last[word] = token
    return tuple(Word(i, i + 1, first.get(i), last.get(i)) for i in range(count))


def words_of_text(
    text: str, word_ids: Sequence[int | None], offsets: Sequence[tuple[int, int]]
) -> tuple[Word, ...]:
    """The words of a text by their tokens, without the white space around them.

    Args:
        word_ids: for each token the tokenizer's word; None for special tokens.
        offsets: for each token the characters it stands for.
    """
    words: list[Word] = []
    previous: int | None = None
    for token, (word, (start, end)) in enumerate(zip(word_ids, offsets, strict=True)):
        if word is None:
            previous = None
            continue
        while start < end and text[start].isspace():
            start += 1
        while end > start and text[end - 1].isspace():
            end -= 1
        open_word = words[-1] if words and word == previous else None
        # A first token may stand for nothing (a lone space mark): it is of the word that follows.
        blank = open_word is not None and open_word.start == open_word.end
        apart = open_word is not None and any(c.isspace() for c in text[open_word.end : start])
        if open_word is None or (apart and not blank and start < end):
            words.append(Word(start, end, token, token))
        elif blank:
            words[-1] = Word(start, end, open_word.token, token)
        else:
            words[-1] = Word(open_word.start, max(open_word.end, end), open_word.token, token)
        previous = word
    return tuple(word for word in words if word.start < word.end)
