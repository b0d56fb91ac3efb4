"""What of the model is trained."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from shared.lifecycle import FailureClass
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
