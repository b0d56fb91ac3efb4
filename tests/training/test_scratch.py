"""Training from scratch: the tokenizer comes from the data, the weights from the seed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModel, AutoTokenizer

from scheduler.submission.scratch import shape_of
from shared.formats import DataFile
from shared.specs import Architecture, TrainSpec
from tests.training.cases import make_rows
from tests.training.harness import in_another_process, make_from_scratch, write_rows
from workers.ranks.train.scratch import make_model, make_tokenizer

SMALL = {"hidden": 32, "layers": 2, "heads": 2, "positions": 64, "vocabulary": 300}
TASKS = {
    "bert": "fill-mask",
    "gpt2": "text-generation",
    "llama": "text-generation",
    "t5": "text2text",
    "bart": "summarization",
}


def spec(type: str, **fields: Any) -> TrainSpec:
    data = {
        "train": "train.jsonl",
        "columns": {"target": "label"} if type in ("t5", "bart") else {},
    }
    return TrainSpec.model_validate(
        {
            "task": TASKS[type],
            "method": "pretrain",
            "architecture": {"type": type, **SMALL, **fields},
            "data": data,
        }
    )


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scratch")
    return write_rows(folder / "train.jsonl", make_rows(400, seed=3))


@pytest.mark.parametrize("type", sorted(TASKS))
def test_it_is_a_function_of_data_and_spec(tmp_path: Path, train: Path, type: str) -> None:
    digests = [
        in_another_process(make_from_scratch, str(tmp_path / name), spec(type), str(train))
        for name in ("1", "2")
    ]
    assert digests[0] == digests[1]
    model = AutoModel.from_pretrained(tmp_path / "1")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "1")
    assert len(tokenizer) <= SMALL["vocabulary"]
    assert model.config.vocab_size >= len(tokenizer)
    text = "the old town with a very small fish"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True).strip() == text
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.model_max_length == SMALL["positions"]


@pytest.mark.parametrize("type", sorted(TASKS))
def test_the_footprint_counts_its_parameters(train: Path, type: str) -> None:
    wanted = spec(type, hidden=64, layers=3)
    model = make_model(wanted, make_tokenizer(wanted, DataFile(train, "jsonl")))
    counted = shape_of(wanted.architecture or Architecture(type="bert")).parameters
    real = sum(p.numel() for p in model.parameters())
    # The vocabulary of small data is smaller than the spec allows.
    assert 0.98 * real <= counted <= 1.25 * real


def test_byte_level_tokenizers_know_every_text(train: Path) -> None:
    tokenizer = make_tokenizer(spec("gpt2"), DataFile(train, "jsonl"))
    for text in ("naïve 日本 🎈", "\t\n  x", "Ünïcödé"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
