"""text-classification: one label a text, any number of labels, or a score (regression)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss

from shared.examples import Labelled, Scored
from shared.formats import DataFile
from shared.specs import TrainSpec
from workers.ranks.loading import Problem, load_sequence_classifier
from workers.ranks.train.device import Compute
from workers.ranks.train.examples import Batch, Examples, pad_tokens
from workers.ranks.train.order import Indices, derive
from workers.ranks.train.rows import Collector, class_of, read_chunks, tokenise
from workers.ranks.train.tasks.base import Evaluation, Loaded, Sums, Task
from workers.ranks.train.tasks.model import order_labels, text_limit, tokenizer_with_pad
from workers.ranks.train.tasks.samples import looked_through, mistakes
from workers.ranks.train.tasks.scores import by_label, count, score

CONFUSED = 128
"""Classes up to which an evaluation has a confusion matrix."""
EVALUATED_AT_ONCE = 16
SCORE = "score"
"""The name of a regression's one output."""


def open_text_classification(spec: TrainSpec, model_path: Path, labels: Sequence[str]) -> Task:
    """The kind of classification that ``spec.problem`` names."""
    kinds: dict[str, type[Task]] = {
        "single-label": SingleLabel,
        "multi-label": MultiLabel,
        "regression": Regression,
    }
    return kinds[spec.problem].open(spec, model_path, labels)


