"""Keys and values of rows in slots, dense, each row left-aligned and as long as it is."""

from __future__ import annotations

import torch

CAPACITY_STEP = 64
"""Slots grow by whole steps of positions, so that growing is rare."""


class DenseStates:
    """Of each layer of one kind of attention, keys and values [slots, heads, capacity, size]. A layer appears
    when it is first written, so that each may have its own number of heads and head size."""

    def __init__(self) -> None:
        self.slots = 0
        self.capacity = 0
        self._layers: list[tuple[torch.Tensor, torch.Tensor]] = []

    @property
    def bytes_per_position(self) -> int:
        """Memory that one position of one row takes, over all layers; 0 before anything is written."""
        tensors = [tensor for layer in self._layers for tensor in layer]
        return sum(t.shape[1] * t.shape[3] * t.element_size() for t in tensors)

    @property
    def bytes(self) -> int:
        """Memory that all of it takes."""
        return self.slots * self.capacity * self.bytes_per_position

    def reserve(self, slots: int, length: int) -> None:
        """Make room for so many rows of ``length`` positions. What the slots hold is kept.

        Raises:
            torch.OutOfMemoryError, RuntimeError: there is no memory for it.
        """
        if length <= self.capacity and slots <= self.slots:
            return
        self.resize(max(self.slots, slots), max(self.capacity, length))

    def resize(self, slots: int, length: int) -> None:
        """Have room for just so many rows of ``length`` positions. What of the slots is within is kept.

        Raises:
            torch.OutOfMemoryError, RuntimeError: there is no memory for it.
        """
        self.slots, self.capacity = slots, -(-length // CAPACITY_STEP) * CAPACITY_STEP
        for index, (keys, values) in enumerate(self._layers):
            self._layers[index] = (self._resized(keys), self._resized(values))

    def write(self, layer: int, first: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Put states [rows, heads, length, size] into the slots from ``first`` on, from position 0."""
        rows, _, length, _ = keys.shape
        self._appear(layer, keys, values)
        for stored, new in zip(self._layers[layer], (keys, values), strict=True):
            stored[first : first + rows, :, :length] = new

    def put(
        self, layer: int, positions: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> None:
        """Put states [rows, heads, 1, size] into the slots from 0 on, row ``i`` at ``positions[i]``."""
        self._appear(layer, keys, values)
        row = torch.arange(len(positions), device=keys.device)
        for stored, new in zip(self._layers[layer], (keys, values), strict=True):
            stored[row, :, positions] = new[:, :, 0]

    def view(self, layer: int, rows: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the first ``length`` positions of the first ``rows`` slots."""
        keys, values = self._layers[layer]
        return keys[:rows, :, :length], values[:rows, :, :length]

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first ``length`` positions of a slot over another."""
        for layer in self._layers:
            for stored in layer:
                stored[target, :, :length] = stored[source, :, :length]

    def _appear(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        if layer == len(self._layers):
            self._layers.append((self._zeros(keys), self._zeros(values)))

    def _resized(self, old: torch.Tensor) -> torch.Tensor:
        new = self._zeros(old)
        slots, length = min(len(old), self.slots), min(old.shape[2], self.capacity)
        new[:slots, :, :length] = old[:slots, :, :length]
        return new

    def _zeros(self, like: torch.Tensor) -> torch.Tensor:
        # Zeros, not empty: a masked NaN would still spoil the weighted sum of the values.
        shape = (self.slots, like.shape[1], self.capacity, like.shape[3])
        return torch.zeros(shape, dtype=like.dtype, device=like.device)
