"""Reranking: how well each document answers a query, by a cross-encoder that reads both together.

A row of many documents becomes as many pairs, which are sorted and computed among those of other rows;
the row is answered when all of its pairs are.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from shared.rows import row_error
from shared.specs import InferSpec
from workers.ranks.engine.fused import uses_first_alone
from workers.ranks.engine.inputs import Request, RowProblem
from workers.ranks.engine.models import LoadedModel
from workers.ranks.engine.parts import Piece
from workers.ranks.engine.passes import Batch, SortedPasses
from workers.ranks.engine.prompts import InputLimit, Prompt


class PairEncoder:
    """See :class:`workers.ranks.engine.prompts.Encoder`. A prompt is a pair, a part of its row. One that
    is too long loses tokens of the longer of its two texts, as in Sentence Transformers."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, spec: InferSpec, context: int) -> None:
        self._tokenizer = tokenizer
        self._limit = InputLimit(spec, context)

    def encode(self, requests: Sequence[Request]) -> tuple[list[Prompt], list[dict[str, Any]]]:
        """See :class:`workers.ranks.engine.prompts.Encoder`."""
        prompts: list[Prompt] = []
        errors: list[dict[str, Any]] = []
        for request in requests:
            try:
                prompts += self._pairs(request)
            except RowProblem as problem:
                errors.append(row_error(request.row, problem.code, problem.message, id=request.id))
        return prompts, errors

    def _pairs(self, request: Request) -> list[Prompt]:
        many = request.documents is not None
        texts = list(request.documents or (request.text or "",))
        parts = len(texts) if many else None
        encoded = self._tokenise(request.query or "", texts)
        pairs: list[Prompt] = []
        for part, (ids, types) in enumerate(encoded):
            try:
                cut = self._limit.must_cut(len(ids))
            except RowProblem as problem:
                where = f"with document {part}, " if many else ""
                raise RowProblem(problem.code, where + problem.message) from None
            if cut:
                options = {"truncation": "longest_first", "max_length": self._limit.tokens}
                ids, types = self._tokenise(request.query or "", [texts[part]], **options)[0]
            pairs.append(
                Prompt(
                    request.row,
                    request.id,
                    tuple(ids),
                    types=tuple(types),
                    part=part,
                    parts=parts,
                )
            )
        return pairs

    def _tokenise(
        self, query: str, texts: list[str], **options: Any
    ) -> list[tuple[list[int], list[int]]]:
        """Ids and types of each pair; no types where the model takes none."""
        options = {"truncation": False, **options}
        encoded = self._tokenizer([query] * len(texts), texts, verbose=False, **options)
        ids: list[list[int]] = encoded["input_ids"]
        types = encoded.get("token_type_ids") or [[] for _ in ids]
        return list(zip(ids, types, strict=True))


class Reranking(SortedPasses):
    """A score a pair: of a model with two labels the probability of the second; with one its number, as
    its folder says through a sigmoid or not.

    Args:
        top_n: how many documents a ranking has; None: all.
    """

    def __init__(self, loaded: LoadedModel, *, top_n: int | None) -> None:
        super().__init__(loaded)
        self.looks_at_first = uses_first_alone(loaded.model)
        self._top_n = top_n
        self._raw = scores_are_raw(loaded.model.config)
        self._takes_types = takes_types(loaded.model)

    def forward(self, batch: Batch) -> Any:
        return super().forward(batch if self._takes_types else replace(batch, types=None))

    def read(self, batch: Batch) -> list[dict[str, Any] | None]:
        # In float64 a sigmoid near 1 still tells good from better.
        logits = self.forward(batch).logits.double()
        if logits.shape[-1] == 2:
            scores = logits.softmax(dim=-1)[:, 1]
        else:
            scores = logits[:, 0] if self._raw else logits[:, 0].sigmoid()
        return [{"score": s} if math.isfinite(s) else None for s in scores.tolist()]

    def unite(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        scores = [piece.output["score"] for piece in pieces]
        order = sorted(range(len(scores)), key=lambda part: (-scores[part], part))
        return {"scores": scores, "ranking": order[: self._top_n]}


def takes_types(model: PreTrainedModel) -> bool:
    """Whether a model tells the texts of a pair apart by their types. A tokenizer may give types that its
    model has no use for, or no room."""
    named = "token_type_ids" in inspect.signature(model.forward).parameters
    return named and getattr(model.config, "type_vocab_size", 2) > 1


def scores_are_raw(config: Any) -> bool:
    """Whether the number of a model with one label is taken as it is: its folder says so as Sentence
    Transformers writes it, or it was trained to give a number (regression)."""
    own = getattr(config, "sentence_transformers", None)
    named = own.get("activation_fn") if isinstance(own, dict) else None
    named = named or getattr(config, "sbert_ce_default_activation_function", None)
    if isinstance(named, str):
        return named.rpartition(".")[2] == "Identity"
    return bool(config.problem_type == "regression")
