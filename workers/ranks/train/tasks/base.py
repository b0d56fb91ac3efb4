"""The seam between the training loop and the NLP tasks.

A task knows how rows become examples and examples a batch, what the loss of a batch is, and how the
model is judged. The loop knows steps, ranks, checkpoints and the optimizer, and no task.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, Self, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from shared.formats import DataFile
from shared.specs import TrainSpec
from workers.ranks.train.device import Compute
from workers.ranks.train.examples import Batch, Examples
from workers.ranks.train.gang import Gang
from workers.ranks.train.order import Indices, derive

Sums = NDArray[np.float64]
NOT_READ: dict[str, Any] = {
    **dict.fromkeys(
        (
            "kind",
            "name",
            "model",
            "resources",
            "priority",
            "retry",
            "timeout_seconds",
            "fail_fast",
            "method",
            "lora",
            "teacher",
            "distillation",
            "preference",  # the task that reads pairs is a class of its own
            "architecture",
            "parallelism",
            "checkpoint",
            "early_stopping",
            "publish",
        ),
        True,
    ),
    "data": {"train", "validation", "validation_split", "format"},
    "hyperparameters": {
        "epochs",
        "max_steps",
        "batch_size",
        "micro_batch_size",
        "optimizer",
        "learning_rate",
        "weight_decay",
        "momentum",
        "l1",
        "betas",
        "eps",
        "warmup_ratio",
        "warmup_steps",
        "schedule",
        "max_grad_norm",
        "label_smoothing",
        "dropout",
        "freeze",
        "max_length",  # the task's own limit counts, which it is part of
        "precision",
        "gradient_checkpointing",
        "compile",
        "seed",
        "eval_every_steps",
        "contrastive_temperature",
    },
}
"""Fields of a spec that say nothing about how a row becomes an example."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model with its tokenizer, as a task has loaded them."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    max_length: int
    """Tokens a text may have."""
    head: str
    """What is on top of the model, for the log: "a new classification head for 3 labels"."""
    labels: tuple[str, ...] = ()
    """By class index, where the task has labels."""
    fresh: bool = False
    """Whether the head is new: what the model says means nothing before it is trained."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """``values`` by metric name, the loss among them; ``details`` go into ``metrics.json``."""

    values: dict[str, float]
    details: dict[str, Any] = field(default_factory=dict)


class Objective(Protocol):
    """What training minimises: a task's own loss, or one that is made of it."""

    def batch(self, examples: Examples, indices: Indices | Sequence[int], seed: int) -> Batch:
        """See ``Task.batch``."""

    def loss(self, model: nn.Module, batch: Batch, compute: Compute) -> torch.Tensor:
        """See ``Task.loss``."""


