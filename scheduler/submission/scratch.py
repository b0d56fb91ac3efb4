"""The shape of a model that is trained from scratch, counted from its architecture. Pure.

Sizes follow the configurations that the rank makes (``workers/ranks/train/scratch.py``). The vocabulary
is the most that the spec allows: how many tokens the data make is known only once they are read.
"""

from __future__ import annotations

from scheduler.footprint import ModelShape
from shared.specs import Architecture

FP32 = 4


def shape_of(architecture: Architecture) -> ModelShape:
    """What the footprint estimate needs to know."""
    hidden, inner, layers = architecture.hidden, architecture.inner, architecture.layers
    attention, mlp = 4 * hidden * hidden, 2 * hidden * inner
    embeddings, positions = architecture.vocabulary * hidden, architecture.positions * hidden
    match architecture.type:
        case "bert":
            norms = 9 * hidden + inner + 4 * hidden
            body = layers * (attention + mlp + norms) + positions + 4 * hidden
            head = hidden * hidden + 3 * hidden + architecture.vocabulary
        case "gpt2":
            body = layers * (attention + mlp + 9 * hidden + inner + 4 * hidden) + positions
            head = 2 * hidden
        case "llama":
            body, head = layers * (attention + 3 * hidden * inner + 2 * hidden), hidden
        case "t5":
            body = layers * (attention + mlp + 2 * hidden) + layers * (
                2 * attention + mlp + 3 * hidden
            )
            head, layers = 2 * hidden, 2 * layers
        case "bart":
            both = attention + mlp + 9 * hidden + inner
            across = attention + 6 * hidden
            # Each side has positions of its own, the first two of which are never used.
            body = layers * (2 * both + across) + 2 * (positions + 2 * hidden)
            head, layers = 4 * hidden, 2 * layers
    tensors = (("embeddings", embeddings), ("body", body), ("head", head))
    parameters = sum(elements for _, elements in tensors)
    return ModelShape(
        tensors=tensors,
        weight_bytes=FP32 * parameters,
        model_type=architecture.type,
        hidden=hidden,
        layers=layers,
        heads=architecture.heads,
        kv_heads=architecture.heads,
        head_dim=hidden // architecture.heads,
        intermediate=inner,
        vocabulary=architecture.vocabulary,
        positions=architecture.positions,
        gated_mlp=architecture.type == "llama",
        attention_dropout=architecture.type in ("bert", "gpt2"),
    )
