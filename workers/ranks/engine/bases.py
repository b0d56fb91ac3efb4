"""One set of weights for several tasks: what models of one folder have in common is held once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from shared.specs import SEQ2SEQ, Task
from workers.ranks.engine.padding import close, first_output, pad_rows, pad_token, sample_rows

CAUSAL: frozenset[Task] = frozenset(("text-generation", "scoring"))
ENCODED: frozenset[Task] = frozenset(
    ("text-classification", "token-classification", "fill-mask", "embeddings", "reranking")
)
"""Tasks whose models read a text as a whole, and write none."""


def same_model(task: Task, other: Task) -> bool:
    """Whether two tasks are done by the very same model."""
    return any(task in tasks and other in tasks for tasks in (CAUSAL, frozenset(SEQ2SEQ)))


def same_base(task: Task, other: Task) -> bool:
    """Whether models of two tasks are heads over what may be the same encoder."""
    return task in ENCODED and other in ENCODED


@torch.no_grad()
def share_base(
    model: PreTrainedModel, other: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> bool:
    """Take the embeddings and layers of another model of the same folder in place of the model's own. Where
    the model then computes otherwise, as a small computation shows, it keeps its own."""
    mine: Any = model.base_model
    theirs: Any = other.base_model
    if mine.config.model_type != theirs.config.model_type:
        return False
    before = _computed(model, tokenizer)
    own = dict(mine.named_children())
    for name, child in theirs.named_children():
        # Poolers are of the head as much as of the base: some folders have none, and one is made up.
        if child is not None and own.get(name) is not None and name != "pooler":
            setattr(mine, name, child)
    # A head that has the embeddings' weights has those of the others now.
    model.tie_weights()
    after = _computed(model, tokenizer)
    pairs = zip(before or (), after or (), strict=False)
    if before and after and all(close(one, two, model.dtype) for one, two in pairs):
        return True
    for name, child in own.items():
        setattr(mine, name, child)
    model.tie_weights()
    return False


def shared_bytes(models: Iterable[nn.Module]) -> int:
    """What is counted too often where each model counts for itself."""
    times: Counter[int] = Counter()
    sizes: dict[int, int] = {}
    for model in models:
        seen: dict[int, int] = {}
        for module in model.modules():
            # Weights in a form of their own are told by whoever holds them.
            if isinstance(held := getattr(module, "weight_bytes", None), int):
                seen[id(module)] = held
            for weight in module.parameters(recurse=False):
                seen[id(weight)] = weight.numel() * weight.element_size()
        times.update(seen.keys())
        sizes |= seen
    return sum((count - 1) * sizes[each] for each, count in times.items())


def _computed(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> list[torch.Tensor] | None:
    """Of two texts, each by itself; None where the model does not take them so."""
    rows = sample_rows(tokenizer)
    if rows is None:
        return None
    found: list[torch.Tensor] = []
    for row in rows:
        ids, _ = pad_rows([row], pad_token(model, tokenizer), model.device)
        found.append(first_output(model(input_ids=ids)).clone())
    return found
