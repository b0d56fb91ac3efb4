"""Encoders without padding compute what the model's own layers compute."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from workers.ranks.engine.fused import (
    FusedEncoder,
    first_alone,
    fuse_encoder,
    uses_first_alone,
)
from workers.ranks.engine.models import ModelCache
from workers.ranks.engine.padding import pad_rows

from .tiny import make_masked, widen

LENGTHS = [9, 9, 9, 5, 4, 4, 1]
SIZES = {
    "vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
    "intermediate_size": 64, "max_position_embeddings": 40,
}  # fmt: skip
DISTIL = {"vocab_size": 99, "dim": 32, "n_layers": 3, "n_heads": 4, "hidden_dim": 64}


def make(family: str, **options: Any) -> Any:
    torch.manual_seed(1)
    sizes = DISTIL if family == "distilbert" else SIZES
    model = AutoModel.from_config(AutoConfig.for_model(family, **sizes, **options)).eval()
    widen(model)
    return model


def rows(lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    ids = [[3 + (11 * i + 5 * k) % 90 for i in range(length)] for k, length in enumerate(lengths)]
    return pad_rows(ids, 1, torch.device("cpu"))


@torch.inference_mode()
def hidden(model: Any, lengths: list[int], *, masked: bool) -> list[torch.Tensor]:
    ids, mask = rows(lengths)
    found = model(input_ids=ids, attention_mask=mask if masked else None).last_hidden_state
    return [row[:length] for row, length in zip(found, lengths, strict=True)]


@pytest.mark.parametrize(
    "family", ["bert", "roberta", "xlm-roberta", "camembert", "electra", "ernie", "distilbert"]
)
@pytest.mark.parametrize("act", ["gelu", "gelu_pytorch_tanh", "relu"])
def test_rows_of_any_lengths(family: str, act: str) -> None:
    name = "activation" if family == "distilbert" else "hidden_act"
    model = make(family, **{name: act})
    expected = [hidden(model, LENGTHS, masked=True), hidden(model, [7] * 3, masked=False)]
    weights = sum(p.numel() for p in model.parameters())
    assert fuse_encoder(model) == 3
    assert any(isinstance(module, FusedEncoder) for module in model.modules())
    ours = [hidden(model, LENGTHS, masked=True), hidden(model, [7] * 3, masked=False)]
    for theirs, found in zip(expected, ours, strict=True):
        for one, other in zip(theirs, found, strict=True):
            torch.testing.assert_close(other, one, atol=2e-5, rtol=1e-5)
            assert one.std() > 0.1
    # What was exchanged is not held twice.
    assert sum(p.numel() for p in model.parameters()) < weights / 2
    assert fuse_encoder(model) == 0


@pytest.mark.parametrize("family", ["bert", "roberta", "electra", "distilbert"])
def test_the_first_tokens_alone_are_what_they_are_among_all(family: str) -> None:
    model = make(family)
    assert fuse_encoder(model) == 3
    for lengths, masked in ((LENGTHS, True), ([6] * 4, False)):
        expected = hidden(model, lengths, masked=masked)
        with first_alone(model):
            ours = hidden(model, lengths, masked=masked)
        for one, other in zip(expected, ours, strict=True):
            torch.testing.assert_close(other[0], one[0], atol=1e-5, rtol=1e-5)
            assert not other[1:].any()
        again = hidden(model, lengths, masked=masked)
        assert all(torch.equal(*pair) for pair in zip(expected, again, strict=True))
    # A vector is that of the whole row: other tokens are seen in it.
    assert not uses_first_alone(model)


@pytest.mark.parametrize("family", ["bert", "roberta", "electra", "distilbert"])
def test_a_classifier_looks_at_the_first_token(family: str) -> None:
    torch.manual_seed(1)
    sizes = DISTIL if family == "distilbert" else SIZES
    config = AutoConfig.for_model(family, num_labels=3, **sizes)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    widen(model)
    assert not uses_first_alone(model)
    fuse_encoder(model)
    assert uses_first_alone(model)
    tagger = AutoModelForTokenClassification.from_config(config).eval()
    fuse_encoder(tagger)
    assert not uses_first_alone(tagger)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("mpnet", {}),  # its layers take a bias by distance
        ("bert", {"is_decoder": True}),
        ("bert", {"attn_implementation": "eager"}),
    ],
)
def test_what_is_of_another_form_stays_as_it_is(family: str, options: dict[str, Any]) -> None:
    model = make(family, **options)
    before = hidden(model, LENGTHS, masked=True)
    assert fuse_encoder(model) == 0
    after = hidden(model, LENGTHS, masked=True)
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def test_a_layer_that_computes_otherwise_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("bert")
    first = model.encoder.layer[0]
    plain = first.forward
    monkeypatch.setattr(first, "forward", lambda *args, **kwargs: plain(*args, **kwargs) * 1.01)
    assert fuse_encoder(model) == 0
    assert not any(isinstance(module, FusedEncoder) for module in model.modules())


def test_the_weights_of_a_fused_model_count(models_dir: Path) -> None:
    path = make_masked(models_dir / "counted")
    loaded, _ = ModelCache().get("fill-mask", str(path), torch.float32, torch.device("cpu"))
    whole = AutoModelForMaskedLM.from_pretrained(path)
    assert any(isinstance(module, FusedEncoder) for module in loaded.model.modules())
    assert loaded.weight_bytes == 4 * sum(p.numel() for p in whole.parameters())
    assert loaded.batches is True
