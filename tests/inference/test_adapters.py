"""LoRA adapters on a base that others share: texts are those of the merged model, and the base stays itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from shared.errors import UnsupportedModel
from shared.messages import Failed, Ready
from shared.specs import Lora
from workers.ranks.engine.adapters import Adapter
from workers.ranks.engine.models import ModelCache
from workers.ranks.engine.quantised import exact_products
from workers.ranks.train.lora import add_lora

from .conftest import text_of
from .test_generation import reference
from .test_sharing import Jobs
from .tiny import make_t5

PROMPTS = [text_of(1 + (7 * i) % 19, i) for i in range(12)]
OPTIONS: dict[str, Any] = {"generation": {"max_new_tokens": 12}}


def make_adapter(
    base: Path, folder: Path, *, seed: int = 1, auto: Any = AutoModelForCausalLM, **options: Any
) -> Path:
    """An adapter that changes what the base says; beside it (``…-merged``) both as one model."""
    torch.manual_seed(seed)
    fields: dict[str, Any] = {"r": 4, "lora_alpha": 16, **options}
    model: Any = get_peft_model(auto.from_pretrained(base), LoraConfig(**fields))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.3)
    model.save_pretrained(folder, save_embedding_layers=False)
    merged = folder.with_name(f"{folder.name}-merged")
    PeftModel.from_pretrained(
        auto.from_pretrained(base), folder
    ).merge_and_unload().save_pretrained(merged)
    AutoTokenizer.from_pretrained(base).save_pretrained(merged)
    return folder


@pytest.fixture(scope="module")
def first(llama: Path, models_dir: Path) -> Path:
    targets = ["q_proj", "v_proj", "down_proj"]
    return make_adapter(llama, models_dir / "first-adapter", target_modules=targets)


@pytest.fixture(scope="module")
def second(llama: Path, models_dir: Path) -> Path:
    """With a rank for one layer of its own, and the other kind of scale."""
    return make_adapter(
        llama, models_dir / "second-adapter", seed=2, target_modules=["o_proj", "lm_head"],
        rank_pattern={"o_proj": 2}, use_rslora=True,
    )  # fmt: skip


def rows(prompts: list[str] = PROMPTS) -> list[dict[str, Any]]:
    return [{"prompt": prompt} for prompt in prompts]


def merged(adapter: Path) -> Path:
    return adapter.with_name(f"{adapter.name}-merged")


def test_texts_are_those_of_the_merged_model_and_the_base_stays_itself(
    engine, llama, first, second
):
    before = engine.run(llama, rows(), **OPTIONS)
    plain = [each["text"] for each in reference(llama, PROMPTS, 12)]
    assert before.texts == plain
    for adapter in (first, second, first):
        adapted = engine.run(llama, rows(), adapter=adapter, batch_size=5, **OPTIONS)
        # The base is there once for all.
        assert isinstance(adapted.ready, Ready) and adapted.ready.warm
        expected = [each["text"] for each in reference(merged(adapter), PROMPTS, 12)]
        assert adapted.texts == expected
        differs = sum(a != b for a, b in zip(adapted.texts, plain, strict=True))
        assert differs > len(PROMPTS) / 2
    assert engine.run(llama, rows(), **OPTIONS).results == before.results


def test_conv1d_takes_its_adapter_as_well(engine, gpt2, models_dir):
    adapter = make_adapter(
        gpt2, models_dir / "gpt2-adapter", target_modules=["c_attn", "c_fc"], fan_in_fan_out=True
    )
    adapted = engine.run(gpt2, rows(), adapter=adapter, **OPTIONS)
    assert adapted.texts == [each["text"] for each in reference(merged(adapter), PROMPTS, 12)]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_what_a_training_delivers(engine, request, models_dir, kind):
    """The adapter and the merged model of ``method: lora``, with the targets that it takes by itself."""
    base = request.getfixturevalue(kind)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    trained = add_lora(model, Lora(r=4), seed=0, train_head=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.5)
    folder, whole = models_dir / f"{kind}-delivered", models_dir / f"{kind}-delivered-merged"
    trained.save(folder, kind)
    trained.merge().save_pretrained(whole)
    AutoTokenizer.from_pretrained(base).save_pretrained(whole)
    adapted = engine.run(base, rows(), adapter=folder, **OPTIONS)
    assert adapted.texts == [each["text"] for each in reference(whole, PROMPTS, 12)]
    assert adapted.texts != [each["text"] for each in reference(base, PROMPTS, 12)]


def test_jobs_of_the_base_and_of_adapters_run_side_by_side(engine, llama, first, second):
    alone = [
        engine.run(llama, rows(), adapter=adapter, **OPTIONS).results
        for adapter in (None, first, second)
    ]
    jobs = Jobs(engine)
    opened = [
        jobs.open(llama, rows(), batch_size=4, adapter=adapter, **OPTIONS)
        for adapter in (None, first, second)
    ]
    assert [jobs.results(attempt, 2) for attempt in opened] == alone


def test_the_weights_of_the_base_are_not_copied(llama, first, second):
    loaded, _ = ModelCache().get("text-generation", str(llama), torch.float32, torch.device("cpu"))
    ids = torch.arange(7, 47)[None]
    places = {name: p.data_ptr() for name, p in loaded.model.named_parameters()}
    with torch.inference_mode():
        plain = loaded.model(ids).logits
        for folder in (first, second):
            adapter = Adapter(folder, loaded.model)
            with adapter.applied():
                ours = loaded.model(ids).logits
            whole = AutoModelForCausalLM.from_pretrained(merged(folder), dtype=torch.float32)
            torch.testing.assert_close(ours, whole(ids).logits, rtol=1e-4, atol=1e-4)
            assert (ours - plain).abs().max() > 0.1
        assert torch.equal(loaded.model(ids).logits, plain)
    assert {name: p.data_ptr() for name, p in loaded.model.named_parameters()} == places


def test_scoring_and_encoder_decoders(engine, llama, first, models_dir):
    texts = [{"text": text} for text in PROMPTS[1:]]
    scored = engine.run(llama, texts, adapter=first, task="scoring")
    expected = engine.run(merged(first), texts, task="scoring")
    for ours, theirs in zip(scored.results, expected.results, strict=True):
        assert ours["output"]["logprob"] == pytest.approx(theirs["output"]["logprob"], abs=1e-2)
    base = make_t5(models_dir / "t5-base")
    adapter = make_adapter(
        base, models_dir / "t5-adapter", auto=AutoModelForSeq2SeqLM, target_modules=["q", "v", "wo"]
    )
    fields: dict[str, Any] = {"task": "text2text", "generation": {"max_new_tokens": 6}}
    written = engine.run(base, texts, adapter=adapter, **fields)
    assert written.texts == engine.run(merged(adapter), texts, **fields).texts
    assert written.texts != engine.run(base, texts, **fields).texts


@pytest.mark.skipif(not exact_products(), reason="no exact products of int8")
def test_on_a_base_in_int8(engine, llama, first):
    """The adapter stays in fp32."""
    adapted = engine.run(llama, rows(), adapter=first, precision="int8", **OPTIONS)
    whole = engine.run(merged(first), rows(), **OPTIONS)
    begins = [a[:1] == b[:1] for a, b in zip(adapted.texts, whole.texts, strict=True)]
    assert sum(begins) >= len(PROMPTS) - 2


def test_an_adapter_that_changed_is_read_again(engine, llama, models_dir):
    folder = models_dir / "changing-adapter"
    make_adapter(llama, folder, seed=3, target_modules=["q_proj", "o_proj"])
    before = engine.run(llama, rows(), adapter=folder, **OPTIONS).texts
    make_adapter(llama, folder, seed=4, target_modules=["q_proj", "o_proj"])
    after = engine.run(llama, rows(), adapter=folder, **OPTIONS).texts
    assert before != after == [each["text"] for each in reference(merged(folder), PROMPTS, 12)]


def test_what_cannot_be_applied_is_refused(engine, llama, gpt2, first, models_dir):
    failed = engine.run(gpt2, rows(), adapter=first).failed
    assert isinstance(failed, Failed) and failed.code == "unsupported_adapter"
    assert "is of another model: this one has no layer 'model.layers.0" in failed.message
    gone = engine.run(llama, rows(), adapter=models_dir / "no-adapter").failed
    assert isinstance(gone, Failed) and "'no-adapter' is gone" in gone.message
    loaded, _ = ModelCache().get("text-generation", str(llama), torch.float32, torch.device("cpu"))
    damaged = models_dir / "damaged-adapter"
    damaged.mkdir()
    (damaged / "adapter_config.json").write_text(json.dumps({"lora_alpha": 1}))
    (damaged / "adapter_model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(UnsupportedModel, match="cannot be read"):
        Adapter(damaged, loaded.model)
    embedded = make_adapter(
        llama, models_dir / "embedding-adapter", target_modules=["embed_tokens"]
    )
    with pytest.raises(UnsupportedModel, match="which is not applied"):
        Adapter(embedded, loaded.model)
    # The engine is as sound as before.
    assert engine.run(llama, rows()[:1], **OPTIONS).codes == [None]
