"""What of the model is trained, and the optimizer that does it."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

import torch
from torch import nn

from shared.lifecycle import FailureClass
from shared.specs import Hyperparameters
from workers.ranks.train.failures import TrainingFailed


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
