"""Positions of its own for every row of a decoding pass, in decoders that count them for all rows alike.

A decoder of an encoder-decoder takes the length of its cache for the position of the next token, which is
right when all rows began together. In slots each row is at another place. There are two kinds: those that add
an embedding of the position to that of the token (BART and kin, whatever the offset into their table), and
those that add a bias to attention by the distance of two tokens (T5 and kin).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

Bias = Callable[..., torch.Tensor]


class Positions:
    """How one decoder is told where its rows are.

    Args:
        decoder: of a model of Transformers.
        embed: runs the decoder over so many tokens of one row, from position 0 on.
        most: positions that the decoder has, where it embeds them.

    Raises:
        ValueError: the decoder knows positions in neither way.
    """

    def __init__(self, decoder: torch.nn.Module, embed: Callable[[int], object], most: int) -> None:
        found = getattr(decoder, "embed_positions", None)
        self._embedding: torch.nn.Module | None = found
        self._biased = [
            module
            for module in decoder.modules()
            if getattr(module, "has_relative_attention_bias", False)
            and hasattr(module, "compute_bias")
        ]
        if self._embedding is None and not self._biased:
            raise ValueError("the decoder has no positions that could be set")
        self._table = None if self._embedding is None else _learn(self._embedding, embed, most)

    @contextmanager
    def at(self, positions: torch.Tensor) -> Iterator[None]:
        """Within it, a pass over one token a row takes ``positions`` [rows] for theirs."""
        hook = None
        if self._embedding is not None and self._table is not None:
            vectors = self._table[positions][:, None]
            hook = self._embedding.register_forward_hook(lambda *_: vectors)
        for module in self._biased:
            # On the instance, over the method of its class.
            module.compute_bias = _biases(module.compute_bias, positions)  # type: ignore[assignment, arg-type]
        try:
            yield
        finally:
            if hook is not None:
                hook.remove()
            for module in self._biased:
                del module.compute_bias


class _Seen(Exception):
    """Ends a pass whose beginning was all that was wanted."""


def _learn(embedding: torch.nn.Module, embed: Callable[[int], object], most: int) -> torch.Tensor:
    """What a decoder adds at each of its positions, [positions, size]: seen from outside, as each family
    has its own offset and its own signature."""
    seen: list[torch.Tensor] = []

    def note(_: torch.nn.Module, __: Sequence[Any], output: torch.Tensor) -> None:
        seen.append(output.reshape(-1, output.shape[-1]))
        raise _Seen

    hook = embedding.register_forward_hook(note)
    try:
        embed(most)
    except _Seen:
        return seen[0]
    finally:
        hook.remove()
    raise ValueError("the decoder does not embed its positions")


def _biases(alike: Bias, positions: torch.Tensor) -> Bias:
    """A ``compute_bias`` for rows that are at ``positions``, out of that for rows that are at one place."""

    def compute_bias(
        query_length: int,  # noqa: ARG001  (the signature of Transformers: one token a row here)
        key_length: int,
        device: torch.device | None = None,
        past_seen_tokens: int = 0,  # noqa: ARG001
    ) -> torch.Tensor:
        last = alike(1, key_length, device=device, past_seen_tokens=key_length - 1)
        by_distance = last[0, :, 0].flip(-1).t()
        keys = torch.arange(key_length, device=positions.device)
        # Keys behind a row's position are masked: any number does for them.
        distance = (positions[:, None] - keys).clamp(min=0)
        return by_distance[distance].permute(0, 2, 1)[:, :, None]

    return compute_bias
