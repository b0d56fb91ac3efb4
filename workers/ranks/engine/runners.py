"""Model runners: what the scheduler of rows in ``generation.py`` needs of a causal language model.

:class:`SlotRunner` computes many rows in one pass; :class:`SingleRunner` any model of Transformers,
one row at a time. :func:`choose_runner` proves by a small computation that a model's passes over
slots agree with its plain ones before it trusts them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel

from workers.ranks.engine.attention import (
    can_take_runs,
    cut_into_runs,
    forget_runs,
    uses_runs,
)
from workers.ranks.engine.head import only_at
from workers.ranks.engine.slots import SlotCache

_FIRST_SLOTS = 4


class Runner(Protocol):
    """Forward passes over rows kept in slots ``0 .. n-1``."""

    bytes_per_position: int
    """Memory of one position of one row; 0 where it isn't known."""

    @property
    def most(self) -> int | None:
        """How many rows it can hold; None: as many as memory has room for."""

    @property
    def slots(self) -> int:
        """How many rows it has room for now."""

    def reserve(self, length: int, slots: int) -> None:
        """Make room for so many rows of ``length`` tokens; may run out of memory."""

    def prefill(
        self, first: int, prompts: Sequence[Sequence[int]], known: Sequence[int] = ()
    ) -> torch.Tensor:
        """Compute prompts into the slots from ``first`` on; last logits [rows, vocabulary].

        Args:
            known: how many tokens of each prompt its slot holds already, at least one each and never
                all; empty: the prompts are computed whole.
        """

    def read(self, slot: int, length: int) -> list[torch.Tensor]:
        """A copy of what a slot holds of its first ``length`` tokens. Only asked of runners that know
        their ``bytes_per_position``."""

    def write(self, slot: int, states: list[torch.Tensor], length: int) -> None:
        """Put the first ``length`` tokens of such a copy into a slot."""

    def decode(self, tokens: Sequence[int], positions: Sequence[int]) -> torch.Tensor:
        """One token for each of the slots from 0 on; logits [rows, vocabulary]."""

    def move(self, source: int, target: int, length: int) -> None:
        """Put the row of slot ``source``, ``length`` tokens long, into slot ``target``."""

    def reset(self) -> None:
        """Forget all rows and give their memory back."""


class SlotRunner:
    """Passes over a :class:`SlotCache` with explicit masks and positions."""

    most = None

    def __init__(self, model: PreTrainedModel, bytes_per_position: int = 0) -> None:
        self.bytes_per_position = bytes_per_position
        self._model = model
        self._cache = SlotCache(_FIRST_SLOTS)
        self._in_runs = uses_runs(model)

    @property
    def slots(self) -> int:
        return self._cache.slots

    def reserve(self, length: int, slots: int) -> None:
        self._cache.reserve(length, slots)

    def prefill(
        self, first: int, prompts: Sequence[Sequence[int]], known: Sequence[int] = ()
    ) -> torch.Tensor:
        if known:
            return self._extend(first, prompts, known)
        width = max(map(len, prompts))
        ids = torch.zeros(len(prompts), width, dtype=torch.long)
        for i, prompt in enumerate(prompts):
            ids[i, : len(prompt)] = torch.tensor(prompt, dtype=torch.long)
        last = torch.tensor([len(prompt) - 1 for prompt in prompts], device=self._device)
        # Rows are left-aligned and the mask is causal: padding behind a row is never seen by it.
        causal = torch.ones(width, width, dtype=torch.bool, device=self._device).tril()
        self._cache.reserve(width)
        self._cache.begin_prefill(first)

        rows = torch.arange(len(prompts), device=self._device)
        # The vocabulary's logits are wanted for one position of each row, not for all.
        with only_at(self._model, rows, last, ids.shape) as narrowed:
            logits = self._forward(
                ids.to(self._device),
                causal[None, None].expand(len(prompts), 1, width, width),
                torch.arange(width, device=self._device).expand(len(prompts), width),
            )
        return logits[:, 0] if narrowed() else logits[rows, last]

    def _extend(
        self, first: int, prompts: Sequence[Sequence[int]], known: Sequence[int]
    ) -> torch.Tensor:
        rest = [list(prompt[start:]) for prompt, start in zip(prompts, known, strict=True)]
        width, visible = max(map(len, rest)), max(map(len, prompts)) + 1
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rest])
        # Padding is written behind its row's end, where the first token of decoding overwrites it: any
        # further on, it could be beyond the positions that the model has.
        ends = torch.tensor([len(prompt) for prompt in prompts], device=self._device)[:, None]
        places = torch.tensor(known, device=self._device)[:, None] + torch.arange(
            width, device=self._device
        )
        places = places.minimum(ends)
        mask = torch.arange(visible, device=self._device) <= places[..., None]
        self._cache.reserve(visible)
        self._cache.begin_extend(first, places, visible)
        rows = torch.arange(len(prompts), device=self._device)
        last = torch.tensor([len(row) - 1 for row in rest], device=self._device)
        with only_at(self._model, rows, last, ids.shape) as narrowed:
            logits = self._forward(ids.to(self._device), mask[:, None], places)
        return logits[:, 0] if narrowed() else logits[rows, last]

    def read(self, slot: int, length: int) -> list[torch.Tensor]:
        return self._cache.read(slot, length)

    def write(self, slot: int, states: list[torch.Tensor], length: int) -> None:
        self._cache.write(slot, states, length)

    def decode(self, tokens: Sequence[int], positions: Sequence[int]) -> torch.Tensor:
        visible = max(positions) + 1
        self._cache.reserve(visible)
        at = torch.tensor(positions, device=self._device)
        self._cache.begin_decode(at, visible)
        ids = torch.tensor(tokens, device=self._device)[:, None]
        if self._in_runs:
            runs = cut_into_runs([place + 1 for place in positions], self._cache.layer_bytes)
            unused = torch.ones(1, 1, 1, 1, dtype=torch.bool)
            return self._forward(ids, unused, at[:, None], slot_runs=runs)[:, -1]
        mask = torch.arange(visible, device=self._device)[None] <= at[:, None]
        return self._forward(ids, mask[:, None, None], at[:, None])[:, -1]

    def move(self, source: int, target: int, length: int) -> None:
        self._cache.move(source, target, length)

    def reset(self) -> None:
        self._cache = SlotCache(_FIRST_SLOTS)

    @property
    def measured_bytes_per_position(self) -> int:
        return self._cache.bytes_per_position

    @property
    def _device(self) -> torch.device:
        return self._model.device

    def _forward(
        self, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, **more: Any
    ) -> torch.Tensor:
        output: Any = self._model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
            **more,
        )
        logits: torch.Tensor = output.logits
        return logits


