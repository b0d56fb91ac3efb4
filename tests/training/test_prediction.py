"""Logits are computed of the predicted places alone: the same loss and gradients, in every architecture."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AlbertConfig,
    BartConfig,
    BertConfig,
    DebertaV2Config,
    DistilBertConfig,
    ElectraConfig,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MobileBertConfig,
    ModernBertConfig,
    PreTrainedConfig,
    RobertaConfig,
    T5Config,
)

from shared.footprint import configuration
from shared.specs import TrainSpec
from workers.ranks.footprint.subject import Subject, make_batch, make_subject
from workers.ranks.train.device import Compute
from workers.ranks.train.examples import IGNORED, Batch
from workers.ranks.train.tasks.prediction import TokenPrediction

WORDS = 120
COMPUTE = Compute(torch.device("cpu"), "gloo", None)
_SIZE: dict[str, Any] = {
    "vocab_size": WORDS, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 64,
}  # fmt: skip
MASKED: dict[str, PreTrainedConfig] = {
    "bert": BertConfig(**_SIZE),
    "roberta": RobertaConfig(**_SIZE),
    "distilbert": DistilBertConfig(vocab_size=WORDS, dim=32, n_layers=2, n_heads=2, hidden_dim=64),
    "albert": AlbertConfig(**_SIZE, embedding_size=16),
    "electra": ElectraConfig(**_SIZE, embedding_size=16),
    "deberta": DebertaV2Config(**_SIZE),
    "modernbert": ModernBertConfig(**_SIZE, pad_token_id=0),
}
CAUSAL: dict[str, PreTrainedConfig] = {
    "gpt2": GPT2Config(vocab_size=WORDS, n_embd=32, n_layer=2, n_head=2),
    "llama": LlamaConfig(**_SIZE),
    "gemma2": Gemma2Config(**_SIZE, num_key_value_heads=1, head_dim=16),  # caps its logits
    "gptneox": GPTNeoXConfig(**_SIZE),
}
SEQ2SEQ: dict[str, PreTrainedConfig] = {
    "t5": T5Config(
        vocab_size=WORDS, d_model=32, num_layers=2, num_heads=2, d_kv=16, d_ff=64,
        decoder_start_token_id=0,
    ),
    "bart": BartConfig(  # adds a bias to its logits
        vocab_size=WORDS, d_model=32, encoder_layers=2, decoder_layers=2,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=64,
        decoder_ffn_dim=64,
    ),
}  # fmt: skip
MOBILE = MobileBertConfig(
    vocab_size=WORDS, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
    intermediate_size=32, embedding_size=16, intra_bottleneck_size=16,
)  # fmt: skip
"""Its last layer is two matrices side by side, and never called."""
CASES = [
    *(("fill-mask", config, {}) for config in MASKED.values()),
    *(("text-generation", config, {}) for config in CAUSAL.values()),
    *(("text2text", config, {}) for config in SEQ2SEQ.values()),
    ("text-generation", CAUSAL["llama"], {"method": "lora"}),
    ("text-generation", CAUSAL["gpt2"], {"method": "lora", "lora": {"targets": ["lm_head"]}}),
    ("text-generation", CAUSAL["llama"], {"preference": {}}),
    ("fill-mask", MASKED["bert"], {"method": "distillation", "teacher": "t"}),
    ("text-generation", CAUSAL["gpt2"], {"hyperparameters": {"gradient_checkpointing": True}}),
]


def subject_of(task: str, config: PreTrainedConfig, fields: dict[str, Any]) -> tuple[Subject, Any]:
    options = {
        "batch_size": 4,
        "precision": "fp32",
        "dropout": 0.0,
        **fields.get("hyperparameters", {}),
    }
    spec = TrainSpec.model_validate(
        {
            "kind": "train", "task": task, "model": "-", "data": {"train": "-"},
            **fields, "hyperparameters": options,
        }
    )  # fmt: skip
    known = config.to_dict()
    asked = configuration(
        spec, known, known if spec.teacher else None, labels=0, length=16, device="cpu"
    )
    torch.manual_seed(0)
    return make_subject(asked, torch.device("cpu")), asked


def batch_of(subject: Subject, asked: Any) -> Batch:
    """Of four texts, of which all but some places are predicted: of the third none is."""
    batch = make_batch(asked, subject, 4)
    labels = batch.targets["labels"]
    if asked.spec.task != "fill-mask":
        labels[:, ::3] = IGNORED
    labels[2] = IGNORED
    return batch


def loss_and_gradients(subject: Subject, batch: Batch) -> tuple[float, dict[str, torch.Tensor]]:
    subject.model.train()
    subject.model.zero_grad()
    loss = subject.objective.loss(subject.model, batch, COMPUTE)
    loss.backward()  # type: ignore[no-untyped-call]
    named = subject.model.named_parameters()
    return float(loss.detach()), {n: p.grad.clone() for n, p in named if p.grad is not None}


def of_all_places(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    for model in subject.models:
        monkeypatch.setattr(model, "get_output_embeddings", lambda: None)


@pytest.mark.parametrize(
    ("task", "config", "fields"),
    [
        pytest.param(*case, id=f"{case[1].model_type}-{'-'.join(case[2]) or case[0]}")
        for case in CASES
    ],
)
def test_loss_and_gradients_are_those_of_all_logits(
    task: str, config: PreTrainedConfig, fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    subject, asked = subject_of(task, config, fields)
    batch = batch_of(subject, asked)
    seen: list[torch.Size] = []
    last = subject.model.get_output_embeddings()
    watch = last.register_forward_hook(lambda _m, _a, out: seen.append(out.shape))
    loss, gradients = loss_and_gradients(subject, batch)
    watch.remove()
    predicted = int((batch.targets["labels"] != IGNORED).sum())
    assert seen == [(predicted, WORDS)] and 0 < predicted < batch.targets["labels"].numel()
    of_all_places(subject, monkeypatch)
    whole, wanted = loss_and_gradients(subject, batch)
    assert loss == pytest.approx(whole, rel=1e-6)
    assert gradients.keys() == wanted.keys()
    for name, gradient in gradients.items():
        assert (gradient - wanted[name]).abs().max() < 1e-6 * max(1.0, wanted[name].abs().max())


def test_a_model_that_never_calls_its_last_layer_answers_everywhere() -> None:
    subject, asked = subject_of("fill-mask", MOBILE, {})
    batch = batch_of(subject, asked)
    assert isinstance(subject.task, TokenPrediction)
    logits, truth = subject.task.predict(subject.model, batch)
    labels = batch.targets["labels"]
    whole = subject.model(**batch.inputs).logits
    assert torch.equal(logits, whole[labels != IGNORED])
    assert torch.equal(truth, labels[labels != IGNORED])


def test_nothing_to_predict_is_a_loss_of_0_and_no_other_call_is_touched() -> None:
    subject, asked = subject_of("text-generation", CAUSAL["llama"], {})
    batch = batch_of(subject, asked)
    batch.targets["labels"].fill_(IGNORED)
    loss, gradients = loss_and_gradients(subject, batch)
    assert loss == 0 and all(not g.any() for g in gradients.values())
    assert subject.model(**batch.inputs).logits.shape == (*batch.targets["labels"].shape, WORDS)
    head: nn.Module = subject.model.get_output_embeddings()
    assert not head._forward_pre_hooks
