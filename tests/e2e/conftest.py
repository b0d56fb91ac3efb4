"""A stack that knows the tiny models, and inputs for its jobs."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.inputs import ROWS, WORDS, labelled_rows, make_models, write_jsonl
from tests.e2e.stack_process import StackProcess


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    make_models(folder)
    return folder


@pytest.fixture(scope="session")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("labelled")
    return {
        "train": write_jsonl(folder / "train.jsonl", labelled_rows(480, 1)),
        "test": write_jsonl(folder / "test.jsonl", labelled_rows(120, 2)),
    }


@pytest.fixture(scope="session")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    chance = random.Random(3)
    rows = [
        {"id": f"p{i}", "prompt": " ".join(chance.choices(WORDS, k=chance.randint(2, 30)))}
        for i in range(ROWS)
    ]
    return write_jsonl(tmp_path_factory.mktemp("prompts") / "prompts.jsonl", rows)


@pytest.fixture(scope="module")
def start_stack(
    tmp_path_factory: pytest.TempPathFactory, tiny_models: Path
) -> Iterator[Callable[..., StackProcess]]:
    """Starts stacks that know the tiny models; each is stopped at the end of the module."""
    started: list[StackProcess] = []

    def start(**options: Any) -> StackProcess:
        data = tmp_path_factory.mktemp("stack") / "data"
        env = {"GPUYARD_MODEL_ROOTS": str(tiny_models), **options.pop("env", {})}
        running = StackProcess(data, env=env, **options)
        started.append(running)
        return running.start()

    yield start
    for running in started:
        running.stop()


@pytest.fixture(scope="module")
def stack(start_stack: Callable[..., StackProcess]) -> StackProcess:
    """Two CPU slots."""
    return start_stack(workers=2)
