"""Tokenised examples, kept flat: a token costs 4 bytes, an example some 40 more. Texts are not kept."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from workers.ranks.train.order import Indices

IGNORED = -100
"""The target of a token that the loss does not look at, as PyTorch's cross entropy has it."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Padded to its longest example. ``inputs`` are what the model is called with, ``targets`` what
    its answer is compared with."""

    inputs: dict[str, torch.Tensor]
    targets: dict[str, torch.Tensor]
    tokens: int
    """Without padding."""

    def to(self, device: torch.device) -> Batch:
        return Batch(
            {name: tensor.to(device) for name, tensor in self.inputs.items()},
            {name: tensor.to(device) for name, tensor in self.targets.items()},
            self.tokens,
        )


class Ragged:
    """Lists of integers of any length, end to end in one array."""

    def __init__(self, values: NDArray[np.int32], ends: NDArray[np.int64]) -> None:
        self.values = values
        self.ends = ends
        self._starts = np.concatenate([np.zeros(1, np.int64), ends[:-1]])

    @staticmethod
    def of(lists: Iterable[Sequence[int]]) -> Ragged:
        values, ends = array("i"), array("q")
        for items in lists:
            values.extend(items)
            ends.append(len(values))
        return Ragged(np.array(values, np.int32), np.array(ends, np.int64))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> NDArray[np.int32]:
        part: NDArray[np.int32] = self.values[self._starts[index] : self.ends[index]]
        return part

    @property
    def lengths(self) -> NDArray[np.int32]:
        lengths: NDArray[np.int32] = (self.ends - self._starts).astype(np.int32)
        return lengths

    def take(self, indices: Indices) -> Ragged:
        """A copy of some lists, in the order given."""
        parts = [self[int(i)] for i in indices]
        values = np.concatenate(parts) if parts else np.zeros(0, np.int32)
        return Ragged(values, np.cumsum([len(part) for part in parts], dtype=np.int64))

    def padded(self, indices: Indices | Sequence[int], filler: int) -> NDArray[np.int64]:
        """[indices, longest of them], the rest ``filler``."""
        parts = [self[int(i)] for i in indices]
        width = max([1, *map(len, parts)])
        block = np.full((len(parts), width), filler, dtype=np.int64)
        for row, part in enumerate(parts):
            block[row, : len(part)] = part
        return block


class Examples(Dataset[dict[str, NDArray[np.int32]]]):
    """The examples of one file, by column: lists of integers in ``ragged``, one number each in
    ``dense``.

    Args:
        lengths: Tokens that an example costs; batches group by it.
        weights: What an example counts for in the loss, which is a mean over the sum of them: 1, or
            the tokens that are to be predicted.
        cut: Whether the example was cut to the model's maximum.
    """

    def __init__(
        self,
        ragged: Mapping[str, Ragged],
        dense: Mapping[str, NDArray[np.float64] | NDArray[np.int64]],
        *,
        lengths: NDArray[np.int32],
        weights: NDArray[np.int64],
        cut: NDArray[np.bool_],
    ) -> None:
        self.ragged = dict(ragged)
        self.dense = dict(dense)
        self.lengths = lengths
        self.weights = weights
        self.cut = cut

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict[str, NDArray[np.int32]]:
        """The lists of one example."""
        return {name: column[index] for name, column in self.ragged.items()}

    def subset(self, indices: Indices) -> Examples:
        """A copy of some examples, in the order given."""
        return Examples(
            {name: column.take(indices) for name, column in self.ragged.items()},
            {name: column[indices] for name, column in self.dense.items()},
            lengths=self.lengths[indices],
            weights=self.weights[indices],
            cut=self.cut[indices],
        )

    @property
    def largest_token(self) -> int:
        """Of the lists that hold token ids."""
        return max(
            (int(c.values.max(initial=0)) for n, c in self.ragged.items() if n in TOKEN_COLUMNS),
            default=0,
        )

    def digest(self) -> str:
        """SHA-256 over all that training reads: equal for data that train alike."""
        sha = hashlib.sha256()
        for name in sorted(self.ragged):
            sha.update(name.encode())
            sha.update(self.ragged[name].values.tobytes())
            sha.update(self.ragged[name].ends.tobytes())
        for name in sorted(self.dense):
            sha.update(name.encode())
            sha.update(self.dense[name].tobytes())
        return sha.hexdigest()


TOKEN_COLUMNS = frozenset({"tokens", "target_tokens", "other_tokens"})


def pad_tokens(
    column: Ragged, indices: Indices | Sequence[int], pad: int
) -> tuple[dict[str, torch.Tensor], int]:
    """``input_ids`` and ``attention_mask`` of a batch, both [examples, tokens], and how many tokens
    there are without padding."""
    ids = column.padded(indices, pad)
    lengths = np.array([len(column[int(i)]) for i in indices])
    mask = (np.arange(ids.shape[1])[None, :] < lengths[:, None]).astype(np.int64)
    inputs = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
    return inputs, int(lengths.sum())
