"""Folders that hold a LoRA adapter, as PEFT writes them: what a batch job may use, and on which base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from scheduler.submission.paths import printable
from shared.errors import UnsupportedModel
from shared.specs import GENERATIVE

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
TASKS = GENERATIVE | {"scoring"}
"""That adapters are applied for: those whose models have no head of their own."""
_LIMIT = 1024 * 1024
_MERGED = "Merge it into its base (merge_and_unload) and use that model; a training of ours delivers both."


def is_adapter(folder: Path) -> bool:
    return (folder / CONFIG).is_file() and not (folder / "config.json").is_file()


def base_of(folder: Path, name: str, task: str, *, trains: bool) -> str:
    """The reference to the base of an adapter, as its config has it.

    Raises:
        UnsupportedModel: it is none that batch jobs apply, or names no base.
    """
    shown = printable(name)
    if trains or task not in TASKS:
        what = "trained further" if trains else f"used for {task}"
        raise _refused(f"'{shown}' is an adapter, which cannot be {what}", _MERGED)
    config = _read(folder, shown)
    for field, plain in _PLAIN.items():
        if config.get(field, plain[0]) not in plain:
            value = printable(str(config[field]), 40)
            raise _refused(
                f"adapter '{shown}' has {field} = {value}, which is not applied", _MERGED
            )
    if not (folder / WEIGHTS).is_file():
        hint = "Save it with safe_serialization=True: a pickle could run code."
        raise _refused(f"adapter '{shown}' has no {WEIGHTS}", hint)
    base = config.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        hint = f"Set base_model_name_or_path in its {CONFIG} to a model that a spec may name."
        raise _refused(f"adapter '{shown}' names no base model", hint)
    return base


_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "use_dora": (False, None),
    "bias": ("none",),
    "modules_to_save": (None, []),
    "alpha_pattern": ({}, None),
    "trainable_token_indices": (None,),
}
"""Options of PEFT that change what is computed, with the values that are applied; the first is the default."""


def _read(folder: Path, shown: str) -> dict[str, Any]:
    path = folder / CONFIG
    try:
        if path.stat().st_size > _LIMIT:
            raise ValueError("it is far too large")
        config = json.loads(path.read_bytes())
        if not isinstance(config, dict):
            raise ValueError("it is no JSON object")
    except (OSError, ValueError) as error:
        raise _refused(f"{CONFIG} of '{shown}' cannot be read: {error}", None) from None
    return config


def _refused(message: str, hint: str | None) -> UnsupportedModel:
    return UnsupportedModel(message, param="model", hint=hint)
