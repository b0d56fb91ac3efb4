"""What a row's own options change about the likelihood of its next token, and what is told of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from transformers import PreTrainedTokenizerBase

from shared.specs import Generation


class Writing(Protocol):
    """A row whose next token is to be chosen."""

    @property
    def options(self) -> Generation: ...

    @property
    def generated(self) -> list[int]: ...

    @property
    def read(self) -> Sequence[int]:
        """All tokens that the model sees before the next one."""


def adjust(
    logits: torch.Tensor, rows: Sequence[Writing], ends: Sequence[frozenset[int]]
) -> torch.Tensor:
    """``logits`` [rows, vocabulary] with no end before ``min_new_tokens`` and with the repetition
    penalty (Keskar et al. 2019, as Transformers applies it). A copy only where some row asks for it.

    Args:
        ends: for each row the tokens that end its text.
    """
    adjusted = logits
    for place, row in enumerate(rows):
        options = row.options
        too_early = len(row.generated) < options.min_new_tokens and ends[place]
        if options.repetition_penalty == 1.0 and not too_early:
            continue
        if adjusted is logits:
            adjusted = logits.float().clone()
        if options.repetition_penalty != 1.0:
            _penalise(adjusted[place], row.read, options.repetition_penalty)
        if too_early:
            # A row may name tokens that the model does not have.
            known = [token for token in ends[place] if token < adjusted.shape[-1]]
            adjusted[place, known] = -torch.inf
    return adjusted


def _penalise(scores: torch.Tensor, tokens: Sequence[int], penalty: float) -> None:
    seen = torch.tensor(sorted(set(tokens)), device=scores.device)
    old = scores[seen]
    scores[seen] = torch.where(old < 0, old * penalty, old / penalty)


class Likelihoods:
    """Log-probabilities of chosen tokens and of the likeliest ones, as the model has them: before any
    option changes them."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer

    def of(
        self, logits: torch.Tensor, chosen: Sequence[int], wanted: Sequence[int | None]
    ) -> list[dict[str, Any] | None]:
        """For each row ``{"token", "id", "logprob", "top": [{"token", "id", "logprob"}, …]}``; None for
        those that want nothing.

        Args:
            logits: [rows, vocabulary].
            chosen: the token of each row.
            wanted: how many alternatives of each row are told.
        """
        places = [place for place, count in enumerate(wanted) if count is not None]
        told: list[dict[str, Any] | None] = [None] * len(wanted)
        if not places:
            return told
        logs = logits[places].double().log_softmax(dim=-1)
        most = min(max(wanted[place] or 0 for place in places), logs.shape[-1])
        best = logs.topk(most, dim=-1)
        for i, place in enumerate(places):
            count = wanted[place] or 0
            top = zip(
                best.indices[i, :count].tolist(), best.values[i, :count].tolist(), strict=True
            )
            told[place] = {
                **self._entry(chosen[place], float(logs[i, chosen[place]])),
                "top": [self._entry(token, value) for token, value in top],
            }
        return told

    def _entry(self, token: int, value: float) -> dict[str, Any]:
        return token_entry(self._tokenizer, token, value)


def token_entry(tokenizer: PreTrainedTokenizerBase, token: int, value: float) -> dict[str, Any]:
    """What is told of a token and its log-probability."""
    text = tokenizer.decode([token], clean_up_tokenization_spaces=False)
    return {"token": text, "id": token, "logprob": round(value, 6)}
