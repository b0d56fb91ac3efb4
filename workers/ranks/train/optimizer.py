"""The optimizers a spec can name, and what keeps the weights small.

Weight decay and L1 are for matrices alone: a norm or a bias that is pulled to 0 gains nothing.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from shared.specs import Hyperparameters

_ADAMW_DECAY = 0.01


def make_optimizer(model: nn.Module, options: Hyperparameters) -> torch.optim.Optimizer:
    """The optimizer of the parameters that are trained.

    Weight decay that is not given is PyTorch's own: as L2 even a hundredth can keep Adam from learning.

    adamw: Loshchilov and Hutter (2019); decay is decoupled, ``w -= lr * weight_decay * w``.
    adam: Kingma and Ba (2015); decay is L2, ``weight_decay * w`` in the gradient, and so scaled by
    the moments like the rest of it. sgd: with momentum, without Nesterov; decay is L2. adafactor:
    Shazeer and Stern (2018) as PyTorch has it: no first moment, the second one factored into rows
    and columns, decay decoupled; ``learning_rate`` is the largest *relative* step: an update is
    ``max(1e-3, RMS(w)) * min(learning_rate, 1 / sqrt(step))`` long, as root mean square at most.
    """
    matrices = regularised(model)
    decayed = set(map(id, matrices))
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in decayed]
    decay = options.weight_decay
    if decay is None:
        decay = _ADAMW_DECAY if options.optimizer == "adamw" else 0.0
    groups = [
        {"params": matrices, "weight_decay": decay},
        {"params": others, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    rate = options.learning_rate
    match options.optimizer:
        case "adamw":
            return torch.optim.AdamW(
                groups, lr=rate, betas=options.betas, eps=options.eps, fused=True
            )
        case "adam":
            return torch.optim.Adam(
                groups, lr=rate, betas=options.betas, eps=options.eps, fused=True
            )
        case "sgd":
            # The fused kernel does not know tensors in shards.
            fused = not any(isinstance(p, DTensor) for p in (*matrices, *others))
            return torch.optim.SGD(groups, lr=rate, momentum=options.momentum, fused=fused)
        case "adafactor":
            # One tensor after the other: the other way takes the model's size of memory once more.
            return torch.optim.Adafactor(groups, lr=rate, foreach=False)


def regularised(model: nn.Module) -> list[nn.Parameter]:
    """The trained parameters that weight decay and L1 apply to: those of two dimensions or more."""
    return [p for p in model.parameters() if p.requires_grad and p.ndim >= 2]


@torch.no_grad()
def add_l1(parameters: Iterable[nn.Parameter], l1: float) -> None:
    """Add the gradient of ``l1 * sum|w|``, 0 where a weight is 0, to gradients that are there.

    Called once a step, after the gradients are summed over the ranks and before they are clipped:
    the norm that is reported and clipped is that of all that is minimised. Weights come to lie
    about 0 and seldom on it, as with any L1 that is descended by its gradient.
    """
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad.add_(parameter.sign(), alpha=l1)
