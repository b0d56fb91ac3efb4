"""Masks are filled as plain forward passes fill them; texts are written as their tokenizer writes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer, PreTrainedModel

from shared.specs import InferSpec
from workers.ranks.engine.inputs import Request
from workers.ranks.engine.masks import Filler, MaskEncoder, MaskFilling
from workers.ranks.engine.models import ModelCache
from workers.ranks.loading import LoadError, load_masked_lm

from .tiny import finish, make_masked, make_roberta, make_tagger, sentence

TASK = {"task": "fill-mask"}


def masked(count: int, start: int, masks: int) -> str:
    text = sentence(count, start).split()
    for i in range(masks):
        text.insert((3 * i + start) % len(text), "[MASK]")
    return " ".join(text)


TEXTS = [masked(1 + (7 * i) % 19, i, 1 + i % 3) for i in range(30)]


@pytest.fixture(scope="module")
def bert_mlm(models_dir: Path) -> Path:
    return make_masked(models_dir / "masked")


@pytest.fixture(scope="module")
def roberta(models_dir: Path) -> Path:
    return make_roberta(models_dir / "roberta")


@pytest.mark.parametrize("kind", ["bert_mlm", "roberta"])
def test_fills_equal_plain_forward_passes(engine, request, kind):
    path = request.getfixturevalue(kind)
    rows = [{"text": t, "id": i} for i, t in enumerate(TEXTS)]
    outcome = engine.run(path, rows, shard_rows=7, batch_size=6, top_k_labels=4, **TASK)
    assert outcome.failed is None, outcome.failed
    model = AutoModelForMaskedLM.from_pretrained(path).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    for i, (text, result) in enumerate(zip(TEXTS, outcome.results, strict=True)):
        ids = torch.tensor([tokenizer(text.replace("[MASK]", tokenizer.mask_token)).input_ids])
        with torch.inference_mode():
            chances = model(ids).logits[0].softmax(-1)[ids[0] == tokenizer.mask_token_id]
        best = chances.topk(4)
        assert len(result["output"]["masks"]) == 1 + i % 3
        for mask, scores, tokens in zip(
            result["output"]["masks"], best.values.tolist(), best.indices.tolist(), strict=True
        ):
            assert [t["token"] for t in mask["tokens"]] == [tokenizer.decode([t]) for t in tokens]
            assert [t["score"] for t in mask["tokens"]] == pytest.approx(scores, abs=1e-5)
        assert "[MASK]" not in result["output"]["text"] and "<mask>" not in result["output"]["text"]
        # The text is the one that the tokenizer would have read with the best tokens in it.
        filled = ids[0].clone()
        filled[ids[0] == tokenizer.mask_token_id] = best.indices[:, 0]
        if kind == "roberta":
            expected = tokenizer.decode(filled, skip_special_tokens=True)
            assert result["output"]["text"].split() == expected.split()
        assert result["usage"]["input_tokens"] == ids.shape[1]
        assert result["id"] == i
    assert len({r["output"]["text"] for r in outcome.results}) > 20
    again = engine.run(path, rows[:1], **TASK)
    assert again.ready.warm is True
    assert len(again.results[0]["output"]["masks"][0]["tokens"]) == 1


def test_any_way_of_writing_a_mask_is_taken(engine, bert_mlm, roberta):
    for path in (bert_mlm, roberta):
        rows = [{"text": f"the cat {mask} on the mat"} for mask in ("[MASK]", "<mask>")]
        one, other = engine.run(path, rows, **TASK).results
        assert one["output"] == other["output"]


def test_bad_and_long_rows(engine, bert_mlm):
    long = sentence(20) + " [MASK] " + sentence(70) + " [MASK] the"
    late = sentence(90) + " [MASK]"
    rows = [
        {"text": "no mask here"}, {"text": "the [MASK]"}, {"text": ""}, {"text": ["a"]}, b"[",
        {"body": "[MASK]"}, {"text": long}, {"text": late},
    ]  # fmt: skip
    first = ["no_mask", None, "empty_text", "missing_column", "invalid_json", "missing_column"]
    refused = engine.run(bert_mlm, rows, **TASK)
    assert refused.codes == [*first, "too_long", "too_long"]
    assert "[MASK]" in refused.results[0]["error"]["message"]
    cut = engine.run(bert_mlm, rows, too_long="truncate", **TASK)
    assert cut.codes == [*first, None, "no_mask"]
    output = cut.results[6]["output"]
    assert output["masks"][0]["tokens"] and output["masks"][1] is None
    assert output["text"].endswith(" [MASK] the") and output["text"].count("[MASK]") == 1
    assert "cut away" in cut.results[7]["error"]["message"]


def test_models_that_cannot_fill_masks_are_refused(engine, models_dir, llama, bert):
    headless = engine.run(make_tagger(models_dir / "unmasked"), [{"text": "[MASK]"}], **TASK)
    assert "no trained masked-language-model head" in headless.failed.message
    decoder = engine.run(llama, [{"text": "[MASK]"}], **TASK)
    assert "cannot fill masks" in decoder.failed.message
    folder = make_masked(models_dir / "maskless")
    AutoTokenizer.from_pretrained(bert).save_pretrained(folder)
    maskless = engine.run(folder, [{"text": "[MASK]"}], **TASK)
    assert "has no mask token" in maskless.failed.message
    for outcome in (headless, decoder, maskless):
        assert outcome.failed.code == "unsupported_model" and outcome.failed.hint


def test_a_fresh_head_is_for_training_alone(bert_mlm, models_dir, tmp_path):
    bare = make_tagger(models_dir / "bare-encoder")
    with pytest.raises(LoadError, match="no trained masked") as caught:
        load_masked_lm(bare)
    assert caught.value.code == "model_unsuitable"
    fresh = [load_masked_lm(bare, allow_fresh_head=True, seed=seed) for seed in (1, 1, 2)]
    weights = [model.cls.predictions.transform.dense.weight for model in fresh]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert load_masked_lm(bert_mlm, dropout=0.3).config.hidden_dropout_prob == 0.3
    folder = Path(shutil.copytree(bert_mlm, tmp_path / "deeper"))
    config = (folder / "config.json").read_text()
    deeper = config.replace('"num_hidden_layers": 2', '"num_hidden_layers": 3')
    (folder / "config.json").write_text(deeper)
    with pytest.raises(LoadError, match=r"encoder\.layer\.2") as caught:
        load_masked_lm(folder, allow_fresh_head=True)
    assert caught.value.code == "model_damaged"


@pytest.mark.parametrize(
    ("kind", "text", "piece", "expected"),
    [
        ("bert_mlm", "the {} sat", "cat", "the cat sat"),
        ("bert_mlm", "the walk {} sat", "##ing", "the walking sat"),
        ("bert_mlm", "({})", "cat", "(cat)"),
        ("roberta", "the {} sat", "Ġcat", "the cat sat"),
        ("roberta", "the{} sat", "Ġcat", "the cat sat"),
        ("roberta", "the {} sat", "s", "thes sat"),
        ("roberta", "{} sat", "Ġcat", "cat sat"),
    ],
)
def test_tokens_are_written_into_the_text(request, kind, text, piece, expected):
    tokenizer = AutoTokenizer.from_pretrained(request.getfixturevalue(kind))
    filler = Filler(tokenizer)
    token = tokenizer.convert_tokens_to_ids(piece)
    assert filler.fill(text.split("{}"), [token]) == expected
    assert filler.fill(text.split("{}"), []) == text.format(tokenizer.mask_token)


def test_only_the_masks_get_logits_and_memory_is_shared(bert_mlm, monkeypatch):
    loaded, _ = ModelCache().get("fill-mask", str(bert_mlm), torch.float32, torch.device("cpu"))
    spec = InferSpec(model="m", input="x", **TASK)
    encoder = MaskEncoder(loaded.tokenizer, spec, loaded.context)
    prompts, _ = encoder.encode([Request(i, None, text=t) for i, t in enumerate(TEXTS)])
    sizes: list[int] = []
    plain_forward = type(loaded.model).forward

    def watched(self: PreTrainedModel, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        if input_ids.numel() > 60:
            raise torch.OutOfMemoryError("no room")
        output = plain_forward(self, input_ids=input_ids, **kwargs)
        sizes.append(output.logits.shape[0] * output.logits.shape[1])
        return output

    monkeypatch.setattr(type(loaded.model), "forward", watched)
    computation = MaskFilling(loaded, top_k=2)
    computation.join("", 8)
    computation.add(prompts)
    results = finish(computation)
    assert len(results) == len(TEXTS) and not any(r["error"] for r in results.values())
    assert sum(sizes) == sum(text.count("[MASK]") for text in TEXTS)
