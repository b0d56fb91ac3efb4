"""Generated text is what Transformers generates one by one, whatever rows share a pass."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from shared.messages import Ready
from shared.rows import cut_into_shards
from shared.specs import InferSpec
from workers.ranks.engine.generation import TextGeneration
from workers.ranks.engine.inputs import Request
from workers.ranks.engine.models import ModelCache
from workers.ranks.engine.prompts import PromptEncoder
from workers.ranks.engine.runners import SlotRunner

from .conftest import Outcome, make_bloom, text_of


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


def test_a_model_that_cannot_use_slots_is_computed_row_by_row(engine, models_dir):
    model = make_bloom(models_dir / "bloom")
    prompts = MIXED[:5]
    outcome = engine.run(model, [{"prompt": p} for p in prompts], generation={"max_new_tokens": 8})
    assert outcome.texts == [e["text"] for e in reference(model, prompts, 8)]
    assert "rows go one by one" in engine.log.read_text()


def test_sampled_text_belongs_to_the_row(engine, llama):
    rows = [{"prompt": p} for p in MIXED[:18]]
    sampling = {"max_new_tokens": 12, "temperature": 0.9, "top_p": 0.9, "top_k": 40, "seed": 7}
    together = engine.run(llama, rows, batch_size=16, shard_rows=18, generation=sampling)
    alone = engine.run(llama, rows, batch_size=1, shard_rows=5, generation=sampling)
    assert together.texts == alone.texts
    other = engine.run(llama, rows, generation={**sampling, "seed": 8})
    assert sum(a != b for a, b in zip(together.texts, other.texts, strict=True)) > 12
    # Equal prompts of different rows are different draws.
    same = engine.run(llama, [{"prompt": "the cat"}] * 8, generation=sampling)
    assert len(set(same.texts)) > 4


def test_a_shard_computed_alone_gives_what_the_whole_job_gives(engine, llama):
    rows = [{"prompt": p} for p in MIXED[:12]]
    sampling = {"max_new_tokens": 10, "temperature": 1.0, "seed": 3}
    whole = engine.run(llama, rows, shard_rows=4, generation=sampling)
    path = engine.write(rows)
    assert isinstance(engine.assign(llama, path, generation=sampling), Ready)
    engine.order([list(cut_into_shards(path, 4))[1]])  # as a resumed attempt orders it
    resumed = engine.collect(Outcome(), 1)
    assert resumed.texts == whole.texts[4:8]
    assert [r["row"] for r in resumed.results] == [4, 5, 6, 7]


def test_stop_strings_cut_the_text_before_them(engine, llama):
    prompts = MIXED[:16]
    free = [e["text"] for e in reference(llama, prompts, 24)]
    # A stop string out of the middle of each answer, longer than any one token.
    middle = {text[len(text) // 2 : len(text) // 2 + 12] for text in free[::2] if len(text) > 40}
    stop = [*sorted(s for s in middle if "\ufffd" not in s), "é"]
    assert 4 < len(stop) <= 16
    outcome = engine.run(
        llama, [{"prompt": p} for p in prompts], generation={"max_new_tokens": 24, "stop": stop}
    )
    stopped = 0
    for row, text in zip(outcome.results, free, strict=True):
        cuts = [at for s in stop if (at := text.find(s)) >= 0]
        if cuts:
            stopped += 1
            assert row["output"] == {"text": text[: min(cuts)], "finish_reason": "stop"}
            assert row["usage"]["output_tokens"] <= 24
        else:
            assert row["output"]["text"] == text
    assert 3 < stopped < 16


def test_chat_uses_the_template_of_the_model(engine, llama):
    chats = [
        [{"role": "user", "content": text_of(5, i)}]
        if i % 2
        else [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": text_of(3, i)},
            {"role": "assistant", "content": "yes"},
            {"role": "user", "content": text_of(4, i)},
        ]
        for i in range(6)
    ]
    tokenizer = AutoTokenizer.from_pretrained(llama)
    rendered = [
        tokenizer.apply_chat_template(c, tokenize=False, add_generation_prompt=True) for c in chats
    ]
    assert rendered[1] == f"<|user|>{text_of(5, 1)}<|end|><|assistant|>"
    rows: list[dict[str, Any]] = [{"messages": c} for c in chats]
    outcome = engine.run(llama, rows, generation={"max_new_tokens": 10})
    expected = reference(llama, rendered, 10, chat=True)
    assert outcome.texts == [e["text"] for e in expected]
    renamed = [{"conversation": c} for c in chats]
    again = engine.run(
        llama, renamed, text_column="conversation", generation={"max_new_tokens": 10}
    )
    assert again.texts == outcome.texts


def test_prompts_over_the_context(engine, gpt2):
    long, short = text_of(90), text_of(3)
    rows = [{"prompt": long}, {"prompt": short}]
    tokenizer = AutoTokenizer.from_pretrained(gpt2)
    ids = tokenizer(long).input_ids
    assert len(ids) > 128
    outcome = engine.run(gpt2, rows, generation={"max_new_tokens": 28})
    assert outcome.codes == ["too_long", None]
    message = outcome.results[0]["error"]["message"]
    assert str(len(ids)) in message and "28" in message and "128" in message
    # Truncated: the last tokens of the prompt, as many as leave room.
    cut = engine.run(gpt2, rows, too_long="truncate", generation={"max_new_tokens": 28})
    kept = tokenizer.decode(ids[-100:])
    assert tokenizer(kept).input_ids == ids[-100:], "choose another text: its tail re-tokenises"
    assert cut.texts == [e["text"] for e in reference(gpt2, [kept, short], 28)]
    assert cut.results[0]["usage"]["input_tokens"] == 100
    # max_length is a limit of the user's own.
    own = engine.run(gpt2, rows, max_length=20, generation={"max_new_tokens": 4})
    assert own.codes == ["too_long", None]
    assert "max_length allows 20" in own.results[0]["error"]["message"]
    # Nothing is left for the input: every row says so, whatever too_long is.
    none = engine.run(gpt2, rows, too_long="truncate", generation={"max_new_tokens": 128})
    assert none.codes == ["too_long", "too_long"]


def test_the_whole_context_can_be_used(engine, gpt2):
    tokenizer = AutoTokenizer.from_pretrained(gpt2)
    prompt = next(p for n in range(1, 90) if len(tokenizer(p := text_of(n)).input_ids) > 90)
    room = 128 - len(tokenizer(prompt).input_ids)
    outcome = engine.run(gpt2, [{"prompt": prompt}], generation={"max_new_tokens": room})
    assert outcome.texts == [reference(gpt2, [prompt], room)[0]["text"]]


def test_bf16_on_request_and_on_devices_that_have_it(engine, llama):
    rows = [{"prompt": p} for p in MIXED[:3]]
    for fields in ({"precision": "bf16"}, {"device": {"bf16": True}}):
        engine.run(llama, rows, generation={"max_new_tokens": 4}, **fields)
        assert "(bfloat16, cpu0)" in engine.log.read_text().splitlines()[-3]
    engine.run(llama, rows, generation={"max_new_tokens": 4})
    assert "(float32, cpu0)" in engine.log.read_text()


def test_rewritten_modules_compute_the_same(gpt2):
    plain = AutoModelForCausalLM.from_pretrained(gpt2, dtype=torch.float32).eval()
    loaded, _ = ModelCache().get("text-generation", str(gpt2), torch.float32, torch.device("cpu"))
    assert not any(type(m).__name__ == "Conv1D" for m in loaded.model.modules())
    ids = torch.arange(7, 47)[None]
    with torch.inference_mode():
        torch.testing.assert_close(
            loaded.model(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-4
        )


class ScarceMemory(SlotRunner):
    """A slot runner on a device with room for so many positions."""

    positions = 0

    def decode(self, tokens: Sequence[int], positions: Sequence[int]) -> torch.Tensor:
        if len(tokens) * (max(positions) + 1) > self.positions:
            raise torch.OutOfMemoryError("no room")
        return super().decode(tokens, positions)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_out_of_memory_goes_on_with_fewer_rows(llama, temperature):
    spec = InferSpec(
        model="m", task="text-generation", input="x", generation={"max_new_tokens": 20, "temperature": temperature}
    )  # fmt: skip
    loaded, _ = ModelCache().get("text-generation", str(llama), torch.float32, torch.device("cpu"))
    prompts, _ = PromptEncoder(loaded.tokenizer, spec, loaded.context).encode(
        [Request(i, None, text=p) for i, p in enumerate([*MIXED[:11], text_of(100)])]
    )

    def run(runner: SlotRunner) -> dict[int, Any]:
        computation = TextGeneration(loaded, runner, 1 << 30)
        computation.join("", 8)
        computation.add(prompts)
        results: dict[int, Any] = {}
        while computation.busy:
            for row in (answered.result for answered in computation.step().results):
                assert row["row"] not in results
                results[row["row"]] = row
        return results

    scarce = ScarceMemory(loaded.model)
    scarce.positions = 150
    plenty, tight = run(SlotRunner(loaded.model)), run(scarce)
    assert tight.keys() == plenty.keys() == set(range(12))
    assert tight[11]["error"]["code"] == "out_of_memory"
    assert [tight[i] for i in range(11)] == [plenty[i] for i in range(11)]


def test_caches_stay_within_the_budget(llama):
    """Rows are admitted by what they will need at their end, so that none is thrown out again."""
    spec = InferSpec(
        model="m", task="text-generation", input="x", generation={"max_new_tokens": 16}
    )
    loaded, _ = ModelCache().get("text-generation", str(llama), torch.float32, torch.device("cpu"))
    # 2 layers, keys and values, 2 heads of size 8, 4 bytes.
    assert loaded.slot_bytes_per_position == 2 * 2 * 2 * 8 * 4
    prompts, _ = PromptEncoder(loaded.tokenizer, spec, loaded.context).encode(
        [Request(i, None, text=p) for i, p in enumerate(MIXED)]
    )
    widest = max(len(p.ids) for p in prompts) + 16
    seen: list[int] = []

    class Watched(SlotRunner):
        def decode(self, tokens: Sequence[int], positions: Sequence[int]) -> torch.Tensor:
            seen.append(len(tokens))
            assert len(tokens) * (max(positions) + 1) <= 4 * widest
            return super().decode(tokens, positions)

    runner = Watched(loaded.model, loaded.slot_bytes_per_position)
    budget = 4 * widest * loaded.slot_bytes_per_position
    computation = TextGeneration(loaded, runner, budget)
    computation.join("", 16)
    computation.add(prompts)
    while computation.busy:
        computation.step()
    assert max(seen) >= 4
