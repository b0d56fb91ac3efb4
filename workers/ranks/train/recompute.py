"""Gradient checkpointing (Chen et al., 2016): layers keep their input and are computed again by backward.

What is computed again is bitwise what was computed before, dropout included: the state of the generators
is kept with the input. So neither the result nor a checkpoint of the training depends on it.
"""

from __future__ import annotations

import logging

from transformers import PreTrainedModel

from shared.lifecycle import FailureClass
from workers.ranks.train.failures import TrainingFailed


def recompute_layers(model: PreTrainedModel) -> None:
    """Have each layer of ``model`` keep its input alone, while it is in training mode.

    Raises:
        TrainingFailed: its class has no layers that can (user_error).
    """
    # Its name before Transformers 5.2x, and the one since.
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    try:
        enable({"use_reentrant": False})
    except ValueError as error:
        raise TrainingFailed(
            FailureClass.USER_ERROR,
            "gradient_checkpointing_unsupported",
            f"{type(model).__name__} does not support gradient checkpointing",
            "Leave out hyperparameters.gradient_checkpointing, and set a smaller micro_batch_size.",
        ) from error
    # Transformers gives the embeddings' output a gradient, for reentrant checkpoints: with these, below
    # frozen layers, that would be a backward pass for nothing.
    model.disable_input_require_grads()  # type: ignore[no-untyped-call]
    # Many configs ask for a cache of keys and values, which training has no use for.
    for handler in logging.getLogger("transformers").handlers:
        handler.addFilter(lambda record: "ncompatible with gradient" not in record.getMessage())
