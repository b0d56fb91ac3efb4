"""The files that a training leaves, each put in place whole: the model as anyone can load it, its
metrics, and what is written about it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from workers.ranks.checkpoint import place
from workers.ranks.loading import quiet
from workers.writeup import card, page
from workers.writeup.events import write_events
from workers.writeup.facts import Facts
from workers.writeup.table import metrics_csv

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
    text = json.dumps(metrics, indent=2, ensure_ascii=False) + "\n"
    written = _write(artifacts, "metrics.json", text)
    folders = [artifacts / name for name in ("adapter", "model")]
    files = sorted(file for each in folders for file in each.rglob("*") if file.is_file())
    return [*files, written]


def write_card(folder: Path, facts: Facts) -> None:
    """The model card, beside the model."""
    (folder / "README.md").write_text(card.render(facts))


def write_table(artifacts: Path, facts: Facts) -> list[Path]:
    return [_write(artifacts, "metrics.csv", metrics_csv(facts))]


def write_page(artifacts: Path, facts: Facts) -> list[Path]:
    return [_write(artifacts, "report.html", page.render(facts))]


def write_tensorboard(artifacts: Path, facts: Facts) -> list[Path]:
    aside = artifacts / f"{_ASIDE}tensorboard"
    shutil.rmtree(aside, ignore_errors=True)
    write_events(aside, facts)
    place(aside, artifacts / "tensorboard")
    return sorted((artifacts / "tensorboard").iterdir())


def _write(artifacts: Path, name: str, text: str) -> Path:
    aside = artifacts / f"{_ASIDE}{name}"
    aside.write_text(text, encoding="utf-8")
    place(aside, artifacts / name)
    return artifacts / name
