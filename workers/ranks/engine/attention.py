"""Attention of one new token a row over caches of different length, on the CPU.

There the time of it is that of reading keys and values, and a pass over all rows together reads every
row's up to the length of the longest. Here rows are taken in *runs* of slots next to each other that are
about as long: in the extreme each alone, and then nothing is read that is not needed. Heads that share
their keys are computed as queries of one head, so that these are read once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

NAME = "gpuyard_slots"
"""Of this attention among those of Transformers."""
RUN_BYTES = 100_000
"""What could be read while a run more is begun: so much may be read in vain instead, of one layer."""


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """Slots ``first .. stop-1``, of which ``visible`` positions are read."""

    first: int
    stop: int
    visible: int
    mask: torch.Tensor | None
    """[rows, 1, 1, visible], added to the scores; None: all rows are as long."""


def cut_into_runs(lengths: Sequence[int], bytes_per_position: int) -> list[Run]:
    """The runs for rows of ``lengths`` positions each, the new one included.

    Args:
        bytes_per_position: what one layer keeps of a position.
    """
    runs: list[Run] = []
    first = 0
    shortest = longest = lengths[0]
    for slot, length in enumerate(lengths[1:], 1):
        rows = slot - first
        vain = max(0, length - longest) * rows + max(0, longest - length)
        if vain * bytes_per_position > RUN_BYTES:
            runs.append(_run(lengths, first, slot, shortest, longest))
            first, shortest, longest = slot, length, length
        else:
            shortest, longest = min(shortest, length), max(longest, length)
    runs.append(_run(lengths, first, len(lengths), shortest, longest))
    return runs


def _run(lengths: Sequence[int], first: int, stop: int, shortest: int, longest: int) -> Run:
    if shortest == longest:
        return Run(first, stop, longest, None)
    seen = torch.arange(longest)[None] < torch.tensor(lengths[first:stop])[:, None]
    mask = torch.zeros(seen.shape).masked_fill_(~seen, -torch.inf)
    return Run(first, stop, longest, mask[:, None, None])


def attend_to_slots(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    slot_runs: Sequence[Run] | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """As Transformers calls an attention; without ``slot_runs`` it is its ``sdpa``.

    Args:
        query: [rows, heads, 1, size] with ``slot_runs``.
        key, value: [rows, key heads, positions, size].
    """
    if slot_runs is None:
        output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        return output, None
    rows, heads, _, size = query.shape
    kept = key.shape[1]
    scaling = kwargs.get("scaling")
    grouped = query.reshape(rows, kept, heads // kept, size)
    parts = [
        torch.nn.functional.scaled_dot_product_attention(
            grouped[run.first : run.stop],
            key[run.first : run.stop, :, : run.visible],
            value[run.first : run.stop, :, : run.visible],
            attn_mask=run.mask,
            scale=scaling,
        )
        for run in slot_runs
    ]
    attended = torch.cat(parts) if len(parts) > 1 else parts[0]
    return attended.reshape(rows, 1, heads, value.shape[-1]), None


def can_take_runs(model: PreTrainedModel) -> bool:
    """Have a model use this attention, where it lets it be chosen and computes on the CPU with
    PyTorch's own."""
    if uses_runs(model):
        return True
    if model.device.type != "cpu" or model.config.get_text_config()._attn_implementation != "sdpa":
        return False
    try:
        model.set_attn_implementation(NAME)
    except (ValueError, ImportError):
        return False
    return uses_runs(model)


def forget_runs(model: PreTrainedModel) -> None:
    """Back to PyTorch's own attention."""
    model.set_attn_implementation("sdpa")


def uses_runs(model: PreTrainedModel) -> bool:
    """Whether a model's passes understand ``slot_runs``."""
    return bool(model.config.get_text_config()._attn_implementation == NAME)


AttentionInterface.register(NAME, attend_to_slots)
AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
assert NAME in ALL_ATTENTION_FUNCTIONS  # noqa: S101
