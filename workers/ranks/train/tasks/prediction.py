"""What tasks share whose model has an answer for some of the tokens: a word, a tag."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from workers.ranks.train.device import Compute
from workers.ranks.train.examples import IGNORED, Batch
from workers.ranks.train.tasks.base import Evaluation, Sums, Task

_LARGEST_EXPONENT = 700.0
"""exp of more is no float."""


class TokenPrediction(Task):
    """Cross entropy; by itself judged by loss, perplexity and accuracy, all by predicted token.

    ``batch`` gives ``targets["labels"]``, [examples, tokens]: what the model's logits at each place
    are to predict, or ``IGNORED``.
    """

    best = "loss"
    better: ClassVar[Literal["higher", "lower"]] = "lower"
    call: ClassVar[dict[str, Any]] = {}
    """What the model is called with besides a batch's inputs."""

    def loss(self, model: nn.Module, batch: Batch, compute: Compute) -> torch.Tensor:
        with compute.autocast():
            logits, truth = self.predict(model, batch)
        smoothing = self.spec.hyperparameters.label_smoothing
        return cross_entropy(logits, truth, reduction="sum", label_smoothing=smoothing)

    @property
    def sums(self) -> int:
        return 3

    def measure(self, model: nn.Module, batch: Batch) -> Sums:
        logits, truth = self.predict(model, batch)
        loss = float(cross_entropy(logits, truth, reduction="sum"))
        hits = int((logits.argmax(dim=-1) == truth).sum())
        return np.array([loss, hits, len(truth)], np.float64)

    def conclude(self, sums: Sums) -> Evaluation:
        total = max(1.0, float(sums[2]))
        loss = float(sums[0]) / total
        values = {
            "loss": loss,
            "perplexity": math.exp(min(loss, _LARGEST_EXPONENT)),
            "accuracy": float(sums[1]) / total,
        }
        return Evaluation(values, {"predicted_tokens": int(sums[2])})

    def predict(self, model: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits in fp32 [predicted, vocabulary] and the true tokens [predicted]. They are computed of
        these places alone: over a vocabulary they are a small model's largest tensor."""
        labels = batch.targets["labels"]
        places = (labels != IGNORED).flatten().nonzero().squeeze(1)
        with _answering_at(places, labels.shape, self.loaded.model):
            answer: Any = model(**batch.inputs, **self.call)
        logits: torch.Tensor = answer.logits
        if logits.ndim == 3:  # of all places, by a head that could not be told
            logits = logits.flatten(0, 1).index_select(0, places)
        return logits.float(), labels.flatten()[places]


@contextmanager
def _answering_at(
    places: torch.Tensor, shape: torch.Size, model: PreTrainedModel
) -> Iterator[None]:
    """Have the last layer of ``model``, where it says which that is, answer at some of ``shape``'s
    [examples, tokens] places: its logits are [places, answers] then."""

    def choose(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not args or args[0].shape[:-1] != shape:
            return None
        return (args[0].flatten(0, 1).index_select(0, places), *args[1:])

    last = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if last is None:
        yield
        return
    hook = last.register_forward_pre_hook(choose)
    try:
        yield
    finally:
        hook.remove()