@runtime_checkable
class Predicts(Protocol):
    """A task whose model chooses one of a fixed set of answers, for each text, word or token."""

    def predict(self, model: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits in fp32, [predicted, answers], and the right answers, [predicted]. Calls ``model``
        once."""


class Task(ABC):
    """One task on one loaded model. Everything but ``open`` is a function of its arguments."""

    best: str
    """The metric by which two evaluations are compared. May depend on the training data."""
    better: ClassVar[Literal["higher", "lower"]] = "higher"
    lower_is_better: ClassVar[frozenset[str]] = frozenset({"loss", "perplexity"})
    """Of the other metrics, those of which less is better."""
    split_by: ClassVar[str | None] = None
    """The dense column whose values each keep their share in a validation split."""

    def __init__(self, loaded: Loaded, spec: TrainSpec) -> None:
        self.loaded = loaded
        self.spec = spec
        # Every use leaves its limit in a tokenizer, and would leave it in the one that is delivered.
        self.unused_tokenizer = copy.deepcopy(loaded.tokenizer)
        pad = loaded.tokenizer.pad_token_id
        self.pad = int(pad if pad is not None else loaded.tokenizer.eos_token_id or 0)

    @classmethod
    @abstractmethod
    def open(cls, spec: TrainSpec, model_path: Path, labels: Sequence[str]) -> Self:
        """Load the model for what the training data asks of it: ``labels`` are those that these have,
        sorted. New parts are a function of the seed alone, so all ranks make the same.

        Raises:
            LoadError, TrainingFailed: the model, or the data, cannot be used.
        """

    @abstractmethod
    def read(self, file: DataFile) -> Examples:
        """Read and tokenise a file; what is longer than ``loaded.max_length`` is cut.

        Raises:
            DataProblem: the file cannot be read, a row is malformed, or there is none.
        """

    def cache_key(self) -> dict[str, Any]:
        """What decides, beside file and tokenizer, about what ``read`` makes: data that two tasks
        read under equal keys are taken for equal. A task whose ``read`` looks at more extends it.

        Of the spec counts all but what is known not to: an option that is new only costs a reading.
        """
        spec = self.spec.model_dump(mode="json", exclude=NOT_READ)
        return {
            "class": type(self).__name__,
            "max_length": self.loaded.max_length,
            "labels": list(self.loaded.labels),
            "spec": spec,
        }

    @abstractmethod
    def batch(self, examples: Examples, indices: Indices | Sequence[int], seed: int) -> Batch:
        """Collate examples, padded to the longest of them.

        What is random about an example (masking) is a function of ``seed`` and of its index, so that
        it does not depend on how a global batch is cut into micro-batches.
        """

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch, compute: Compute) -> torch.Tensor:
        """What training minimises, summed over the weights of the batch's examples, in fp32.

        Calls ``model`` once: under DDP that is what gradients are exchanged for.
        """

    def measure(self, model: nn.Module, batch: Batch) -> Sums:
        """What ``conclude`` needs of a batch, as numbers that are added up over batches and ranks.

        Called in inference mode, under autocast, with the model in ``eval`` mode. Of a task that
        has an ``evaluate`` of its own, it is not called, nor are ``conclude`` and ``sums``.
        """
        raise NotImplementedError

    def conclude(self, sums: Sums) -> Evaluation:
        """The evaluation that the sums over all batches come to."""
        raise NotImplementedError

    def evaluate(
        self,
        model: nn.Module,
        examples: Examples,
        *,
        batch_size: int,
        compute: Compute,
        gang: Gang,
    ) -> Evaluation:
        """Judge the model, all ranks together; each gets the whole result. Leaves it training."""
        seed = derive(self.spec.hyperparameters.seed, "evaluation")
        by_length = np.argsort(-examples.lengths, kind="stable")
        starts = range(0, len(examples), batch_size)
        sums = np.zeros(self.sums, np.float64)
        model.eval()
        with torch.inference_mode(), compute.autocast():
            for start, counts in gang.deal(starts):
                batch = self.batch(examples, by_length[start : start + batch_size], seed)
                sums += self.measure(model, batch.to(compute.device)) * counts
        model.train()
        return self.conclude(np.array(gang.sum(sums.tolist())))

    @property
    def sums(self) -> int:
        """How many numbers ``measure`` gives."""
        raise NotImplementedError

    @property
    def largest_token(self) -> int:
        """Of the tokens that ``batch`` puts in beside those of the examples: padding, masks."""
        return self.pad

    def finish(self, folder: Path) -> None:  # noqa: B027  most tasks add nothing
        """Add to the folder of the finished model what its users need beside model and tokenizer."""

    def samples(self, examples: Examples, compute: Compute) -> list[dict[str, Any]]:  # noqa: ARG002
        """A few validation examples with what the finished model makes of them, for people: texts by
        name, or words with tags (``samples.py``). Called on rank 0 alone, or, of a model in shards, on
        all ranks alike; in inference mode, with the model in ``eval`` mode. Most tasks have none."""
        return []

    @property
    def judged_by(self) -> str:
        """The metric that says which model is the best: the task's own, or what the spec names."""
        rule = self.spec.early_stopping
        return (rule.metric if rule else None) or self.best

    def is_better(self, new: float, old: float) -> bool:
        """Of two values of ``judged_by``."""
        if self.judged_by == self.best:
            return new > old if self.better == "higher" else new < old
        return new < old if self.judged_by in self.lower_is_better else new > old
