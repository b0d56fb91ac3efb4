"""What decides how much memory a rank of a training takes: the question that is answered by arithmetic at
submission, by measuring in a worker, and by the peaks of earlier trainings.

Two trainings of equal configurations have one key, and share what is known about their memory.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from shared.specs import TrainSpec

RUNTIME = 512 * 1024**2
"""What a process with torch takes before the first tensor: libraries, CUDA context, allocator."""
_DECIDE = (
    "optimizer",
    "freeze",
    "packing",
    "mask_probability",
    "gradient_checkpointing",
    "compile",
)
_AS_LARGE = {"tf32": "fp32", "fp16": "bf16"}
"""Precisions that take as much memory as another."""
_DECIDE_BY_BEING_THERE = ("label_smoothing", "momentum", "l1", "dropout")
_NAMES = {
    *("_name_or_path", "transformers_version", "architectures", "id2label", "label2id"),
    *("torch_dtype", "dtype", "finetuning_task", "task_specific_params", "auto_map"),
    *("bos_token_id", "eos_token_id", "use_cache", "problem_type", "num_labels"),
}
"""Entries of a ``config.json`` that say nothing about memory."""


class Configuration(BaseModel):
    """One rank of a training, as far as its memory goes. Made by ``configuration``."""

    model_config = ConfigDict(frozen=True)

    spec: TrainSpec
    """With every field at its default that changes no memory. ``batch_size`` is ``rows``."""
    model: dict[str, Any] | None
    """Its ``config.json``; None for a model from scratch (``spec.architecture``)."""
    teacher: dict[str, Any] | None = None
    labels: int
    """Classes or tags; 0 where there are none."""
    rows: int
    """Of a micro-batch."""
    length: int
    """Tokens of its longest row; of a target as well."""
    gradients_stay: bool
    """From one micro-batch to the next, or in DDP's buckets, and so beside all activations."""
    waiting_sums: int
    """Further copies of the gradients (``shared.specs.world_sizes``)."""
    evaluates: bool
    device: Literal["cpu", "cuda"]

    @property
    def key(self) -> str:
        """Equal for configurations that take the same memory."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def configuration(
    spec: TrainSpec,
    model: Mapping[str, Any] | None,
    teacher: Mapping[str, Any] | None,
    *,
    labels: int,
    length: int,
    device: Literal["cpu", "cuda"],
) -> Configuration:
    """The configuration of a spec on models of these ``config.json``."""
    options = spec.hyperparameters
    rows = spec.world_sizes.micro_batch
    kept: dict[str, Any] = {name: getattr(options, name) for name in _DECIDE}
    kept["precision"] = _AS_LARGE.get(options.precision, options.precision)
    for name in _DECIDE_BY_BEING_THERE:
        value = getattr(options, name)
        kept[name] = 0.5 if value else value
    if options.optimizer != "sgd":
        del kept["momentum"]
    lora = spec.adaptation.model_dump(include={"r", "targets"}) if spec.method == "lora" else None
    if lora is not None:
        lora["dropout"] = 0.5 if spec.adaptation.dropout else 0.0
    bare = TrainSpec.model_validate(
        {
            "kind": "train",
            "task": spec.task,
            "problem": spec.problem,
            "method": spec.method,
            "lora": lora,
            "model": None if spec.architecture else "-",
            "architecture": spec.architecture,
            "teacher": "-" if spec.teacher else None,
            "preference": {} if spec.preference else None,
            "data": {"train": "-"},
            "hyperparameters": {**kept, "batch_size": rows},
        }
    )
    return Configuration(
        spec=bare,
        model=None if model is None else _telling(model),
        teacher=None if teacher is None else _telling(teacher),
        labels=labels,
        rows=rows,
        length=length,
        gradients_stay=spec.resources.most > 1 or rows < options.batch_size,
        waiting_sums=spec.world_sizes.waiting_sums,
        evaluates=spec.data.validation is not None or spec.data.validation_split is not None,
        device=device,
    )


def _telling(config: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name not in _NAMES}
