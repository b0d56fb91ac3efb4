"""Options of generation: as Transformers understands them, for the whole job and for single rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from .conftest import EngineProcess, text_of

MIXED = [text_of(1 + (11 * i) % 23, i) for i in range(16)]
ROWS = [{"prompt": prompt} for prompt in MIXED]
SAMPLED = {"max_new_tokens": 10, "temperature": 0.9, "seed": 5}


def generated(model_path: Path, prompts: list[str], **options: Any) -> list[list[int]]:
    """Greedy, one by one, by Transformers: the new tokens of each."""
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    found = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        out = model.generate(ids, do_sample=False, pad_token_id=1, **options)
        found.append(out[0, ids.shape[1] :].tolist())
    return found


def texts(model_path: Path, tokens: list[list[int]], ends: set[int]) -> list[str]:
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    return [
        tokenizer.decode(row[:-1] if row[-1] in ends else row, skip_special_tokens=True).rstrip(
            "\ufffd"
        )
        for row in tokens
    ]


@pytest.mark.parametrize("penalty", [0.8, 1.4])
def test_the_repetition_penalty_is_that_of_transformers(engine, llama, penalty):
    options = {"max_new_tokens": 16, "repetition_penalty": penalty}
    outcome = engine.run(llama, ROWS, batch_size=5, generation=options)
    assert outcome.texts == texts(llama, generated(llama, MIXED, **options), {0, 300})
    plain = engine.run(llama, ROWS, batch_size=5, generation={"max_new_tokens": 16})
    assert plain.texts != outcome.texts


def test_no_text_ends_before_its_least_length(engine, llama):
    options = {"max_new_tokens": 20, "min_new_tokens": 12}
    unknown = {"stop_tokens": [5_000]}
    outcome = engine.run(llama, ROWS, batch_size=5, generation={**options, **unknown})
    expected = generated(llama, MIXED, **options)
    assert outcome.texts == texts(llama, expected, {0, 300})
    counts = [row["usage"]["output_tokens"] for row in outcome.results]
    assert counts == [len(row) for row in expected] and min(counts) >= 12
    free = engine.run(llama, ROWS, batch_size=5, generation={"max_new_tokens": 20})
    assert min(row["usage"]["output_tokens"] for row in free.results) < 12


def test_tokens_that_end_a_text(engine, llama):
    free = generated(llama, MIXED, max_new_tokens=16)
    stop = sorted({row[len(row) // 2] for row in free})[:8]
    outcome = engine.run(
        llama, ROWS, generation={"max_new_tokens": 16, "stop_tokens": stop}, batch_size=5
    )
    ended = 0
    for row, whole in zip(outcome.results, free, strict=True):
        cut = next((i for i, token in enumerate(whole) if token in stop), None)
        if cut is not None:
            ended += 1
            assert row["usage"]["output_tokens"] == cut + 1
            assert row["output"]["finish_reason"] == "stop"
    assert ended > 4


def test_log_probabilities_are_the_models_own(engine, llama):
    options = {"max_new_tokens": 6, "logprobs": 3, "repetition_penalty": 1.3}
    outcome = engine.run(llama, ROWS[:6], batch_size=4, generation=options)
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(llama)
    for row, prompt in zip(outcome.results, MIXED, strict=False):
        told = row["output"]["logprobs"]
        assert len(told) == row["usage"]["output_tokens"]
        ids = tokenizer(prompt).input_ids + [entry["id"] for entry in told]
        with torch.inference_mode():
            logs = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        for place, entry in enumerate(told, start=len(ids) - len(told) - 1):
            assert entry["logprob"] == pytest.approx(logs[place, entry["id"]].item(), abs=1e-4)
            assert entry["token"] == tokenizer.decode([entry["id"]])
            best = logs[place].topk(3)
            assert [top["id"] for top in entry["top"]] == best.indices.tolist()
            assert [top["logprob"] for top in entry["top"]] == pytest.approx(
                best.values.tolist(), abs=1e-4
            )


def test_several_texts_of_one_row(engine, llama):
    outcome = engine.run(llama, ROWS[:5], batch_size=4, generation={**SAMPLED, "n": 3})
    single = engine.run(llama, ROWS[:5], generation=SAMPLED)
    for row, one in zip(outcome.results, single.results, strict=True):
        choices = row["output"]["choices"]
        assert len(choices) == 3 and len({choice["text"] for choice in choices}) > 1
        assert {**one["output"], "choices": choices} == row["output"]
        assert choices[0] == one["output"]
        assert row["usage"]["output_tokens"] > one["usage"]["output_tokens"]
    again = engine.run(llama, ROWS[:5], batch_size=2, generation={**SAMPLED, "n": 3})
    assert again.results == outcome.results


def test_rows_with_options_of_their_own_share_passes_with_the_others(engine, llama):
    rows: list[dict[str, Any]] = [dict(row) for row in ROWS]
    rows[1]["generation"] = {"max_new_tokens": 3}
    rows[4]["generation"] = {"temperature": 0.0}
    rows[6]["generation"] = {"temperature": 1.2, "top_k": 5, "seed": 9}
    rows[8]["generation"] = "a column that happens to be called so"
    mixed = engine.run(llama, rows, batch_size=16, shard_rows=16, generation=SAMPLED)
    plain = engine.run(llama, ROWS, batch_size=16, shard_rows=16, generation=SAMPLED)
    greedy = engine.run(llama, ROWS, generation={"max_new_tokens": 10})
    assert mixed.results[1]["usage"]["output_tokens"] <= 3
    assert mixed.texts[4] == greedy.texts[4]
    assert mixed.texts[6] != plain.texts[6]
    others = [i for i in range(16) if i not in (1, 4, 6)]
    assert [mixed.texts[i] for i in others] == [plain.texts[i] for i in others]


def test_a_seed_of_its_own_gives_the_same_text_in_any_file(engine, llama):
    own = {"prompt": MIXED[3], "generation": {"seed": 77}}
    first = engine.run(llama, [own, *ROWS[:4]], generation=SAMPLED)
    second = engine.run(llama, [*ROWS[4:9], own], generation={**SAMPLED, "seed": 6})
    assert first.texts[0] == second.texts[-1]
    other = engine.run(
        llama, [{**own, "generation": {"seed": seed}} for seed in range(4)], generation=SAMPLED
    )
    assert len({first.texts[0], *other.texts}) > 2


@pytest.mark.parametrize(
    ("own", "word"),
    [
        ({"temprature": 1.0}, "temprature"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"top_p": 0.5, "temperature": 0.0}, "greedy"),
        ({"seed": "x"}, "seed"),
    ],
)
def test_bad_options_of_a_row_cost_that_row(engine: EngineProcess, llama: Path, own, word):
    rows = [{"id": "a", "prompt": "the cat", "generation": own}, {"prompt": "the cat"}]
    outcome = engine.run(llama, rows, generation={"max_new_tokens": 4})
    assert outcome.codes == ["invalid_generation", None]
    assert word in outcome.results[0]["error"]["message"] and outcome.results[0]["id"] == "a"
