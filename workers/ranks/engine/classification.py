"""Text classification: labels and their scores for each text."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedConfig

from workers.ranks.engine.fused import uses_first_alone
from workers.ranks.engine.models import LoadedModel
from workers.ranks.engine.parts import Piece
from workers.ranks.engine.passes import Batch, SortedPasses
from workers.ranks.engine.prompts import Prompt


class Classification(SortedPasses):
    """The ``top_k`` best labels of a text; of one in windows, by the mean of its tokens' scores."""

    def __init__(self, loaded: LoadedModel, *, top_k: int) -> None:
        super().__init__(loaded)
        self._labels = label_names(loaded)
        self._scores_of = scores_of(loaded.model.config)
        self.looks_at_first = uses_first_alone(loaded.model)
        self._top_k = min(top_k, len(self._labels))

    def read(self, batch: Batch) -> list[dict[str, Any] | None]:
        logits = self.forward(batch).logits.float()
        rows = zip(batch.prompts, self._scores_of(logits).tolist(), strict=True)
        return [self._found(prompt, scores) for prompt, scores in rows]

    def unite(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        weights = [len(piece.prompt.ids) for piece in pieces]
        by_label = zip(*(piece.output["scores"] for piece in pieces), strict=True)
        scores = [
            math.fsum(map(operator.mul, of_label, weights)) / sum(weights) for of_label in by_label
        ]
        return {**self._output(scores), "windows": len(pieces)}

    def _found(self, prompt: Prompt, scores: list[float]) -> dict[str, Any] | None:
        if not all(map(math.isfinite, scores)):
            return None
        return self._output(scores) if prompt.parts is None else {"scores": scores}

    def _output(self, scores: list[float]) -> dict[str, Any]:
        best = sorted(range(len(scores)), key=lambda i: (-scores[i], i))[: self._top_k]
        labels = [{"label": self._labels[i], "score": scores[i]} for i in best]
        return {**labels[0], "labels": labels}


def scores_of(config: PreTrainedConfig) -> Callable[[torch.Tensor], torch.Tensor]:
    """What makes scores of a classifier's logits [rows, labels], as Transformers' pipeline does: labels that
    exclude each other share one certainty; each of several has its own, and so has one that is alone, which
    would always be certain otherwise; a number stays as it is."""
    if config.problem_type == "regression":
        return torch.Tensor.float
    if config.problem_type == "multi_label_classification" or config.num_labels == 1:
        return torch.Tensor.sigmoid
    return lambda logits: logits.softmax(dim=-1)


def label_names(loaded: LoadedModel) -> list[str]:
    """The model's labels by class index."""
    return [str(name) for _, name in sorted((loaded.model.config.id2label or {}).items())]
