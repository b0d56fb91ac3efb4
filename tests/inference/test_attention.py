"""Decoding on the CPU reads of each row's cache what it has: text and likelihoods stay the same."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForCausalLM

from shared.specs import InferSpec
from workers.ranks.engine import attention
from workers.ranks.engine.attention import attend_to_slots, cut_into_runs, uses_runs
from workers.ranks.engine.generation import TextGeneration
from workers.ranks.engine.inputs import Request
from workers.ranks.engine.models import LoadedModel, ModelCache
from workers.ranks.engine.prompts import Prompt, PromptEncoder
from workers.ranks.engine.runners import SlotRunner

from .test_generation import MIXED, reference

MAX_NEW = 24


@given(
    lengths=st.lists(st.integers(1, 400), min_size=1, max_size=70),
    bytes_per_position=st.sampled_from([1, 64, 4096, 100_000]),
)
def test_runs_hold_every_slot_once_and_read_little_in_vain(lengths, bytes_per_position):
    runs = cut_into_runs(lengths, bytes_per_position)
    assert [run.first for run in runs] == [0, *(run.stop for run in runs[:-1])]
    assert runs[-1].stop == len(lengths)
    for run in runs:
        rows = lengths[run.first : run.stop]
        assert run.visible == max(rows)
        if run.mask is None:
            assert len(set(rows)) == 1
        else:
            seen = [[at < length for at in range(run.visible)] for length in rows]
            assert (run.mask[:, 0, 0] == 0).tolist() == seen
    vain = sum(run.visible * (run.stop - run.first) for run in runs) - sum(lengths)
    assert vain * bytes_per_position <= attention.RUN_BYTES * len(lengths)


@pytest.mark.parametrize("kept", [8, 4, 1])
@pytest.mark.parametrize("bytes_per_position", [0, 4096, 1 << 30])
def test_attention_over_runs_is_that_over_all_rows(kept, bytes_per_position):
    torch.manual_seed(0)
    lengths = [3, 90, 90, 17, 64, 1, 33]
    query = torch.randn(7, 8, 1, 16)
    key, value = torch.randn(7, kept, 90, 16), torch.randn(7, kept, 90, 16)
    seen = torch.arange(90)[None] < torch.tensor(lengths)[:, None]
    whole = scaled_dot_product_attention(
        query, key, value, attn_mask=seen[:, None, None], scale=0.3, enable_gqa=True
    )
    runs = cut_into_runs(lengths, bytes_per_position)
    assert len(runs) == {0: 1, 4096: 6, 1 << 30: 6}[bytes_per_position]
    attended, _ = attend_to_slots(
        torch.nn.Identity(), query, key, value, None, slot_runs=runs, scaling=0.3
    )
    torch.testing.assert_close(attended, whole.transpose(1, 2), rtol=1e-5, atol=1e-6)


def prompts_of(loaded: LoadedModel) -> list[Prompt]:
    spec = InferSpec(
        model="m", task="text-generation", input="x", generation={"max_new_tokens": MAX_NEW}
    )
    encoder = PromptEncoder(loaded.tokenizer, spec, loaded.context)
    return encoder.encode([Request(i, None, text=p) for i, p in enumerate(MIXED)])[0]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("run_bytes", [0, 700, 1 << 30])
def test_every_cut_is_identical_to_one_by_one(request, monkeypatch, kind, run_bytes):
    path = request.getfixturevalue(kind)
    loaded, _ = ModelCache().get("text-generation", str(path), torch.float32, torch.device("cpu"))
    assert uses_runs(loaded.model)
    monkeypatch.setattr(attention, "RUN_BYTES", run_bytes)
    computation = TextGeneration(loaded, SlotRunner(loaded.model), 1 << 30)
    computation.join("", 9)
    computation.add(prompts_of(loaded))
    texts: dict[int, str] = {}
    while computation.busy:
        for answered in computation.step().results:
            texts[answered.result["row"]] = answered.result["output"]["text"]
    assert [texts[i] for i in range(len(MIXED))] == [
        each["text"] for each in reference(path, MIXED, MAX_NEW)
    ]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_weights_lie_by_inputs_and_are_the_same(request, kind):
    path = request.getfixturevalue(kind)
    plain = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    loaded, _ = ModelCache().get("text-generation", str(path), torch.float32, torch.device("cpu"))
    head = loaded.model.get_output_embeddings()
    shared = head.weight is loaded.model.get_input_embeddings().weight
    for module in loaded.model.modules():
        if type(module) is torch.nn.Linear and not (shared and module is head):
            assert module.weight.stride(0) == 1
    ids = torch.arange(7, 47)[None]
    with torch.inference_mode():
        torch.testing.assert_close(
            loaded.model(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-4
        )


def test_slots_are_made_for_all_rows_that_wait(llama):
    loaded, _ = ModelCache().get("text-generation", str(llama), torch.float32, torch.device("cpu"))
    runner = SlotRunner(loaded.model, loaded.slot_bytes_per_position or 0)
    computation = TextGeneration(loaded, runner, 1 << 30)
    computation.join("", 16)
    computation.add(prompts_of(loaded))
    computation.step()
    assert runner.slots == 16