class _Classification(Task):
    """What the three kinds share: texts in, one vector of logits each out."""

    def logits(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        answer: Any = model(**batch.inputs)
        logits: torch.Tensor = answer.logits.float()
        return logits

    def read(self, file: DataFile) -> Examples:
        collected = Collector()
        for chunk in read_chunks(file, self.spec):
            texts = [placed.example.text for placed in chunk]  # type: ignore[union-attr]
            ids, cut = tokenise(self.loaded.tokenizer, texts, self.loaded.max_length)
            for placed, tokens, was_cut in zip(chunk, ids, cut, strict=True):
                lists, numbers = self.target(placed.example, file, placed.line)
                collected.add(
                    {"tokens": tokens, **lists}, length=len(tokens), cut=was_cut, numbers=numbers
                )
        return collected.done()

    def target(
        self, example: Any, file: DataFile, line: int
    ) -> tuple[dict[str, list[int]], dict[str, float]]:
        """What the example's label is kept as: lists of integers, and numbers."""
        raise NotImplementedError

    @classmethod
    def load(
        cls, spec: TrainSpec, model_path: Path, labels: Sequence[str], problem: Problem, what: str
    ) -> Loaded:
        options = spec.hyperparameters
        classifier = load_sequence_classifier(
            model_path,
            labels=labels,
            problem=problem,
            dropout=options.dropout,
            seed=derive(options.seed, "head"),
        )
        tokenizer = tokenizer_with_pad(model_path)
        head = "a new" if classifier.fresh_head else "its own"
        return Loaded(
            model=classifier.model,
            tokenizer=tokenizer,
            max_length=text_limit(classifier.model, tokenizer, options),
            head=f"{head} {what}",
            labels=tuple(labels),
            fresh=classifier.fresh_head,
        )


class SingleLabel(_Classification):
    """Cross entropy; accuracy, macro and micro F1, per class."""

    best = "accuracy"
    split_by = "label"

    @classmethod
    def open(cls, spec: TrainSpec, model_path: Path, labels: Sequence[str]) -> Self:
        labels = order_labels(labels, model_path)
        what = f"classification head for {len(labels)} labels"
        return cls(cls.load(spec, model_path, labels, "single_label_classification", what), spec)

    def target(
        self, example: Labelled, file: DataFile, line: int
    ) -> tuple[dict[str, list[int]], dict[str, float]]:
        classes = {name: index for index, name in enumerate(self.loaded.labels)}
        return {}, {"label": class_of(example.labels[0], classes, file, line)}

    def batch(self, examples: Examples, indices: Indices | Sequence[int], seed: int) -> Batch:  # noqa: ARG002
        inputs, tokens = pad_tokens(examples.ragged["tokens"], indices, self.pad)
        labels = examples.dense["label"][np.asarray(indices)].astype(np.int64)
        return Batch(inputs, {"labels": torch.from_numpy(labels)}, tokens)

    def predict(self, model: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        return self.logits(model, batch), batch.targets["labels"]

    def loss(self, model: nn.Module, batch: Batch, compute: Compute) -> torch.Tensor:
        with compute.autocast():
            logits = self.logits(model, batch)
        smoothing = self.spec.hyperparameters.label_smoothing
        return cross_entropy(
            logits, batch.targets["labels"], reduction="sum", label_smoothing=smoothing
        )

    @property
    def sums(self) -> int:
        classes = len(self.loaded.labels)
        return 1 + classes * (classes if self._tells_confusions else 3)

    @property
    def _tells_confusions(self) -> bool:
        """Whether it is counted which class is taken for which: that is a number for each two."""
        return len(self.loaded.labels) <= CONFUSED

    def measure(self, model: nn.Module, batch: Batch) -> Sums:
        logits, truth = self.logits(model, batch), batch.targets["labels"]
        loss = float(cross_entropy(logits, truth, reduction="sum"))
        guess, classes = logits.argmax(dim=-1), len(self.loaded.labels)
        if self._tells_confusions:
            return np.array([loss, *count(truth * classes + guess, classes * classes)])
        hits = count(guess[guess == truth], classes)
        return np.array([loss, *hits, *count(guess, classes), *count(truth, classes)])

    def conclude(self, sums: Sums) -> Evaluation:
        details: dict[str, Any] = {}
        if self._tells_confusions:
            confusion = sums[1:].reshape(len(self.loaded.labels), -1)
            hits, predicted, support = confusion.diagonal(), confusion.sum(0), confusion.sum(1)
            details["confusion"] = confusion.astype(int).tolist()
        else:
            hits, predicted, support = sums[1:].reshape(3, -1)
        scores = score(hits, predicted, support)
        total = max(1.0, float(support.sum()))
        values = {
            "loss": float(sums[0]) / total,
            "accuracy": float(hits.sum()) / total,
            "macro_f1": scores.macro_f1,
        }
        return Evaluation(values, {"per_class": by_label(scores, self.loaded.labels), **details})

    def samples(self, examples: Examples, compute: Compute) -> list[dict[str, Any]]:
        """Mistakes, the surest first."""
        chosen = looked_through(examples, self.spec.hyperparameters.seed)
        parts = []
        for start in range(0, len(chosen), EVALUATED_AT_ONCE):
            indices = chosen[start : start + EVALUATED_AT_ONCE]
            logits = self.logits(
                self.loaded.model, self.batch(examples, indices, 0).to(compute.device)
            )
            parts.append(logits.softmax(dim=-1).double().cpu().numpy())
        tokenizer, tokens = self.loaded.tokenizer, examples.ragged["tokens"]
        texts = [
            str(tokenizer.decode(tokens[i].tolist(), skip_special_tokens=True))
            for i in chosen.tolist()
        ]
        truth = examples.dense["label"][chosen].astype(np.int64)
        return mistakes(np.concatenate(parts), truth, texts, self.loaded.labels)


class MultiLabel(_Classification):
    """Binary cross entropy, meant over the classes; a class is predicted at a probability of 0.5."""

    best = "micro_f1"

    @classmethod
    def open(cls, spec: TrainSpec, model_path: Path, labels: Sequence[str]) -> Self:
        labels = order_labels(labels, model_path)
        what = f"multi-label classification head for {len(labels)} labels"
        return cls(cls.load(spec, model_path, labels, "multi_label_classification", what), spec)

    def target(
        self, example: Labelled, file: DataFile, line: int
    ) -> tuple[dict[str, list[int]], dict[str, float]]:
        classes = {name: index for index, name in enumerate(self.loaded.labels)}
        return {"labels": [class_of(name, classes, file, line) for name in example.labels]}, {}

    def batch(self, examples: Examples, indices: Indices | Sequence[int], seed: int) -> Batch:  # noqa: ARG002
        inputs, tokens = pad_tokens(examples.ragged["tokens"], indices, self.pad)
        truth = np.zeros((len(indices), len(self.loaded.labels)), np.float32)
        for row, index in enumerate(indices):
            truth[row, examples.ragged["labels"][int(index)]] = 1.0
        return Batch(inputs, {"labels": torch.from_numpy(truth)}, tokens)

    def loss(self, model: nn.Module, batch: Batch, compute: Compute) -> torch.Tensor:
        with compute.autocast():
            logits = self.logits(model, batch)
        return self._loss(logits, batch)

    def _loss(self, logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        each = binary_cross_entropy_with_logits(logits, batch.targets["labels"], reduction="none")
        return each.mean(dim=-1).sum()

    @property
    def sums(self) -> int:
        return 3 + 3 * len(self.loaded.labels)

    def measure(self, model: nn.Module, batch: Batch) -> Sums:
        logits, truth = self.logits(model, batch), batch.targets["labels"].bool()
        guess = logits > 0
        whole = (guess == truth).all(dim=-1).sum()
        counts = [part.sum(dim=0).double().cpu().numpy() for part in (guess & truth, guess, truth)]
        head = [float(self._loss(logits, batch)), float(whole), float(len(truth))]
        return np.concatenate([head, *counts])

    def conclude(self, sums: Sums) -> Evaluation:
        scores = score(*sums[3:].reshape(3, -1))
        total = max(1.0, float(sums[2]))
        values = {
            "loss": float(sums[0]) / total,
            "accuracy": float(sums[1]) / total,
            "micro_f1": scores.micro_f1,
            "macro_f1": scores.macro_f1,
        }
        return Evaluation(values, {"per_class": by_label(scores, self.loaded.labels)})


class Regression(_Classification):
    """Mean squared error; Pearson's correlation."""

    best = "pearson"

    @classmethod
    def open(cls, spec: TrainSpec, model_path: Path, labels: Sequence[str]) -> Self:  # noqa: ARG003
        return cls(cls.load(spec, model_path, (SCORE,), "regression", "regression head"), spec)

    def target(
        self,
        example: Scored,
        file: DataFile,  # noqa: ARG002
        line: int,  # noqa: ARG002
    ) -> tuple[dict[str, list[int]], dict[str, float]]:
        return {}, {"value": example.value}

    def batch(self, examples: Examples, indices: Indices | Sequence[int], seed: int) -> Batch:  # noqa: ARG002
        inputs, tokens = pad_tokens(examples.ragged["tokens"], indices, self.pad)
        values = examples.dense["value"][np.asarray(indices)].astype(np.float32)
        return Batch(inputs, {"labels": torch.from_numpy(values)}, tokens)

    def loss(self, model: nn.Module, batch: Batch, compute: Compute) -> torch.Tensor:
        with compute.autocast():
            logits = self.logits(model, batch)
        return mse_loss(logits.squeeze(-1), batch.targets["labels"], reduction="sum")

    @property
    def sums(self) -> int:
        return 6

    def measure(self, model: nn.Module, batch: Batch) -> Sums:
        guess = self.logits(model, batch).squeeze(-1).double().cpu().numpy()
        truth = batch.targets["labels"].double().cpu().numpy()
        return np.array(
            [
                len(truth),
                guess.sum(),
                truth.sum(),
                (guess**2).sum(),
                (truth**2).sum(),
                (guess * truth).sum(),
            ]
        )

    def conclude(self, sums: Sums) -> Evaluation:
        n, x, y, xx, yy, xy = (float(value) for value in sums)
        n = max(1.0, n)
        spread = max(0.0, n * xx - x * x) ** 0.5 * max(0.0, n * yy - y * y) ** 0.5
        loss = (xx - 2 * xy + yy) / n
        # A constant prediction has no correlation with anything.
        pearson = (n * xy - x * y) / spread if spread > 0 else 0.0
        return Evaluation({"loss": loss, "pearson": pearson})
