"""text-generation with ``preference``: of two answers, one is made likelier than the other (DPO)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy, logsigmoid

from shared.examples import Placed, Preferred
from shared.formats import DataFile
from shared.specs import Preference
from workers.ranks.spans import Encoded, runs
from workers.ranks.train.device import Compute
from workers.ranks.train.examples import IGNORED, Batch, Examples, Ragged, pad_tokens
from workers.ranks.train.failures import DataProblem
from workers.ranks.train.order import Indices
from workers.ranks.train.rows import Collector, read_chunks
from workers.ranks.train.tasks.base import Evaluation, Sums
from workers.ranks.train.tasks.text_generation import TextGeneration, next_tokens

REFERENCE = ("reference_chosen", "reference_rejected")
"""Columns of numbers: the log-likelihood of each answer before training (``reference.py``)."""


class Preferences(TextGeneration):
    """Direct preference optimisation (Rafailov et al. 2023, equation 7).

    The reward of an answer is ``beta`` times what training has added to its log-likelihood, summed over
    its tokens and the end of text; the loss is ``-log sigmoid(reward chosen - reward rejected)``. With
    ``label_smoothing`` a share of the pairs is taken to be the wrong way round (Mitchell 2023).

    Columns: ``tokens`` and ``learned`` of prompt and chosen answer, ``other_tokens`` and
    ``other_learned`` of prompt and rejected one. A pair that is cut so short that an answer has no token
    left weighs nothing; of all others each weighs the same.
    """

    best = "reward_accuracy"
    better: ClassVar[Literal["higher", "lower"]] = "higher"
    last_turn_only: ClassVar[bool] = True

    @property
    def wanted(self) -> Preference:
        assert self.spec.preference is not None  # noqa: S101  what makes it this task
        return self.spec.preference

    def read(self, file: DataFile) -> Examples:
        collected = Collector()
        for chunk in read_chunks(file, self.spec):
            sides = zip(*(self.encode(side, file) for side in _sides(chunk)), strict=True)
            for chosen, rejected in sides:
                self._add(collected, chosen, rejected)
        examples = collected.done()
        if not examples.weights.any():
            raise DataProblem(
                "nothing_to_learn",
                f"no pair has a token of both answers within {self.loaded.max_length} tokens",
                name=file.name,
                hint="Give a larger hyperparameters.max_length, or shorter prompts.",
            )
        return examples

    def batch(self, examples: Examples, indices: Indices | Sequence[int], seed: int) -> Batch:  # noqa: ARG002
        """``inputs`` hold the chosen texts and below them the rejected ones: one pass of the model."""
        lists = examples.ragged
        chosen = [int(index) for index in indices]
        both = Ragged.of(
            lists[name][i].tolist() for name in ("tokens", "other_tokens") for i in chosen
        )
        learned = [lists[name][i] for name in ("learned", "other_learned") for i in chosen]
        inputs, tokens = pad_tokens(both, range(len(both)), self.pad)
        targets = {
            "labels": next_tokens(inputs["input_ids"], learned),
            "weights": torch.from_numpy(examples.weights[chosen].astype(np.float32)),
        }
        if REFERENCE[0] in examples.dense:
            reference = np.stack([examples.dense[name][chosen] for name in REFERENCE])
            targets["reference"] = torch.from_numpy(reference.astype(np.float32))
        return Batch(inputs, targets, tokens)

    def likelihoods(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Log-likelihoods of the answers, in fp32: [chosen and rejected, pairs]. Calls ``model`` once."""
        logits, truth = self.predict(model, batch)
        labels = batch.targets["labels"]
        each = logits.new_zeros(labels.shape)
        each[labels != IGNORED] = -cross_entropy(logits, truth, reduction="none")
        return each.sum(dim=1).view(2, -1)

    def loss(self, model: nn.Module, batch: Batch, compute: Compute) -> torch.Tensor:
        with compute.autocast():
            rewards = self._rewards(model, batch)
        return _loss(rewards, batch, self.wanted.label_smoothing)

    @property
    def sums(self) -> int:
        return 5

    def measure(self, model: nn.Module, batch: Batch) -> Sums:
        rewards, weights = self._rewards(model, batch), batch.targets["weights"]
        chosen, rejected = rewards
        right = (weights * (chosen > rejected)).sum()
        sums = (_loss(rewards, batch, 0.0), right, *(rewards * weights).sum(dim=1), weights.sum())
        return np.array([float(value) for value in sums])

    def conclude(self, sums: Sums) -> Evaluation:
        pairs = max(1.0, float(sums[4]))
        loss, accuracy, chosen, rejected = (float(value) / pairs for value in sums[:4])
        values = {
            "loss": loss,
            "reward_accuracy": accuracy,
            "reward_margin": chosen - rejected,
            "reward_chosen": chosen,
            "reward_rejected": rejected,
        }
        return Evaluation(values, {"pairs": int(sums[4])})

    def _rewards(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """[chosen and rejected, pairs]"""
        added = self.likelihoods(model, batch) - batch.targets["reference"]
        return self.wanted.beta * added

    def _add(self, collected: Collector, chosen: Encoded, rejected: Encoded) -> None:
        limit = self.loaded.max_length
        lists: dict[str, list[int]] = {}
        answers = []
        for before, encoded in (("", chosen), ("other_", rejected)):
            learned = encoded.learned[:limit]
            lists[f"{before}tokens"] = encoded.tokens[:limit]
            lists[f"{before}learned"] = runs(learned)
            answers.append(bool(learned[1:].any()))
        lengths = [len(encoded.tokens) for encoded in (chosen, rejected)]
        collected.add(
            lists,
            length=min(limit, max(lengths)),
            weight=int(all(answers)),
            cut=max(lengths) > limit,
        )


def _sides(chunk: Sequence[Placed]) -> tuple[list[Placed], list[Placed]]:
    """The chosen answers of a chunk, and the rejected ones, as if each were an example of its own."""
    sides: tuple[list[Placed], list[Placed]] = ([], [])
    for placed in chunk:
        assert isinstance(placed.example, Preferred)  # noqa: S101  see parse_example
        both = (placed.example.chosen, placed.example.rejected)
        for side, example in zip(sides, both, strict=True):
            side.append(replace(placed, example=example))
    return sides


def _loss(rewards: torch.Tensor, batch: Batch, smoothing: float) -> torch.Tensor:
    margin = rewards[0] - rewards[1]
    each = -(1 - smoothing) * logsigmoid(margin) - smoothing * logsigmoid(-margin)
    return (each * batch.targets["weights"]).sum()
