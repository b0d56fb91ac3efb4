"""Linear layers in int8 on the CPU: a quarter of the memory, and several times the speed of fp32.

Weights are rounded once, with a scale for each output channel. What comes in is split at every call into two codes
for each number, with a scale for each row: the number to 7 bits, and what that leaves, to 7 bits more. Both are
multiplied in int8 by oneDNN's own product, which is exact in int32. With one code the few large numbers that
language models have among their activations cost the others their precision: the perplexity of a small Llama type
rose by 4% where it stays the same with two (docs/engines.md). As a row's scale is its own, what a row gets depends
on no other row of the pass, but for the last bit of a sum in fp32. Everything between the linear layers, and the
embeddings, stay fp32.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from shared.errors import UnsupportedModel

_LARGEST = 127
"""Of a code. Codes are symmetric around 0, so that no zero point is to be taken off."""
_FINER = 2 * _LARGEST
"""Steps of the second code in one of the first, which is rounded and leaves half a step at most."""
_TOGETHER = 256
"""Rows whose codes exist at once."""
_SMALL = 1 << 19
"""Numbers of a product up to which both codes are multiplied in one call."""
_LEAST_FEATURES = 32
"""A smaller layer (the head of a classifier with few labels) gains nothing and stays as it is."""
_TINY = 1e-30
"""In place of the largest of a row of zeros."""


class QuantisedLinear(torch.nn.Module):
    """In place of a ``Linear`` in fp32.

    Shapes: as of ``Linear``. Input and output are fp32.
    """

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        largest = linear.weight.abs().amax(1).clamp_min(_TINY)
        codes = (linear.weight * (_LARGEST / largest)[:, None]).round_().to(torch.int8)
        # A weight may lie the other way round in memory, as the fp32 kernels like it better: not its codes.
        codes = codes.contiguous()
        # By its usual name: some models of Transformers look at the type of a layer's weight.
        self.weight = _pack(codes)
        """As oneDNN lays it out for its own kernels: opaque."""
        self.scales = largest / _LARGEST**2
        """[outputs], of the product of two codes as parts of a row's largest."""
        self.bias = None if linear.bias is None else linear.bias.detach()
        self._zeros = torch.zeros(self.out_features, dtype=torch.long)

    @property
    def weight_bytes(self) -> int:
        bias = 0 if self.bias is None else self.bias.numel() * self.bias.element_size()
        return self.in_features * self.out_features + 4 * self.out_features + bias

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        rows = inputs.reshape(-1, self.in_features)
        # Some rows at a time: what is in between stays small, and in the core's own cache.
        outputs = torch.empty(len(rows), self.out_features)
        for first in range(0, len(rows), _TOGETHER):
            some = slice(first, first + _TOGETHER)
            self._compute(rows[some], outputs[some])
        return outputs.view(*inputs.shape[:-1], self.out_features)

    def _compute(self, rows: torch.Tensor, outputs: torch.Tensor) -> None:
        number = len(rows)
        largest = rows.abs().amax(-1, keepdim=True).clamp_min_(_TINY)
        parts = rows * (_LARGEST / largest)
        rounded = parts.round()
        codes = torch.empty(2 * number, self.in_features, dtype=torch.int8)
        codes[:number] = rounded
        codes[number:] = parts.sub_(rounded).mul_(_FINER)
        if 2 * number * self.out_features <= _SMALL:
            products = _product(codes, 1.0, self.weight, self.scales, self._zeros)
            product = products[:number].add_(products[number:], alpha=1 / _FINER)
        else:
            # The second code's product first, to which the other one is added where it lies.
            product = _product(codes[number:], 1 / _FINER, self.weight, self.scales, self._zeros)
            product = _added(product, codes[:number], self.weight, self.scales, self._zeros)
        if self.bias is None:
            torch.mul(product, largest, out=outputs)
        else:
            torch.addcmul(self.bias, product, largest, out=outputs)


@torch.no_grad()
def quantise(model: PreTrainedModel) -> int:
    """Exchange the linear layers of a model in fp32 on the CPU in place, one after the other, so that memory
    grows by one layer; how many there were.

    Raises:
        UnsupportedModel: this CPU has no exact product of int8, or the model no layer for it.
    """
    if not exact_products():
        raise UnsupportedModel(
            "precision int8 needs a CPU with exact products of int8 (AVX-512 VNNI, AVX-VNNI or AMX), "
            "and this one has none",
            param="precision",
            hint="Use precision fp32, or a worker on another host.",
            code="unsupported_precision",
        )
    exchanged = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            # Of this very type: what is derived from it may do more than its forward says.
            if type(child) is torch.nn.Linear and _worth(child):
                setattr(parent, name, QuantisedLinear(child))
                exchanged += 1
    if not exchanged:
        raise UnsupportedModel(
            "precision int8 is for linear layers, and this model has none that it could be used for",
            param="precision",
            hint="Use precision fp32.",
            code="unsupported_precision",
        )
    return exchanged


def exact_products() -> bool:
    """Whether products of int8 are exact here. Where a CPU has no instruction for them, oneDNN adds up pairs
    in 16 bits, which the largest codes overflow; other builds of PyTorch have no such product at all."""
    codes = torch.full((2, 64), _LARGEST, dtype=torch.int8)
    ones, zeros = torch.ones(32), torch.zeros(32, dtype=torch.long)
    try:
        weight = _pack(codes[:1].expand(32, 64).contiguous())
        product = _added(_product(codes, 1.0, weight, ones, zeros), codes, weight, ones, zeros)
    except (AttributeError, RuntimeError):
        return False
    return bool((product == 2 * 64 * _LARGEST**2).all())


def quantised_bytes(model: PreTrainedModel) -> int:
    """What the exchanged layers of a model take."""
    return sum(m.weight_bytes for m in model.modules() if isinstance(m, QuantisedLinear))


def _worth(linear: torch.nn.Linear) -> bool:
    return min(linear.in_features, linear.out_features) >= _LEAST_FEATURES


def _pack(codes: torch.Tensor) -> torch.Tensor:
    packed: torch.Tensor = torch.ops.onednn.qlinear_prepack(codes, None)
    return packed


def _product(
    codes: torch.Tensor,
    scale: float,
    weight: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
) -> torch.Tensor:
    """[rows, outputs] in fp32: codes times the packed codes of a weight, times a scale and one for each
    output."""
    product: torch.Tensor = torch.ops.onednn.qlinear_pointwise(
        codes, scale, 0, weight, scales, zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )
    return product


def _added(
    to: torch.Tensor,
    codes: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
) -> torch.Tensor:
    """Such a product of scale 1, added to another one."""
    total: torch.Tensor = torch.ops.onednn.qlinear_pointwise.binary(
        codes, 1.0, 0, weight, scales, zeros, to, None, 1.0, 0, torch.float32,
        1.0, 0, "sum", 1.0, "none", [], "",
    )  # fmt: skip
    return total
