"""Encoders on the CPU without padding: the layers of BERT and kin, computed over the tokens that are there.

A pass of Transformers pads its rows to one width, adds a mask over all of it, and spends a third of its time
outside of matrix products. Here the rows of a pass lie behind one another, [tokens, size], through all layers;
attention alone goes row by row, over those of equal length together and without a mask. Query, key and value
are one product, and oneDNN adds biases and GELU to products as it writes them. What comes before and after
the layers (embeddings, pooler, head) stays the model's own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import nn
from torch.nn.functional import layer_norm, scaled_dot_product_attention
from transformers import PreTrainedModel
from transformers.activations import GELUActivation, GELUTanh
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from workers.ranks.engine.padding import close, first_output

_ENCODERS = frozenset(
    {
        "BertEncoder", "RobertaEncoder", "XLMRobertaEncoder", "CamembertEncoder", "ElectraEncoder",
        "ErnieEncoder", "Data2VecTextEncoder", "Transformer",
    }
)  # fmt: skip
"""Modules that pass hidden states through their layers and do nothing else."""


@dataclass(frozen=True, slots=True)
class Parts:
    """What a layer is made of: attention, a norm, two linear layers around an activation, a norm; each norm
    over the sum with what came in."""

    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    out: nn.Linear
    first_norm: nn.LayerNorm
    up: nn.Linear
    activation: nn.Module
    down: nn.Linear
    second_norm: nn.LayerNorm
    heads: int


class Fused:
    """A linear layer with its activation behind it, its weights laid out for oneDNN."""

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor, activation: nn.Module | None = None
    ) -> None:
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
        self._bias = bias
        self.weight_bytes = 4 * (weight.numel() + bias.numel())
        form = _gelu(activation)
        self._name, self._form = ("none", "") if form is None else ("gelu", form)
        self._behind = activation if form is None else None

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
            inputs, self._weight, self._bias, self._name, [], self._form
        )
        return found if self._behind is None else self._behind(found)


def _gelu(activation: nn.Module | None) -> str | None:
    """The form of GELU that an activation is, as oneDNN calls it; None: it is something else."""
    if isinstance(activation, nn.GELU):
        return activation.approximate
    if isinstance(activation, GELUActivation):
        return "none"
    return "tanh" if isinstance(activation, GELUTanh) else None


class FusedLayer:
    """One layer, over the tokens of rows that lie behind one another.

    Args:
        last: queries are a product of their own, so that they can be computed for some tokens alone.
    """

    def __init__(self, parts: Parts, *, last: bool = False) -> None:
        self._heads = parts.heads
        three = (parts.query, parts.key, parts.value)
        products = (three[:1], three[1:]) if last else (three,)
        self._mixed = [
            Fused(
                torch.cat([each.weight for each in some]), torch.cat([each.bias for each in some])
            )
            for some in products
        ]
        self._out = Fused(parts.out.weight, parts.out.bias)
        self._up = Fused(parts.up.weight, parts.up.bias, parts.activation)
        self._down = Fused(parts.down.weight, parts.down.bias)
        self._norms = (parts.first_norm, parts.second_norm)
        norms = sum(4 * p.numel() for norm in self._norms for p in norm.parameters())
        linears = (*self._mixed, self._out, self._up, self._down)
        self.weight_bytes = norms + sum(each.weight_bytes for each in linears)

    def __call__(self, hidden: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
        """[tokens, size] of rows with so many tokens each."""
        mixed = [product(hidden) for product in self._mixed]
        if len(mixed) == 1:
            queries, keys, values = torch.chunk(mixed[0], 3, dim=1)
        else:
            queries, (keys, values) = mixed[0], torch.chunk(mixed[1], 2, dim=1)
        seen = torch.empty_like(hidden)
        for start, rows, length in _runs(lengths):
            there = slice(start, start + rows * length)
            self._attend(queries[there], keys[there], values[there], seen[there], rows)
        return self._conclude(seen, hidden)

    def first(self, hidden: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
        """[rows, size]: of each row the first token alone. Only of the last layer: what it says of other
        tokens is asked by no other."""
        firsts = torch.tensor([0, *lengths[:-1]]).cumsum(0)
        hidden_firsts = hidden.index_select(0, firsts)
        queries = self._mixed[0](hidden_firsts)
        keys, values = torch.chunk(self._mixed[1](hidden), 2, dim=1)
        seen = torch.empty_like(hidden_firsts)
        row = 0
        for start, rows, length in _runs(lengths):
            there, those = slice(start, start + rows * length), slice(row, row + rows)
            self._attend(queries[those], keys[there], values[there], seen[those], rows)
            row += rows
        return self._conclude(seen, hidden_firsts)

    def _attend(
        self,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        seen: torch.Tensor,
        rows: int,
    ) -> None:
        """Of rows of one length, each [rows x tokens, size], into ``seen``, which is as ``queries`` are."""
        shape = (rows, -1, self._heads, queries.shape[1] // self._heads)
        found = scaled_dot_product_attention(
            queries.view(shape).transpose(1, 2),
            keys.view(shape).transpose(1, 2),
            values.view(shape).transpose(1, 2),
        )
        seen.view(shape).copy_(found.transpose(1, 2))

    def _conclude(self, seen: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """What comes behind attention, token by token."""
        first, second = self._norms
        hidden = _normed(self._out(seen).add_(hidden), first)
        return _normed(self._down(self._up(hidden)).add_(hidden), second)


class FusedEncoder(nn.Module):
    """In place of a module that passes hidden states through its layers."""

    def __init__(self, layers: Sequence[FusedLayer]) -> None:
        super().__init__()
        self._layers = layers
        self.first_alone = False
        """Of each row the hidden state of the first token is wanted, and no other."""
        self.weight_bytes = sum(layer.weight_bytes for layer in layers)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **_: Any,
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        """Hidden states [rows, width, size] behind the last layer; zeros at padding, and at whatever is not
        wanted.

        Args:
            attention_mask: bool [rows, 1, any, width], of rows padded at their right; None: none is.
        """
        rows, width, size = hidden_states.shape
        flat = hidden_states.reshape(rows * width, size)
        lengths, tokens = [width] * rows, None
        if attention_mask is not None:
            there = attention_mask[:, 0, 0]
            lengths = there.sum(dim=1).tolist()
            tokens = there.reshape(-1).nonzero()[:, 0]
            flat = flat.index_select(0, tokens)
        for layer in self._layers[:-1]:
            flat = layer(flat, lengths)
        if self.first_alone:
            wanted = self._layers[-1].first(flat, lengths)
            found = wanted.new_zeros(rows, width, size)
            found[:, 0] = wanted
        else:
            found = self._layers[-1](flat, lengths)
            if tokens is not None:
                empty = found.new_zeros(rows * width, size)
                found = empty.index_copy_(0, tokens, found)
        return BaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state=found.view(rows, width, size)
        )


@contextmanager
def first_alone(model: PreTrainedModel, *, on: bool = True) -> Iterator[None]:
    """Within it, a model that has no use for other tokens than the first of each row computes the last layer
    for that one: a seventh of the work of six layers less. Other models, and ``on=False``: nothing changes."""
    encoders = (
        [module for module in model.modules() if isinstance(module, FusedEncoder)] if on else []
    )
    for encoder in encoders:
        encoder.first_alone = True
    try:
        yield
    finally:
        for encoder in encoders:
            encoder.first_alone = False


@torch.inference_mode()
def uses_first_alone(model: PreTrainedModel) -> bool:
    """Whether a model's answer is the same where of each row the first token alone is computed to the end, as
    a small computation shows."""
    if not any(isinstance(module, FusedEncoder) for module in model.modules()):
        return False
    ids = torch.arange(3, 17).view(2, 7) % model.config.get_text_config().vocab_size
    whole = first_output(model(input_ids=ids))
    with first_alone(model):
        return close(first_output(model(input_ids=ids)), whole, model.dtype)


@torch.no_grad()
def fuse_encoder(model: PreTrainedModel) -> int:
    """Exchange a model's encoder for one without padding, if it is of a known form, on the CPU and in fp32;
    how many layers were exchanged. One goes after the other, so that memory grows by one layer."""
    config: Any = model.config
    plain = model.device.type == "cpu" and model.dtype == torch.float32
    known = getattr(config, "_attn_implementation", None) == "sdpa"
    known = known and not getattr(config, "is_decoder", False)
    if not (plain and known and torch.backends.mkldnn.is_available()):  # type: ignore[no-untyped-call]
        return 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__ in _ENCODERS and (layers := _fused(child)):
                setattr(parent, name, FusedEncoder(layers))
                return len(layers)
    return 0


def _fused(encoder: nn.Module) -> list[FusedLayer]:
    """The layers of an encoder; empty, and nothing changed, where they are not as they should be."""
    layers: Any = getattr(encoder, "layer", ())
    parts = [_parts(layer) for layer in layers]
    if not parts or any(each is None for each in parts) or not _agree(layers[0], parts[0]):
        return []
    found: list[FusedLayer] = []
    for index, each in enumerate(parts):
        assert each is not None  # noqa: S101  (looked at above)
        found.append(FusedLayer(each, last=index == len(parts) - 1))
        parts[index] = None
        layers[index] = nn.Identity()
    return found


def _parts(layer: Any) -> Parts | None:
    """Of a layer as BERT or as DistilBERT has it."""
    try:
        if hasattr(layer, "intermediate"):
            own, after = layer.attention.self, layer.attention.output
            parts = Parts(
                own.query, own.key, own.value, after.dense, after.LayerNorm,
                layer.intermediate.dense, layer.intermediate.intermediate_act_fn,
                layer.output.dense, layer.output.LayerNorm, own.num_attention_heads,
            )  # fmt: skip
        else:
            own, between = layer.attention, layer.ffn
            parts = Parts(
                own.q_lin, own.k_lin, own.v_lin, own.out_lin, layer.sa_layer_norm, between.lin1,
                between.activation, between.lin2, layer.output_layer_norm, own.n_heads,
            )  # fmt: skip
    except AttributeError:
        return None
    linears = (parts.query, parts.key, parts.value, parts.out, parts.up, parts.down)
    if any(type(each) is not nn.Linear or each.bias is None for each in linears):
        return None
    return parts


def _agree(layer: nn.Module, parts: Parts | None) -> bool:
    """Whether a layer computes the same of two rows as one that is made of its parts."""
    if parts is None:
        return False
    size = parts.query.in_features
    hidden = torch.randn(2, 5, size, generator=torch.Generator().manual_seed(0))
    try:
        theirs = layer(hidden)
    except Exception:  # whatever a layer of any form does with what it does not expect
        return False
    if not isinstance(theirs, torch.Tensor):
        return False
    ours = FusedLayer(parts)(hidden.view(10, size), [5, 5])
    return close(ours, theirs.view(10, size), torch.float32)


def _normed(hidden: torch.Tensor, norm: nn.LayerNorm) -> torch.Tensor:
    return layer_norm(hidden, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def _runs(lengths: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Of neighbours of one length: where they begin, how many they are, and that length."""
    start = 0
    for length, same in groupby(lengths):
        rows = sum(1 for _ in same)
        yield start, rows, length
        start += rows * length
