"""Loss scaling for fp16 (Micikevicius et al., 2018): gradients too small for fp16 are made larger.

The loss is multiplied by a factor before the backward pass, and the gradients are divided by it before
they are used. A factor that is too large makes some gradient infinite: that step moves no weight, and the
next ones have a smaller factor. The rule and its figures are those of ``torch.amp.GradScaler``. That
one looks for infinities on each rank by itself; here the norm of the gradient, which all ranks share,
tells, so they skip the same steps whether gradients are whole on each or in shards. Factors are powers
of two: scaling by itself changes no bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

LARGEST_FIRST = 2.0**16
SMALLEST = 1.0
"""With a factor below, gradients that fp16 holds would be made smaller: it is not the scale then."""
GROWS_AFTER = 2000


@dataclass(slots=True)
class LossScale:
    """Where the scaling stands; part of a checkpoint."""

    factor: float = LARGEST_FIRST
    good: int = 0
    """Steps in a row that overflowed nowhere, since the factor last changed."""
    skipped: int = 0
    """Steps that moved no weight, in all."""

    def went_well(self) -> None:
        """After a step with finite gradients: now and then a larger factor is tried."""
        self.good += 1
        if self.good == GROWS_AFTER:
            self.factor, self.good = self.factor * 2, 0

    def back_off(self) -> bool:
        """After a step that overflowed; whether there is a smaller factor to go on with."""
        if self.factor <= SMALLEST:
            return False
        self.factor, self.good, self.skipped = self.factor / 2, 0, self.skipped + 1
        return True


@torch.no_grad()
def unscale(gradients: Iterable[torch.Tensor], factor: float) -> None:
    """Divide gradients by ``factor``, in place."""
    assert math.frexp(factor)[0] == 0.5  # noqa: S101  a power of two, so the reciprocal is exact
    for gradient in gradients:
        gradient.mul_(1 / factor)
