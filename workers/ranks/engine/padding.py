"""Rows of different length in one pass, and whether a model computes the same for them as alone.

Most encoders do under an attention mask. Some do not: those that mix along the whole width (FNet,
ConvBERT), and decoders that find a row's end by a pad token they do not have.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

_SAMPLES = ("one two three four five six seven", "one two")


def pad_token(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """The token to pad with: the model's own, as some find a row's end or its positions by it."""
    for token in (model.config.pad_token_id, tokenizer.pad_token_id):
        if isinstance(token, int):
            return token
    return 0


def pad_rows(
    rows: Sequence[Sequence[int]], pad: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask, both [rows, width], right-padded to the longest row."""
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), pad, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row, dtype=torch.long)
        mask[i, : len(row)] = 1
    return ids.to(device), mask.to(device)


def sample_rows(tokenizer: PreTrainedTokenizerBase) -> list[list[int]] | None:
    """Two rows of different length to try a model with; None if the tokenizer makes them equal."""
    rows: list[list[int]] = [tokenizer(text)["input_ids"] for text in _SAMPLES]
    return rows if len(rows[0]) > len(rows[1]) > 0 else None


@torch.inference_mode()
def same_when_padded(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a padded row gets what it gets alone, proved by a small computation."""
    rows = sample_rows(tokenizer)
    if rows is None:
        return False
    ids, mask = pad_rows(rows, pad_token(model, tokenizer), model.device)
    try:
        together = first_output(model(input_ids=ids, attention_mask=mask))
        alone = [
            first_output(model(input_ids=ids[i : i + 1, : len(row)])) for i, row in enumerate(rows)
        ]
    except torch.OutOfMemoryError:
        raise
    except Exception:  # whatever a model of any architecture does with what it does not expect
        return False
    return all(close(together[i][: len(a[0])], a[0], model.dtype) for i, a in enumerate(alone))


def close(ours: torch.Tensor, theirs: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether two computations of the same in ``dtype`` agree."""
    tolerance = 1e-4 if dtype == torch.float32 else 5e-2
    scale = theirs.abs().max().item() or 1.0
    return (ours.float() - theirs.float()).abs().max().item() <= tolerance * scale


def first_output(output: Any) -> torch.Tensor:
    """Of what a model gave: logits [rows, labels] or [rows, width, labels], or hidden states [rows, width, size]."""
    first: torch.Tensor = output[0]
    return first
