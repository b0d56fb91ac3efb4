"""Passes that compute the vocabulary's logits where they are wanted, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel


@contextmanager
def only_at(
    model: PreTrainedModel, rows: torch.Tensor, columns: torch.Tensor, shape: torch.Size
) -> Iterator[Callable[[], bool]]:
    """Within it, the last layer of a language model sees the hidden states of some positions only.

    Args:
        rows, columns: the n positions, out of ``shape``.
        shape: [rows, width] of the pass.

    Yields:
        Asked after the pass: whether the logits are [n, 1, vocabulary]. Otherwise this model computes
        its logits in another way, and they are [rows, width, vocabulary] as ever.
    """
    done = False

    def narrow(_: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor] | None:
        nonlocal done
        hidden = args[0]
        if hidden.shape[:2] != shape:
            return None
        done = True
        return (hidden[rows, columns][:, None],)

    head: torch.nn.Module | None = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    hook = head.register_forward_pre_hook(narrow) if head is not None else None
    try:
        yield lambda: done
    finally:
        if hook is not None:
            hook.remove()


@contextmanager
def before_head(
    head: torch.nn.Module, rows: torch.Tensor, columns: torch.Tensor
) -> Iterator[Callable[[], torch.Tensor]]:
    """Within it, what comes before the last layer at some positions of a pass is kept, and the pass's own
    logits are of one position alone.

    Args:
        head: as :func:`plain_head` found it.
        rows, columns: the n positions.

    Yields:
        Asked after the pass: their hidden states [n, size].
    """
    kept: list[torch.Tensor] = []

    def keep(_: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        kept.append(args[0][rows, columns])
        return (args[0][:1, :1],)

    hook = head.register_forward_pre_hook(keep)
    try:
        yield lambda: kept[0]
    finally:
        hook.remove()


_LARGE = 1000.0
"""A cap on logits, or a scale, would show in those of hidden states so many times their size."""


@torch.inference_mode()
def plain_head(model: PreTrainedModel) -> torch.nn.Module | None:
    """The last layer of a language model whose logits are that layer's output and nothing more; None
    where something follows it (a cap, a scale), or where it is not the last."""
    head: torch.nn.Module | None = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if head is None:
        return None
    ids = torch.zeros(1, 3, dtype=torch.long, device=model.device)
    seen: list[torch.Tensor] = []

    def enlarge(_: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        seen.append(args[0] * _LARGE)
        return (seen[-1],)

    hook = head.register_forward_pre_hook(enlarge)
    try:
        output: Any = model(input_ids=ids, use_cache=False)
    finally:
        hook.remove()
    if len(seen) != 1 or seen[0].shape[:2] != ids.shape:
        return None
    alone, logits = head(seen[0]), output.logits
    same = alone.shape == logits.shape and torch.allclose(alone.float(), logits.float(), rtol=1e-3)
    return head if same else None
