"""precision int8: the arithmetic of a layer is exact, a row is its own, and answers stay near those of fp32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from shared.errors import UnsupportedModel
from shared.messages import DeviceHandle, InferAssignment
from shared.specs import InferSpec
from workers.ranks.engine.attempt import compute_dtype
from workers.ranks.engine.models import LoadedModel, ModelCache
from workers.ranks.engine.quantised import QuantisedLinear, exact_products, quantise

from .conftest import LABELS, make_bert, text_of
from .tiny import make_bart, make_t5

MIXED = [text_of(1 + (11 * i) % 29, i) for i in range(40)]
INT8: dict[str, Any] = {"precision": "int8"}
pytestmark = pytest.mark.skipif(
    not exact_products(), reason="this CPU has no exact products of int8"
)


def load(task: Any, path: Path, dtype: torch.dtype = torch.int8) -> LoadedModel:
    return ModelCache().get(task, str(path), dtype, torch.device("cpu"))[0]


@pytest.mark.parametrize("outputs", [160, 30_000])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("turned", [True, False])
def test_a_layer_is_the_product_of_its_codes(bias, outputs, turned):
    """However its weight lies in memory."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(96, outputs, bias=bias)
    if turned:
        linear.weight.data = linear.weight.data.t().contiguous().t()
    inputs = torch.randn(2, 7, 96) * torch.logspace(-3, 3, 7)[None, :, None]
    inputs[1, 3] = 0
    with torch.inference_mode():
        ours = QuantisedLinear(linear)(inputs)
        plain = linear(inputs)
    largest = inputs.abs().amax(-1, keepdim=True).clamp_min(1e-30)
    parts = inputs * (127 / largest)
    codes = parts.round().double()
    codes += ((parts - parts.round()) * 254).trunc().double() / 254
    tops = linear.weight.abs().amax(1)
    weights = (linear.weight * (127 / tops)[:, None]).round().double()
    expected = codes @ weights.T * largest.double() * tops.double() / 127**2
    if bias:
        expected += linear.bias.double()
    torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-6)
    # And near to the layer that it stands for, whatever the size of the row.
    without = linear.bias if bias else 0
    error = (ours - plain).norm(dim=-1) / (plain - without).norm(dim=-1).clamp_min(1e-30)
    assert error.max() < 0.01


@pytest.mark.parametrize("outputs", [64, 7000])
def test_a_row_is_the_same_whatever_shares_its_pass(outputs):
    """Its codes are, and the products are exact: what is left is how fp32 rounds their sum."""
    torch.manual_seed(0)
    layer = QuantisedLinear(torch.nn.Linear(64, outputs))
    rows = torch.randn(300, 64) * torch.logspace(-2, 4, 300)[:, None]
    with torch.inference_mode():
        together = layer(rows)
        for number, row in enumerate(rows):
            alone = layer(row[None])[0]
            bound = 1e-6 * alone.abs().max().item()
            torch.testing.assert_close(alone, together[number], rtol=0, atol=bound)


def test_what_is_not_finite_stays_so():
    layer = QuantisedLinear(torch.nn.Linear(64, 64))
    rows = torch.ones(3, 64)
    rows[0, 5], rows[1, 7] = float("nan"), float("inf")
    with torch.inference_mode():
        found = layer(rows)
    assert not found[:2].isfinite().any() and found[2].isfinite().all()


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_text_is_near_that_of_fp32_and_the_same_in_any_batch(engine, request, kind):
    model = request.getfixturevalue(kind)
    rows = [{"prompt": prompt} for prompt in MIXED]
    options: dict[str, Any] = {"generation": {"max_new_tokens": 12}}
    plain = engine.run(model, rows, batch_size=8, **options)
    together = engine.run(model, rows, batch_size=8, **options, **INT8)
    assert "linear layers of" in engine.log.read_text()
    assert "(int8, cpu0)" in engine.log.read_text()
    alone = engine.run(model, rows, batch_size=1, shard_rows=5, **options, **INT8)
    assert together.texts == alone.texts
    assert together.done.summary["precision"] == "int8"
    assert plain.done.summary["precision"] == "fp32"
    # Random weights decide by little: far from all, and far from none.
    firsts = [
        ours[:1] == theirs[:1] for ours, theirs in zip(together.texts, plain.texts, strict=True)
    ]
    assert sum(firsts) >= 36


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_logits_are_near_and_the_structure_is_proved_in_fp32(request, kind):
    path = request.getfixturevalue(kind)
    loaded = load("text-generation", path)
    plain = load("text-generation", path, torch.float32)
    assert loaded.batches and loaded.slot_bytes_per_position == plain.slot_bytes_per_position
    layers = [m for m in loaded.model.modules() if isinstance(m, QuantisedLinear)]
    assert len(layers) == (
        11 if kind == "llama" else 9
    )  # the keys' and values' of llama are too small
    assert loaded.weight_bytes < plain.weight_bytes / 2
    ids = torch.arange(7, 47)[None]
    with torch.inference_mode():
        theirs = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(ids).logits
        ours = loaded.model(ids).logits
    assert ((ours - theirs).norm() / theirs.norm()).item() < 0.05


def test_probabilities_of_labels_are_near(engine, models_dir):
    rows = [{"text": text} for text in MIXED]
    fields: dict[str, Any] = {"task": "text-classification", "top_k_labels": 4, "batch_size": 16}
    model = make_bert(models_dir / "bert-int8", seed=3)
    plain, ours = engine.run(model, rows, **fields), engine.run(model, rows, **fields, **INT8)

    def shares(row: dict[str, Any]) -> list[float]:
        found = {entry["label"]: entry["score"] for entry in row["output"]["labels"]}
        return [found[label] for label in LABELS]

    for theirs, own in zip(plain.results, ours.results, strict=True):
        assert shares(own) == pytest.approx(shares(theirs), abs=0.05)


@pytest.mark.parametrize("make", [make_t5, make_bart])
def test_encoder_decoders_write(engine, models_dir, make):
    model = make(models_dir / f"{make.__name__}-int8")
    fields: dict[str, Any] = {"task": "text2text", "generation": {"max_new_tokens": 8}}
    rows = [{"text": text_of(3 + i, i)} for i in range(6)]
    together = engine.run(model, rows, batch_size=6, **fields, **INT8)
    alone = engine.run(model, rows, batch_size=1, **fields, **INT8)
    assert together.codes == [None] * 6
    assert together.texts == alone.texts


def test_a_model_without_a_layer_for_it_is_refused():
    with pytest.raises(UnsupportedModel, match="has none that it could be used for"):
        quantise(torch.nn.Sequential(torch.nn.Linear(8, 64)))  # type: ignore[arg-type]


def test_devices_that_are_no_cpu_refuse_it():
    spec = InferSpec(model="m", task="text-generation", input="x", **INT8)
    assignment = InferAssignment(
        job_id="j", attempt_id="a", attempt=1, token=1, spec=spec, model_path="m", input_path="x",
        device=DeviceHandle(id="gpu0", kind="cuda", memory_bytes=1),
    )  # fmt: skip
    with pytest.raises(UnsupportedModel, match="int8 is for CPUs, and device 'gpu0' is none"):
        compute_dtype(assignment)


def test_a_cpu_without_exact_products_says_so(gpt2, monkeypatch):
    monkeypatch.setattr("workers.ranks.engine.quantised.exact_products", lambda: False)
    with pytest.raises(UnsupportedModel, match="needs a CPU with exact products"):
        load("text-generation", gpt2)
