"""Scoring: how likely a causal language model finds the texts that it is given.

Which tokens count is decided as in training (:mod:`workers.ranks.spans`): a prompt and its completion are
tokenised as one text, and a token that holds characters of both is the completion's; of a chat it is
the assistant's last turn, to the end that the template gives it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from shared.errors import UnsupportedModel
from shared.examples import Chat
from shared.records import BadRow
from shared.rows import row_error
from shared.specs import InferSpec
from workers.ranks.engine.head import before_head, only_at, plain_head
from workers.ranks.engine.inputs import Request, RowProblem
from workers.ranks.engine.likelihoods import token_entry
from workers.ranks.engine.models import LoadedModel
from workers.ranks.engine.passes import Batch, SortedPasses
from workers.ranks.engine.prompts import InputLimit, Prompt
from workers.ranks.spans import encode_chat, encode_spans

SLICE_BYTES = 64 * 1024 * 1024
"""Logits in fp32 that are there at once: those of a whole pass over a large vocabulary take gigabytes."""


class ScoringEncoder:
    """See :class:`workers.ranks.engine.prompts.Encoder`. The places of the tokens that count are
    ``Prompt.scored``; the first of all tokens is never among them, as nothing predicts it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, spec: InferSpec, context: int) -> None:
        self._tokenizer = tokenizer
        self._limit = InputLimit(spec, context)
        self._end = tokenizer.eos_token_id if spec.end_of_text else None

    def encode(self, requests: Sequence[Request]) -> tuple[list[Prompt], list[dict[str, Any]]]:
        """See :class:`workers.ranks.engine.prompts.Encoder`."""
        prompts: list[Prompt] = []
        errors: list[dict[str, Any]] = []
        for request in requests:
            try:
                prompts.append(self._prompt(request))
            except RowProblem as problem:
                errors.append(row_error(request.row, problem.code, problem.message, id=request.id))
        return prompts, errors

    def _prompt(self, request: Request) -> Prompt:
        tokens, counted = self._encoded(request)
        if not tokens:
            raise RowProblem("empty_text", "the text has no tokens for this model")
        # Cut at its beginning: what is asked about stands at the end.
        start = len(tokens) - self._limit.tokens if self._limit.must_cut(len(tokens)) else 0
        scored = tuple(at - start for at in range(start + 1, len(tokens)) if counted[at])
        if not scored:
            raise RowProblem("nothing_to_score", "no token of the text has one before it")
        return Prompt(request.row, request.id, tuple(tokens[start:]), scored=scored)

    def _encoded(self, request: Request) -> tuple[list[int], list[bool]]:
        """The tokens of a row, and which of them count."""
        if request.messages is not None:
            return self._chat(request.messages)
        prompt = request.text or ""
        if request.completion is None:
            encoded: Any = self._tokenizer(
                prompt, truncation=False, return_special_tokens_mask=True, verbose=False
            )
            special = encoded["special_tokens_mask"]
            return self._closed(encoded["input_ids"], [not mark for mark in special])
        self._require_offsets()
        whole = prompt + request.completion
        spans = [[(len(prompt), len(whole))]]
        found = encode_spans(self._tokenizer, [whole], spans, special=True)[0]
        return self._closed(found.tokens, found.learned.tolist())

    def _chat(self, messages: list[dict[str, str]]) -> tuple[list[int], list[bool]]:
        if not self._tokenizer.chat_template:
            raise RowProblem(
                "no_chat_template",
                "the model has no chat template: give 'prompt' and 'completion' in place of 'messages'",
            )
        self._require_offsets()
        chat = Chat(tuple((message["role"], message["content"]) for message in messages))
        try:
            found = encode_chat(self._tokenizer, chat, last_only=True)
        except BadRow as problem:
            raise RowProblem(problem.code, problem.message) from None
        return found.tokens, found.learned.tolist()

    def _require_offsets(self) -> None:
        if not self._tokenizer.is_fast:
            raise RowProblem(
                "no_offsets",
                "the model's tokenizer does not say where its tokens are in a text: give a whole "
                "'text', or choose a model with a tokenizer.json",
            )

    def _closed(self, tokens: list[int], counted: list[bool]) -> tuple[list[int], list[bool]]:
        """With the end of text where it counts, once: some tokenizers add it themselves."""
        if self._end is None:
            return tokens, counted
        if tokens and tokens[-1] == self._end:
            tokens, counted = tokens[:-1], counted[:-1]
        return [*tokens, self._end], [*counted, True]


