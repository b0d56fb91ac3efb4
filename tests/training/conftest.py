"""The tiny model and data that all tests of the training rank share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.training.harness import make_bert, make_rows, write_rows


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bert(tmp_path_factory.mktemp("models") / "bert")


@pytest.fixture(scope="session")
def train_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """250 rows: no multiple of any batch size used here."""
    return write_rows(tmp_path_factory.mktemp("data") / "train.jsonl", make_rows(250, seed=1))


@pytest.fixture(scope="session")
def validation_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "validation.jsonl", make_rows(70, seed=2))
