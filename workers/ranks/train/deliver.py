"""The end of a training: the model as anyone can load it, and its metrics, put in place whole."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from workers.ranks.checkpoint import place
from workers.ranks.loading import quiet

if TYPE_CHECKING:
    from workers.ranks.train.lora import Adapter

_ASIDE = ".writing-"


def deliver(
    artifacts: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    metrics: Mapping[str, Any],
    finish: Callable[[Path], None],
    adapter: Adapter | None = None,
    base: str = "",
) -> list[Path]:
    """Write ``model/`` and ``metrics.json`` below ``artifacts``; returns the files in place.

    ``model/`` is a plain ``from_pretrained`` folder: safetensors, config with label names, tokenizer.
    ``finish`` adds to it before it is put in place. An ``adapter`` is written to ``adapter/`` as PEFT
    has it, and merged into the model; ``base`` is what the spec calls the model below it.

    Raises:
        OSError: it could not be written; a name that is in place is whole.
    """
    artifacts.mkdir(parents=True, exist_ok=True)
    if adapter is not None:
        aside = artifacts / f"{_ASIDE}adapter"
        shutil.rmtree(aside, ignore_errors=True)
        adapter.save(aside, base)
        place(aside, artifacts / "adapter")
        model = adapter.merge()
    aside = artifacts / f"{_ASIDE}model"
    shutil.rmtree(aside, ignore_errors=True)
    with quiet():
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
    finish(aside)
    place(aside, artifacts / "model")
    aside = artifacts / f"{_ASIDE}metrics.json"
    aside.write_text(json.dumps(metrics, indent=2, ensure_ascii=False) + "\n")
    place(aside, artifacts / "metrics.json")
    folders = [artifacts / name for name in ("adapter", "model")]
    files = sorted(file for each in folders for file in each.rglob("*") if file.is_file())
    return [*files, artifacts / "metrics.json"]
