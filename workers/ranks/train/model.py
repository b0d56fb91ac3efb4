"""The model to train: loaded, its frozen part set, its parameters grouped for the optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from shared.lifecycle import FailureClass
from shared.specs import Hyperparameters
from workers.ranks.loading import LoadError, known_labels, load_sequence_classifier, load_tokenizer
from workers.ranks.train.failures import TrainingFailed
from workers.ranks.train.order import derive


@dataclass(frozen=True, slots=True)
class Loaded:
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    labels: tuple[str, ...]
    fresh_head: bool
    max_length: int
    """Tokens a text may have."""


def order_labels(labels: Sequence[str], model_path: Path) -> tuple[str, ...]:
    """The model's own order where it already tells these labels apart, so that its head fits."""
    known = known_labels(model_path)
    if known is not None and sorted(known) == sorted(labels):
        return known
    return tuple(labels)


def load(path: Path, labels: tuple[str, ...], options: Hyperparameters) -> Loaded:
    """Load model and tokenizer. A new head depends on the seed alone, so all ranks make the same.

    Raises:
        LoadError: the folder cannot be used.
        TrainingFailed: ``max_length`` is more than the model can hold.
    """
    classifier = load_sequence_classifier(
        path, labels=labels, dropout=options.dropout, seed=derive(options.seed, "head")
    )
    tokenizer = load_tokenizer(path)
    if tokenizer.pad_token_id is None:
        raise LoadError(
            "model_unsuitable",
            f"the tokenizer of '{path.name}' has no padding token",
            "Set one (tokenizer.pad_token = ...) and save it beside the model.",
        )
    limit = _position_limit(classifier.model)
    if limit is not None and options.max_length is not None and options.max_length > limit:
        raise TrainingFailed(
            FailureClass.USER_ERROR,
            "max_length_too_large",
            f"max_length {options.max_length} is more than the {limit} tokens that the model holds",
            "Lower hyperparameters.max_length, or leave it out: longer texts are cut.",
        )
    limits = [n for n in (options.max_length, limit, tokenizer.model_max_length) if n is not None]
    return Loaded(
        model=classifier.model,
        tokenizer=tokenizer,
        labels=labels,
        fresh_head=classifier.fresh_head,
        # A tokenizer that knows no limit says 10**30.
        max_length=min(limits) if min(limits) < 10**9 else 10**9,
    )


def freeze(model: nn.Module, patterns: Sequence[str]) -> int:
    """Freeze the parameters whose names match; returns how many numbers that are.

    Raises:
        TrainingFailed: a pattern matches nothing, or nothing is left to train.
    """
    names = [name for name, _ in model.named_parameters()]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise TrainingFailed(
                FailureClass.USER_ERROR,
                "freeze_matches_nothing",
                f"freeze pattern '{pattern}' matches no parameter of the model",
                f"Its parameters are named like '{names[0]}', '{names[-1]}'.",
            )
    frozen = 0
    for name, parameter in model.named_parameters():
        if any(fnmatchcase(name, pattern) for pattern in patterns):
            parameter.requires_grad_(False)
            frozen += parameter.numel()
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise TrainingFailed(
            FailureClass.USER_ERROR,
            "all_frozen",
            "the freeze patterns leave nothing to train",
            "Leave out the classification head, for instance.",
        )
    return frozen


def make_optimizer(model: nn.Module, options: Hyperparameters) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter, 2019); weight decay on matrices, none on biases and norms."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": options.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=options.learning_rate,
        betas=options.betas,
        eps=options.eps,
        fused=True,
    )


def _position_limit(model: PreTrainedModel) -> int | None:
    """Tokens that learned positions reach to. RoBERTa and kin count them from behind the padding."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            skipped = 0 if module.padding_idx is None else module.padding_idx + 1
            return module.num_embeddings - skipped
    limit = getattr(model.config, "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None
