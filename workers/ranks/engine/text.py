"""From generated tokens back to text: detokenising in context, and stop strings.

Tokens of a generation are decoded *behind the end of their prompt*, because tokenizers treat the
first token of a text differently (SentencePiece drops its leading space).
"""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

CONTEXT_TOKENS = 6
"""How much of the prompt's end is decoded with a generation."""

WINDOW_MARGIN = 8
"""Tokens a stop search looks back beyond the bytes of the longest stop string: the start of a
decoded window may lose a space or half a character, its end must not."""


class Detokenizer:
    """Turns the tokens of one generation into text, and finds its stop strings."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._window = max((len(s.encode()) for s in stop), default=0) + WINDOW_MARGIN

    def text(self, prompt: Sequence[int], generated: Sequence[int]) -> str:
        """The text of ``generated``; half of a UTF-8 character at its end is left out."""
        context = list(prompt[-CONTEXT_TOKENS:])
        before, whole = self._decode(context), self._decode([*context, *generated])
        # Contexts that end inside a character change when it is completed: decode alone then.
        text = whole[len(before) :] if whole.startswith(before) else self._decode(generated)
        return text.rstrip("\ufffd")

    def stopped(self, prompt: Sequence[int], generated: Sequence[int]) -> str | None:
        """The text before the first stop string; None while there is no stop string in it.

        Called after every token, so that only a window at the end is decoded each time: a stop
        string always ends in the newest token.
        """
        if not self._stop:
            return None
        if len(generated) > self._window:
            tail = self._decode(generated[-self._window :])
            if not any(stop in tail for stop in self._stop):
                return None
        text = self.text(prompt, generated)
        cuts = [at for stop in self._stop if (at := text.find(stop)) >= 0]
        return text[: min(cuts)] if cuts else None

    def _decode(self, ids: Sequence[int]) -> str:
        text = self._tokenizer.decode(
            list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        assert isinstance(text, str)  # noqa: S101  (one sequence in, one string out)
        return text
