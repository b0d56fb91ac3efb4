"""Text that is held to a JSON schema: which tokens may come next, by llguidance.

What a text may go on with depends on the text alone, so it is the same whatever rows share its pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from llguidance import LLMatcher, LLTokenizer
from llguidance.hf import from_tokenizer
from numpy.typing import NDArray

from shared.schemas import grammar_of
from workers.ranks.engine.models import LoadedModel

_PREPARED = 64
"""Schemas that are kept prepared; rows may bring any number."""


class Constraint:
    """One text on its way under a schema."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    def allowed(self) -> NDArray[np.bool_]:
        """For each token of the vocabulary whether it may be next, the ends where the text may end."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        return np.unpackbits(bits, bitorder="little").astype(np.bool_)

    def take(self, token: int) -> None:
        """The token that was chosen."""
        self._matcher.consume_token(token)

    @property
    def done(self) -> bool:
        """The text satisfies the schema, and nothing can follow."""
        return self._matcher.is_stopped() and not self._matcher.is_error()

    @property
    def problem(self) -> str | None:
        """Why the text cannot go on; None while it can."""
        return str(self._matcher.get_error())[:300] if self._matcher.is_error() else None


class Constrained(Protocol):
    """A row that may be held to a schema."""

    @property
    def schema(self) -> str | None: ...

    @property
    def constraint(self) -> Constraint | None: ...

    @constraint.setter
    def constraint(self, value: Constraint) -> None: ...


class Constraints:
    """Those of the rows of one computation.

    Args:
        ends: the tokens that end a text.
    """

    def __init__(self, loaded: LoadedModel, ends: frozenset[int]) -> None:
        self._loaded = loaded
        self._ends = ends
        self._tokenizer: LLTokenizer | None = None
        self._prepared: dict[str, LLMatcher] = {}

    def problem(self, schema: str) -> str | None:
        """Why this model's text cannot be held to a schema; None: it can."""
        try:
            matcher = self._prepare(schema)
        except (ValueError, RuntimeError) as error:
            return f"the model's tokenizer cannot be held to a schema: {str(error)[:300]}"
        return str(matcher.get_error())[:300] if matcher.is_error() else None

    def apply(self, logits: torch.Tensor, rows: Sequence[Constrained]) -> torch.Tensor:
        """``logits`` [rows, vocabulary], of the tokens that may not come next minus infinity. A copy only
        where some row has a schema."""
        held = logits
        for place, row in enumerate(rows):
            if row.schema is None:
                continue
            constraint = row.constraint or Constraint(self._prepare(row.schema).deep_copy())
            row.constraint = constraint
            if constraint.problem is not None:
                continue
            if held is logits:
                held = logits.float().clone()
            allowed = np.zeros(held.shape[-1], np.bool_)
            found = constraint.allowed()[: len(allowed)]
            allowed[: len(found)] = found
            held[place, torch.from_numpy(~allowed).to(held.device)] = -torch.inf
        return held

    def _prepare(self, schema: str) -> LLMatcher:
        if schema not in self._prepared:
            if len(self._prepared) >= _PREPARED:
                self._prepared.clear()
            matcher = LLMatcher(self._vocabulary(), grammar_of(schema), log_level=0)
            self._prepared[schema] = matcher
        return self._prepared[schema]

    def _vocabulary(self) -> LLTokenizer:
        """Raises ValueError or RuntimeError for a tokenizer of a kind that llguidance does not know."""
        if self._tokenizer is None:
            tokenizer: Any = self._loaded.tokenizer
            size = max(len(tokenizer), self._loaded.model.config.get_text_config().vocab_size)
            ends = sorted(end for end in self._ends if end < size) or None
            self._tokenizer = from_tokenizer(tokenizer, n_vocab=size, eos_token=ends)
        return self._tokenizer