class Scoring(SortedPasses):
    """Log-probabilities in fp32, whatever the model computes in.

    Args:
        tell_tokens: tell them of each token, too.
        end_of_text: the end of text counts.

    Raises:
        UnsupportedModel: it is to count, and the tokenizer has none.
    """

    def __init__(self, loaded: LoadedModel, *, tell_tokens: bool, end_of_text: bool) -> None:
        super().__init__(loaded)
        self._tokenizer = loaded.tokenizer
        self._tell_tokens = tell_tokens
        self._head = plain_head(loaded.model)
        self._slice = max(1, SLICE_BYTES // (4 * loaded.model.config.get_text_config().vocab_size))
        if end_of_text and loaded.tokenizer.eos_token_id is None:
            raise UnsupportedModel(
                "the model's tokenizer has no end-of-text token that could be scored",
                param="end_of_text",
                hint="Leave end_of_text out.",
            )

    def forward(self, batch: Batch) -> Any:
        # Nothing is generated behind it: no cache of keys and values.
        mask = batch.mask if batch.padded else None
        return self._model(input_ids=batch.ids, attention_mask=mask, use_cache=False)

    def read(self, batch: Batch) -> list[dict[str, Any] | None]:
        places = [(row, at) for row, prompt in enumerate(batch.prompts) for at in prompt.scored]
        rows, columns = torch.tensor(places, device=self._device).unbind(dim=1)
        # What stands at a place is predicted at the one before it.
        logs = self._logprobs(batch, rows, columns - 1, batch.ids[rows, columns]).tolist()
        outputs: list[dict[str, Any] | None] = []
        for prompt in batch.prompts:
            count = len(prompt.scored)
            outputs.append(self._output(prompt, logs[:count]))
            logs = logs[count:]
        return outputs

    def _logprobs(
        self, batch: Batch, rows: torch.Tensor, columns: torch.Tensor, targets: torch.Tensor
    ) -> torch.Tensor:
        """[n], of the token ``targets[i]`` behind position (rows[i], columns[i])."""
        if self._head is None:
            with only_at(self._model, rows, columns, batch.ids.shape) as narrowed:
                logits: torch.Tensor = self.forward(batch).logits
            wanted = logits[:, 0] if narrowed() else logits[rows, columns]
            return self._in_slices(lambda part: wanted[part], targets)
        head = self._head
        with before_head(head, rows, columns) as hidden:
            self.forward(batch)
        found = hidden()
        return self._in_slices(lambda part: head(found[part]), targets)

    def _in_slices(
        self, logits_of: Callable[[slice], torch.Tensor], targets: torch.Tensor
    ) -> torch.Tensor:
        logs: list[torch.Tensor] = []
        for start in range(0, len(targets), self._slice):
            part = slice(start, start + self._slice)
            likely = logits_of(part).float().log_softmax(dim=-1)
            logs.append(likely.gather(1, targets[part, None])[:, 0])
        return torch.cat(logs)

    def _output(self, prompt: Prompt, logs: list[float]) -> dict[str, Any] | None:
        if not all(map(math.isfinite, logs)):
            return None
        whole = math.fsum(logs)
        mean = whole / len(logs)
        output: dict[str, Any] = {
            "logprob": whole,
            "tokens": len(logs),
            "mean": mean,
            "perplexity": perplexity(mean),
        }
        if self._tell_tokens:
            output["token_logprobs"] = [
                token_entry(self._tokenizer, prompt.ids[at], log)
                for at, log in zip(prompt.scored, logs, strict=True)
            ]
        return output


def perplexity(mean: float) -> float | None:
    """Of a mean log-probability; None where it is beyond all floats."""
    try:
        return math.exp(-mean)
    except OverflowError:
        return None
