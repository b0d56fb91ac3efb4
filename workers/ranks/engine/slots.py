"""A dense key/value cache in which every row has its own length.

Slot ``i`` of each layer holds row ``i``'s keys and values from position 0, left-aligned. Rows of
different length decode together under a mask; a finished row's slot is given to the next one with
no copy of the others. Active rows are kept in slots ``0 .. n-1``.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import DynamicCache

CAPACITY_STEP = 64
"""Slots grow by whole steps of positions, so that growing is rare."""


class SlotCache(DynamicCache):
    """Passed to a Transformers decoder as ``past_key_values``; layers appear as they are first
    written, so that every layer may have its own number of heads and head size.

    Call :meth:`begin_prefill`, :meth:`begin_extend` or :meth:`begin_decode` before each forward pass;
    ``update`` is then called by the model's layers.
    """

    def __init__(self, slots: int) -> None:
        super().__init__()
        self.slots = slots
        self.capacity = 0
        self._keys: list[torch.Tensor] = []
        self._values: list[torch.Tensor] = []
        self._first = 0
        self._positions: torch.Tensor | None = None
        self._visible = 0

    @property
    def bytes_per_position(self) -> int:
        """Memory that one position of one row takes, over all layers; 0 before the first pass."""
        return sum(t.shape[1] * t.shape[3] * t.element_size() for t in (*self._keys, *self._values))

    @property
    def layer_bytes(self) -> int:
        """The same of one layer, in the mean."""
        return self.bytes_per_position // max(1, len(self._keys))

    def reserve(self, length: int, slots: int = 0) -> None:
        """Make room for rows of ``length`` positions, and for ``slots`` of them. What the slots hold is
        kept.

        Raises:
            torch.OutOfMemoryError, RuntimeError: there is no memory for it.
        """
        if length <= self.capacity and slots <= self.slots:
            return
        self.capacity = max(self.capacity, -(-length // CAPACITY_STEP) * CAPACITY_STEP)
        self.slots = max(self.slots, slots)
        for tensors in (self._keys, self._values):
            for layer, old in enumerate(tensors):
                new = self._zeros(old)
                new[: old.shape[0], :, : old.shape[2]] = old
                tensors[layer] = new

    def begin_prefill(self, first: int) -> None:
        """The next pass computes whole prompts for the slots from ``first`` on."""
        self._first, self._positions = first, None

    def begin_extend(self, first: int, positions: torch.Tensor, visible: int) -> None:
        """The next pass computes tokens behind what the slots from ``first`` on hold already: token ``t``
        of row ``i`` at ``positions[i, t]``; ``visible`` is the largest position plus one."""
        self._first, self._positions, self._visible = first, positions, visible

    def begin_decode(self, positions: torch.Tensor, visible: int) -> None:
        """The next pass computes one token for the slots from 0 on, row ``i`` at ``positions[i]``;
        ``visible`` is the largest position plus one."""
        self._first, self._positions, self._visible = 0, positions, visible

    def read(self, slot: int, length: int) -> list[torch.Tensor]:
        """A copy of the first ``length`` positions of a slot: keys and values of each layer, [heads,
        positions, size]."""
        tensors = (*self._keys, *self._values)
        return [tensor[slot, :, :length].clone() for tensor in tensors]

    def write(self, slot: int, states: list[torch.Tensor], length: int) -> None:
        """Put the first ``length`` positions of what :meth:`read` gave into a slot."""
        for tensor, kept in zip((*self._keys, *self._values), states, strict=True):
            tensor[slot, :, :length] = kept[:, :length]

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first ``length`` positions of a slot over another."""
        for tensor in (*self._keys, *self._values):
            tensor[target, :, :length] = tensor[source, :, :length]

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: Any,  # noqa: ARG002  (the signature of Transformers' caches)
        **kwargs: Any,  # noqa: ARG002
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store new keys and values [rows, heads, new positions, size]; return all visible ones."""
        while len(self._keys) <= layer_idx:
            self._keys.append(self._zeros(key_states))
            self._values.append(self._zeros(value_states))
        keys, values = self._keys[layer_idx], self._values[layer_idx]
        rows, _, new, _ = key_states.shape
        if self._positions is None:
            # Padding behind a short prompt is stored too: masked until decoding overwrites it.
            keys[self._first : self._first + rows, :, :new] = key_states
            values[self._first : self._first + rows, :, :new] = value_states
            return key_states, value_states
        if self._positions.dim() == 2:
            rows_there = torch.arange(self._first, self._first + rows, device=keys.device)[:, None]
            keys[rows_there, :, self._positions] = key_states.transpose(1, 2)
            values[rows_there, :, self._positions] = value_states.transpose(1, 2)
            there = slice(self._first, self._first + rows)
            return keys[there, :, : self._visible], values[there, :, : self._visible]
        row = torch.arange(rows, device=keys.device)
        keys[row, :, self._positions] = key_states[:, :, 0]
        values[row, :, self._positions] = value_states[:, :, 0]
        return keys[:rows, :, : self._visible], values[:rows, :, : self._visible]

    def get_seq_length(self, layer_idx: int = 0) -> int:  # noqa: ARG002
        """Always 0: positions are given with every pass."""
        return 0

    def _zeros(self, like: torch.Tensor) -> torch.Tensor:
        # Zeros, not empty: a masked NaN would still spoil the weighted sum of the values.
        heads, size = like.shape[1], like.shape[3]
        return torch.zeros(
            self.slots, heads, self.capacity, size, dtype=like.dtype, device=like.device
        )
