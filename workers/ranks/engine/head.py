"""Passes that compute the vocabulary's logits where they are wanted, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

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
