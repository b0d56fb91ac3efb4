"""Generated text is what Transformers generates one by one, whatever rows share a pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from .conftest import text_of


def reference(
    model_path: Path, prompts: list[str], max_new: int, *, chat: bool = False
) -> list[dict[str, Any]]:
    """Greedy, one by one, by Transformers."""
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    answers = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=not chat).input_ids
        out = model.generate(ids, max_new_tokens=max_new, do_sample=False, pad_token_id=1)
        new = out[0, ids.shape[1] :].tolist()
        ended = new[-1] in ends
        text = tokenizer.decode(new[:-1] if ended else new, skip_special_tokens=True)
        answers.append(
            {
                "text": text.rstrip("\ufffd"),
                "finish_reason": "stop" if ended else "length",
                "ids": new,
                "input": ids.shape[1],
            }
        )
    return answers


MIXED = [text_of(1 + (11 * i) % 29, i) for i in range(40)]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_greedy_is_identical_to_one_by_one(engine, request, kind):
    model = request.getfixturevalue(kind)
    outcome = engine.run(
        model, [{"prompt": p, "id": f"r{i}"} for i, p in enumerate(MIXED)], shard_rows=16,
        batch_size=6, generation={"max_new_tokens": 24},
    )  # fmt: skip
    expected = reference(model, MIXED, 24)
    assert outcome.texts == [e["text"] for e in expected]
    assert [r["output"]["finish_reason"] for r in outcome.results] == [
        e["finish_reason"] for e in expected
    ]
    assert [r["usage"]["output_tokens"] for r in outcome.results] == [
        len(e["ids"]) for e in expected
    ]
    assert [r["usage"]["input_tokens"] for r in outcome.results] == [e["input"] for e in expected]
    assert [r["id"] for r in outcome.results] == [f"r{i}" for i in range(40)]
    assert [r["row"] for r in outcome.results] == list(range(40))
    # The load is no trivial one: answers differ, and some end early.
    assert len(set(outcome.texts)) > 30
    summary = outcome.done.summary
    assert summary["rows"] == 40 and summary["stopped"] is False
    assert summary["output_tokens"] == sum(len(e["ids"]) for e in expected)
    assert summary["peak_memory_bytes"] > 1 << 20
