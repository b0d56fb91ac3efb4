"""A folder that is used for several tasks has its weights in memory once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from shared.specs import Task
from workers.ranks.engine.models import LoadedModel, ModelCache

from .conftest import EngineProcess, make_bert, make_gpt2, text_of
from .tiny import make_masked, make_t5

CPU = torch.device("cpu")
BUDGET = 1 << 30
TEXTS = [text_of(1 + (13 * i) % 31, i) for i in range(12)]


def get(cache: ModelCache, task: Task, path: Path) -> tuple[LoadedModel, bool]:
    return cache.get(task, str(path), torch.float32, CPU, budget=BUDGET)


@torch.inference_mode()
def computed(loaded: LoadedModel, text: str) -> torch.Tensor:
    ids = torch.tensor([loaded.tokenizer(text)["input_ids"]])
    found: torch.Tensor = loaded.model(input_ids=ids)[0]
    return found


@pytest.mark.parametrize(
    ("make", "first", "second"),
    [
        (make_gpt2, "text-generation", "scoring"),
        (make_gpt2, "scoring", "text-generation"),
        (make_t5, "text2text", "summarization"),
    ],
)
def test_the_very_same_model(models_dir: Path, make: Any, first: Task, second: Task) -> None:
    path = make(models_dir / f"same-{first}")
    cache = ModelCache()
    one, _ = get(cache, first, path)
    other, warm = get(cache, second, path)
    assert other.model is one.model and warm is True
    assert cache.weight_bytes == one.weight_bytes == other.weight_bytes
    alone, _ = get(ModelCache(), second, path)
    assert (other.batches, other.context, other.slot_bytes_per_position, other.cache_cost) == (
        (alone.batches, alone.context, alone.slot_bytes_per_position, alone.cache_cost)
    )
    assert get(cache, first, path) == (one, True)


ENCODERS: list[tuple[Any, Sequence[Task]]] = [
    (make_bert, ("text-classification", "embeddings")),
    (make_bert, ("embeddings", "text-classification")),
    (make_masked, ("fill-mask", "embeddings")),
    (make_masked, ("embeddings", "fill-mask")),
]


@pytest.mark.parametrize(("make", "tasks"), ENCODERS)
def test_heads_over_one_encoder(models_dir: Path, make: Any, tasks: Sequence[Task]) -> None:
    path = make(models_dir / f"kin-{'-'.join(tasks)}")
    cache = ModelCache()
    one, _ = get(cache, tasks[0], path)
    other, warm = get(cache, tasks[1], path)
    assert warm is False
    bases: list[Any] = [one.model.base_model, other.model.base_model]
    assert bases[0].encoder is bases[1].encoder and bases[0].embeddings is bases[1].embeddings
    larger = max(one.weight_bytes, other.weight_bytes)
    assert larger <= cache.weight_bytes < 1.1 * larger
    # Each computes what it computes alone, one after the other or in turns.
    for task, loaded in zip((*tasks, *tasks), (one, other, one, other), strict=True):
        alone, _ = get(ModelCache(), task, path)
        for text in TEXTS[:4]:
            torch.testing.assert_close(computed(loaded, text), computed(alone, text))


def test_what_stays_counts_in_full(models_dir: Path) -> None:
    path = make_bert(models_dir / "stays")
    cache = ModelCache()
    one, _ = get(cache, "text-classification", path)
    other, _ = get(cache, "embeddings", path)
    together = cache.weight_bytes
    large = make_gpt2(models_dir / "wants-room")
    # Room for one model alone: what is in use stays, and its kin goes.
    cache.get("text-generation", str(large), torch.float32, CPU, in_use={other.key})
    assert get(cache, "embeddings", path) == (other, True)
    gpt2, _ = get(cache, "text-generation", large)
    assert cache.weight_bytes == other.weight_bytes + gpt2.weight_bytes
    assert together < one.weight_bytes + other.weight_bytes


def test_a_folder_that_changed_shares_nothing(models_dir: Path) -> None:
    path = make_bert(models_dir / "changes")
    cache = ModelCache()
    one, _ = get(cache, "text-classification", path)
    make_bert(path, seed=5)
    other, _ = get(cache, "embeddings", path)
    bases: list[Any] = [one.model.base_model, other.model.base_model]
    assert bases[0].encoder is not bases[1].encoder
    alone, _ = get(ModelCache(), "embeddings", path)
    torch.testing.assert_close(computed(other, TEXTS[3]), computed(alone, TEXTS[3]))


def test_tasks_of_one_folder_in_one_engine(engine: EngineProcess, models_dir: Path) -> None:
    path = make_gpt2(models_dir / "in-one-engine")
    prompts = [{"prompt": text} for text in TEXTS[:6]]
    texts = [{"text": text} for text in TEXTS[:6]]
    options = {"generation": {"max_new_tokens": 8}}
    scored = engine.run(path, texts, task="scoring")
    written = engine.run(path, prompts, **options)
    again = engine.run(path, texts, task="scoring")
    assert scored.ready is not None and written.ready is not None
    assert (scored.ready.warm, written.ready.warm) == (False, True)
    assert [r["output"] for r in scored.results] == [r["output"] for r in again.results]
    assert len(set(written.texts)) > 2
    other = make_gpt2(models_dir / "in-another")
    assert engine.run(other, prompts, **options).texts == written.texts