class SingleRunner:
    """One row at a time with the model's own cache: slow, and right for every causal model."""

    most = slots = 1
    bytes_per_position = 0

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._past: Any = None

    def reserve(self, length: int, slots: int) -> None:
        """Nothing to do: the model's own cache grows by itself."""

    def prefill(
        self,
        first: int,  # noqa: ARG002
        prompts: Sequence[Sequence[int]],
        known: Sequence[int] = (),  # noqa: ARG002
    ) -> torch.Tensor:
        self._past = None
        return self._forward(prompts[0])

    def read(self, slot: int, length: int) -> list[torch.Tensor]:
        raise NotImplementedError("the cache of any model has no known form")

    def write(self, slot: int, states: list[torch.Tensor], length: int) -> None:
        raise NotImplementedError("the cache of any model has no known form")

    def decode(self, tokens: Sequence[int], positions: Sequence[int]) -> torch.Tensor:  # noqa: ARG002
        return self._forward(tokens)

    def move(self, source: int, target: int, length: int) -> None:
        """Nothing to do: there is one slot."""

    def reset(self) -> None:
        self._past = None

    def _forward(self, ids: Sequence[int]) -> torch.Tensor:
        output: Any = self._model(
            input_ids=torch.tensor([list(ids)], device=self._model.device),
            past_key_values=self._past,
            use_cache=True,
            logits_to_keep=1,
        )
        self._past = output.past_key_values
        logits: torch.Tensor = output.logits
        return logits[:, -1]


@torch.inference_mode()
def measure_slots(model: PreTrainedModel) -> int | None:
    """Bytes of cache per position if the model can decode over slots; None if it cannot. Afterwards it has
    the attention that is best for slots of those that it can use.

    Two rows of different length are prefilled and decoded over slots, one of them also behind a beginning
    that was copied, and computed plainly; any difference (ALiBi built from 2-D masks, recurrent layers,
    sliding windows) rules slots out.
    """
    if not _attends_to_everything(model):
        return None
    if can_take_runs(model):
        if (measured := _measure(model)) is not None:
            return measured
        forget_runs(model)
    return _measure(model)


def _measure(model: PreTrainedModel) -> int | None:
    vocabulary = model.config.get_text_config().vocab_size
    rows = [[(7 * i + 3 + k) % vocabulary for i in range(n)] for k, n in enumerate((6, 4))]
    runner = SlotRunner(model)
    try:
        prefilled = runner.prefill(0, [row[:-1] for row in rows])
        decoded = runner.decode([row[-1] for row in rows], [len(row) - 1 for row in rows])
        runner.write(1, runner.read(0, 2), 2)
        extended = runner.prefill(1, [rows[0][:-1]], [2])
        plain = [_plain_logits(model, row) for row in rows]
    except torch.OutOfMemoryError:
        raise
    except Exception:  # whatever a model of any architecture does with what it does not expect
        return None
    tolerance = 1e-3 if model.dtype == torch.float32 else 5e-2
    pairs = [(extended[0], plain[0][-2])]
    for i, reference in enumerate(plain):
        pairs += [(prefilled[i], reference[-2]), (decoded[i], reference[-1])]
    for ours, theirs in pairs:
        scale = theirs.abs().max().item() or 1.0
        if not (ours.float() - theirs).abs().max().item() <= tolerance * scale:
            return None
    return runner.measured_bytes_per_position


def choose_runner(model: PreTrainedModel, bytes_per_position: int | None) -> Runner:
    """The fastest runner that the model can do; ``bytes_per_position`` is :func:`measure_slots`'."""
    if bytes_per_position is None:
        return SingleRunner(model)
    return SlotRunner(model, bytes_per_position)


def _plain_logits(model: PreTrainedModel, row: Sequence[int]) -> torch.Tensor:
    output: Any = model(input_ids=torch.tensor([row], device=model.device), use_cache=False)
    logits: torch.Tensor = output.logits[0].float()
    return logits


def _attends_to_everything(model: PreTrainedModel) -> bool:
    """False for layers with a window or a state: a short probe would not show the difference."""
    config = model.config.get_text_config()
    if any(kind != "full_attention" for kind in getattr(config, "layer_types", None) or ()):
        return False
    window = getattr(config, "sliding_window", None)
    return window is None or getattr(config, "use_sliding_window", None) is False
