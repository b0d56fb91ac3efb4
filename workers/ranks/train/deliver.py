"""The end of a training: the model as anyone can load it, and its metrics, put in place whole."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from workers.ranks.checkpoint import place
from workers.ranks.loading import quiet

_ASIDE = ".writing-"


def deliver(
    artifacts: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    metrics: Mapping[str, Any],
    finish: Callable[[Path], None],
) -> list[Path]:
    """Write ``model/`` and ``metrics.json`` below ``artifacts``; returns the files in place.

    ``model/`` is a plain ``from_pretrained`` folder: safetensors, config with label names, tokenizer.
    ``finish`` adds to it before it is put in place.

    Raises:
        OSError: it could not be written; a name that is in place is whole.
    """
    artifacts.mkdir(parents=True, exist_ok=True)
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
    files = sorted(file for file in (artifacts / "model").rglob("*") if file.is_file())
    return [*files, artifacts / "metrics.json"]
