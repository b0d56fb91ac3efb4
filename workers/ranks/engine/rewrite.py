"""Modules exchanged for equal ones that compute faster.

GPT-2 and kin come with the tanh form of GELU written out in seven operations. And the CPU's matrix kernels
are up to half faster over few rows, as decoding has them, where a layer's weights lie by inputs (PyTorch has
them by outputs), each line a little longer than a power of two: lines that are a multiple of 4 KiB apart
push each other out of the cache.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel
from transformers.activations import NewGELUActivation
from transformers.pytorch_utils import Conv1D

_PADDING = 16
"""Numbers behind each line: one cache line of fp32."""


@torch.no_grad()
def rewrite_for_speed(model: PreTrainedModel) -> None:
    """Exchange modules of a model in place, one after the other, so that memory grows by one layer. The
    order of weights is that of the CPU's kernels: it is left as it is for a model that has another type."""
    by_inputs = model.dtype == torch.float32
    used: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            used[id(parameter)] = used.get(id(parameter), 0) + 1
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Conv1D):
                setattr(parent, name, _as_linear(child))
            elif isinstance(child, NewGELUActivation):
                setattr(parent, name, torch.nn.GELU(approximate="tanh"))
    if by_inputs:
        for module in model.modules():
            # What an embedding shares with the last layer is looked up by lines, and stays one.
            if type(module) is torch.nn.Linear and used.get(id(module.weight), 1) == 1:
                module.weight = torch.nn.Parameter(_by_inputs(module.weight), requires_grad=False)


def _as_linear(conv: Conv1D) -> torch.nn.Linear:
    inputs, outputs = conv.weight.shape
    linear = torch.nn.Linear(inputs, outputs, device="meta")
    linear.weight = torch.nn.Parameter(conv.weight.t().contiguous(), requires_grad=False)
    linear.bias = conv.bias
    return linear.eval()


def _by_inputs(weight: torch.Tensor) -> torch.Tensor:
    """The same numbers [outputs, inputs] in another order in memory."""
    outputs, inputs = weight.shape
    lines = weight.new_empty(inputs, outputs + _PADDING)[:, :outputs]
    return lines.copy_(weight.t()).t()
