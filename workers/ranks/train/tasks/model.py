"""What tasks need of model folders beyond loading them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from shared.lifecycle import FailureClass
from shared.specs import Hyperparameters
from workers.ranks.loading import LoadError, known_labels, load_tokenizer
from workers.ranks.train.failures import TrainingFailed

UNLIMITED = 10**9


def order_labels(labels: Sequence[str], model_path: Path) -> tuple[str, ...]:
    """The model's own order where it already tells these labels apart, so that its head fits."""
    known = known_labels(model_path)
    if known is not None and sorted(known) == sorted(labels):
        return known
    return tuple(labels)


def tokenizer_with_pad(path: Path) -> PreTrainedTokenizerBase:
    """Raises LoadError where the tokenizer has no padding token."""
    tokenizer = load_tokenizer(path)
    if tokenizer.pad_token_id is None:
        raise LoadError(
            "model_unsuitable",
            f"the tokenizer of '{path.name}' has no padding token",
            "Set one (tokenizer.pad_token = ...) and save it beside the model.",
        )
    return tokenizer


def text_limit(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, options: Hyperparameters
) -> int:
    """Tokens a text may have: what model, tokenizer and ``max_length`` allow.

    Raises:
        TrainingFailed: ``max_length`` is more than the model can hold.
    """
    limit = _position_limit(model)
    if limit is not None and options.max_length is not None and options.max_length > limit:
        raise TrainingFailed(
            FailureClass.USER_ERROR,
            "max_length_too_large",
            f"max_length {options.max_length} is more than the {limit} tokens that the model holds",
            "Lower hyperparameters.max_length, or leave it out: longer texts are cut.",
        )
    limits = [n for n in (options.max_length, limit, tokenizer.model_max_length) if n is not None]
    # A tokenizer that knows no limit says 10**30.
    return min(UNLIMITED, *limits)


def _position_limit(model: PreTrainedModel) -> int | None:
    """Tokens that learned positions reach to. RoBERTa and kin count them from behind the padding."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            skipped = 0 if module.padding_idx is None else module.padding_idx + 1
            return module.num_embeddings - skipped
    for name in ("max_position_embeddings", "max_encoder_position_embeddings"):
        limit = getattr(model.config, name, None)
        if isinstance(limit, int) and limit > 0:
            return limit
    return None
