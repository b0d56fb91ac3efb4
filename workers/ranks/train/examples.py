"""Tokenised examples, kept flat: a token costs 4 bytes, an example some 40 more. Texts are not kept.

The arrays are in memory, or mapped from files (``columns.py``).
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
    """Lists of integers of any length, in one array: list ``i`` ends at ``ends[i]`` and begins where
    the one before ended, or at ``starts[i]``, where these are some lists of many."""

    def __init__(
        self,
        values: NDArray[np.int32],
        ends: NDArray[np.int64],
        starts: NDArray[np.int64] | None = None,
    ) -> None:
        self.values = values
        self.ends = ends
        self.starts = starts

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
        part: NDArray[np.int32] = self.values[self._start(index) : self.ends[index]]
        return part

    def take(self, indices: Indices) -> Ragged:
        """Some lists, in the order given. The values are not copied: they may be more than memory."""
        return Ragged(self.values, self.ends[indices], self._start(indices))

    def _start(self, index: int | Indices) -> Any:
        if self.starts is not None:
            return self.starts[index]
        return self.ends[index - 1] * (np.asarray(index) > 0)

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
        folder: Where the columns are mapped from.
    """

    def __init__(
        self,
        ragged: Mapping[str, Ragged],
        dense: Mapping[str, NDArray[np.float64] | NDArray[np.int64]],
        *,
        lengths: NDArray[np.int32],
        weights: NDArray[np.int64],
        cut: NDArray[np.bool_],
        folder: Path | None = None,
    ) -> None:
        self.ragged = dict(ragged)
        self.dense = dict(dense)
        self.lengths = lengths
        self.weights = weights
        self.cut = cut
        self.folder = folder
        self.held: object = None
        """What must not be let go of while the examples are used."""
        self._digest: str | None = None

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict[str, NDArray[np.int32]]:
        """The lists of one example."""
        return {name: column[index] for name, column in self.ragged.items()}

    def subset(self, indices: Indices) -> Examples:
        """Some examples, in the order given. Their lists stay where they are."""
        part = Examples(
            {name: column.take(indices) for name, column in self.ragged.items()},
            {name: column[indices] for name, column in self.dense.items()},
            lengths=self.lengths[indices],
            weights=self.weights[indices],
            cut=self.cut[indices],
        )
        part.held = self.held
        # Which of what: no need to read all of it again.
        chosen = hashlib.sha256(self.digest().encode())
        chosen.update(np.ascontiguousarray(indices, np.int64).data)
        part._digest = chosen.hexdigest()
        return part

    def beside(self, numbers: Mapping[str, NDArray[np.float64]]) -> Examples:
        """The same examples with further numbers, which follow from them and from the model before
        training. The digest is the same: on other hardware such numbers differ in their last bits."""
        more = Examples(
            self.ragged,
            {**self.dense, **numbers},
            lengths=self.lengths,
            weights=self.weights,
            cut=self.cut,
            folder=self.folder,
        )
        more.held = self.held
        more._digest = self.digest()
        return more

    @property
    def largest_token(self) -> int:
        """Of the lists that hold token ids; of all of them also where these are some of many."""
        return max(
            (int(c.values.max(initial=0)) for n, c in self.ragged.items() if n in TOKEN_COLUMNS),
            default=0,
        )

    def digest(self) -> str:
        """SHA-256 over all that training reads: equal for data that train alike."""
        if self._digest is None:
            sha = hashlib.sha256()
            for name in sorted(self.ragged):
                sha.update(name.encode())
                sha.update(np.ascontiguousarray(self.ragged[name].values).data)
                sha.update(np.ascontiguousarray(self.ragged[name].ends).data)
            for name in sorted(self.dense):
                sha.update(name.encode())
                sha.update(np.ascontiguousarray(self.dense[name]).data)
            self._digest = sha.hexdigest()
        return self._digest


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
