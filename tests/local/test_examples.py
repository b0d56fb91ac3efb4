"""The examples that a user starts from: specs that parse, data that is what its README says."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from gpuyard.local import demo
from shared.specs import parse_spec
from shared.sweeps import parse_sweep, plan

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
DATA = EXAMPLES / "data"


def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (DATA / name).read_text().splitlines()]


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.name)
def test_example_specs_are_valid_and_their_files_exist(path: Path) -> None:
    spec = yaml.safe_load(path.read_text())
    if "parameters" in spec:
        assert len(plan(parse_sweep(spec))) > 1
        spec = spec["spec"]
    else:
        parse_spec(spec)
    named = [spec.get("input"), *(spec.get("data", {}).get(k) for k in ("train", "validation"))]
    assert all((EXAMPLES / name).is_file() for name in named if name)
    assert any(named)


def test_the_demo_submits_valid_specs() -> None:
    for spec in (
        demo.training_spec(DATA),
        demo.untrained_spec(DATA),
        demo.classification_spec(DATA, "job_00000000000000000000000000"),
        demo.generation_spec(DATA),
    ):
        parse_spec(spec)


def test_glosses_are_balanced_and_no_text_is_in_two_files() -> None:
    parts = {n: rows(f"glosses-{n}.jsonl") for n in ("train", "validation", "heldout")}
    assert {name: len(part) for name, part in parts.items()} == {
        "train": 2000,
        "validation": 200,
        "heldout": 600,
    }
    for part in parts.values():
        counts = Counter(row["label"] for row in part)
        assert len(counts) == 10
        assert len(set(counts.values())) == 1
    texts = [row["text"] for part in parts.values() for row in part]
    assert len(set(texts)) == len(texts)
    notice = (DATA / "WORDNET-LICENSE.txt").read_text()
    assert "Copyright 2011 by Princeton University" in notice


def test_prompts_are_chats_and_plain_texts() -> None:
    kinds = Counter(tuple(row) for row in rows("prompts.jsonl"))
    assert set(kinds) == {("messages",), ("prompt",)}
    assert sum(kinds.values()) == 24
