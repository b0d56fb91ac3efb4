"""From requests to token ids, under the limits of model and job."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from shared.rows import row_error
from shared.specs import InferSpec
from workers.ranks.engine.inputs import Request, RowProblem


@dataclass(frozen=True, slots=True)
class Prompt:
    """A row as the model takes it."""

    row: int
    id: Any
    ids: tuple[int, ...]


class PromptEncoder:
    """Tokenises the requests of one job.

    Args:
        context: tokens that a row may have, output included.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, spec: InferSpec, context: int) -> None:
        self._tokenizer = tokenizer
        self._spec = spec
        self._context = context
        self._generates = spec.task == "text-generation"
        self._reserved = spec.sampling.max_new_tokens if self._generates else 0
        self.limit = context - self._reserved
        """Tokens of input that a row may have."""
        if spec.max_length is not None:
            self.limit = min(self.limit, spec.max_length)

    def encode(self, requests: Sequence[Request]) -> tuple[list[Prompt], list[dict[str, Any]]]:
        """Prompts, and results for the rows that got an error instead."""
        prompts: list[Prompt] = []
        errors: list[dict[str, Any]] = []
        texts: list[tuple[Request, str]] = []
        chats: list[tuple[Request, str]] = []
        for request in requests:
            try:
                if request.messages is not None:
                    chats.append((request, self._render(request.messages)))
                else:
                    texts.append((request, request.text or ""))
            except RowProblem as problem:
                errors.append(row_error(request.row, problem.code, problem.message, id=request.id))
        # A rendered chat has its special tokens from the template already.
        for group, add_special_tokens in ((texts, True), (chats, False)):
            encoded = self._tokenise([text for _, text in group], add_special_tokens)
            for (request, text), ids in zip(group, encoded, strict=True):
                try:
                    fitted = self._fit(text, ids)
                except RowProblem as problem:
                    errors.append(
                        row_error(request.row, problem.code, problem.message, id=request.id)
                    )
                else:
                    prompts.append(Prompt(request.row, request.id, tuple(fitted)))
        return prompts, errors

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

    def _fit(self, text: str, ids: list[int]) -> list[int]:
        if not ids:
            raise RowProblem("empty_text", "the text has no tokens for this model")
        if len(ids) <= self.limit:
            return ids
        if self._spec.too_long == "error" or self.limit < 1:
            raise RowProblem("too_long", self._why_too_long(len(ids)))
        if self._generates:
            # What comes last is what is continued. For messages that cuts the oldest ones.
            return ids[-self.limit :]
        # The tokenizer cuts by itself, so that the closing special token stays.
        cut: list[int] = self._tokenizer(text, truncation=True, max_length=self.limit)["input_ids"]
        return cut

    def _why_too_long(self, tokens: int) -> str:
        if self._spec.max_length is not None and self.limit == self._spec.max_length:
            return f"the input has {tokens} tokens; max_length allows {self.limit}"
        if self._generates:
            return (
                f"the input has {tokens} tokens and max_new_tokens is {self._reserved}: together over "
                f"the model's context of {self._context}"
            )
        return f"the input has {tokens} tokens; the model takes {self._context}"
