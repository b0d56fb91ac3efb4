"""Modules exchanged for equal ones that compute faster.

GPT-2 and kin come with ``Conv1D``, a linear layer whose weight lies the wrong way round for the CPU's
matrix kernels, and with the tanh form of GELU written out in seven operations. Together they cost a
fifth of the time of decoding on CPU.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel
from transformers.activations import NewGELUActivation
from transformers.pytorch_utils import Conv1D


@torch.no_grad()
def rewrite_for_speed(model: PreTrainedModel) -> None:
    """Exchange modules of a model in place, one after the other, so that memory grows by one layer."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Conv1D):
                setattr(parent, name, _as_linear(child))
            elif isinstance(child, NewGELUActivation):
                setattr(parent, name, torch.nn.GELU(approximate="tanh"))


def _as_linear(conv: Conv1D) -> torch.nn.Linear:
    inputs, outputs = conv.weight.shape
    linear = torch.nn.Linear(inputs, outputs, device="meta")
    linear.weight = torch.nn.Parameter(conv.weight.t().contiguous(), requires_grad=False)
    linear.bias = conv.bias
    return linear.eval()
