"""LoRA (Hu et al., 2021): a few small matrices are trained beside the frozen weights.

The layers are put into the model in place, so that the loop, DDP and checkpoints see a model like any
other, of which little is trainable. What is delivered is both: the adapter alone, as PEFT writes it,
and the whole model with the adapter merged into its weights.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel
from transformers import PreTrainedModel

from shared.lifecycle import FailureClass
from shared.specs import Lora
from workers.ranks.train.failures import TrainingFailed
from workers.ranks.train.order import derive


class Adapter:
    """The trained part of a model."""

    def __init__(self, peft_model: PeftModel) -> None:
        self._peft_model = peft_model

    def save(self, folder: Path, base: str) -> None:
        """Write the adapter as PEFT reads it: safetensors, and a config that names its ``base``."""
        for config in self._peft_model.peft_config.values():
            # Else it would carry the path of a folder of this machine.
            config.base_model_name_or_path = base
        # Left to choose, it asks the hub whether the base has another vocabulary.
        self._peft_model.save_pretrained(
            str(folder), safe_serialization=True, save_embedding_layers=False
        )

    def merge(self) -> PreTrainedModel:
        """The model with the adapter in its weights, and no trace of PEFT. The adapter is gone then."""
        merged: PreTrainedModel = self._peft_model.merge_and_unload()
        return merged


def add_lora(model: PreTrainedModel, wanted: Lora, *, seed: int, train_head: bool) -> Adapter:
    """Put LoRA layers into ``model`` in place and freeze all else.

    Args:
        seed: What the new matrices are drawn from; all ranks make the same.
        train_head: Also train what is on top of the base model whole: a classification head is new.

    Raises:
        TrainingFailed: ``targets`` match nothing, or there are none for this architecture.
    """
    config = LoraConfig(
        r=wanted.r,
        lora_alpha=wanted.alpha,  # type: ignore[arg-type]  # a plain factor
        lora_dropout=wanted.dropout,
        target_modules=list(wanted.targets) or None,
        modules_to_save=_head(model) if train_head else None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive(seed, "lora"))
        try:
            with warnings.catch_warnings():
                # PEFT asks Transformers by a name that the newest one deprecates.
                warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`")
                return Adapter(PeftModel(model, config))
        except ValueError as error:
            raise _no_targets(model, wanted, error) from error


def _head(model: PreTrainedModel) -> list[str]:
    """The modules outside of the base model that have parameters, and its pooler: encoders that were
    pretrained on masked text alone have none, so it may be new as well."""
    base = model.base_model_prefix
    names = [
        name
        for name, module in model.named_children()
        if name != base and any(True for _ in module.parameters())
    ]
    if getattr(getattr(model, base, None), "pooler", None) is not None:
        names.append("pooler")
    return names


def _no_targets(model: PreTrainedModel, wanted: Lora, error: ValueError) -> TrainingFailed:
    linear = sorted(
        {
            name.rpartition(".")[2]
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear)
        }
    )
    if wanted.targets:
        what = f"lora.targets {', '.join(wanted.targets)} match no module of the model"
    else:
        what = f"there is no customary choice of LoRA targets for {type(model).__name__}"
    if "found" not in str(error) and "target_modules" not in str(error):
        what = f"LoRA cannot be applied: {error}"
    return TrainingFailed(
        FailureClass.USER_ERROR,
        "lora_matches_nothing",
        what,
        f"Name some of its linear layers in lora.targets: {', '.join(linear[:12])}.",
    )
