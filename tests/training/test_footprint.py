"""Measured without weights, and by arithmetic, against the tensors of a real step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, GPT2Config, LlamaConfig, PreTrainedConfig, T5Config

from scheduler.footprint import RUNTIME, training_bytes
from scheduler.submission.models import _shape
from shared.footprint import Configuration, configuration
from shared.specs import TrainSpec
from workers.ranks.footprint.measure import measure, peak_of
from workers.ranks.footprint.subject import make_subject
from workers.ranks.footprint.tracker import LiveBytes
from workers.ranks.train.failures import TrainingFailed

CONFIGS: dict[str, PreTrainedConfig] = {
    "bert": BertConfig(
        vocab_size=2000, hidden_size=128, num_hidden_layers=4, num_attention_heads=4,
        intermediate_size=512,
    ),
    "gpt2": GPT2Config(vocab_size=2000, n_embd=128, n_layer=4, n_head=4),
    "llama": LlamaConfig(
        vocab_size=2000, hidden_size=128, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=352,
    ),
    "t5": T5Config(
        vocab_size=2000, d_model=128, num_layers=3, num_heads=4, d_kv=32, d_ff=512,
        decoder_start_token_id=0,
    ),
}  # fmt: skip
CASES: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "bert": ("bert", "text-classification", {}, {}),
    "bert-lora": ("bert", "text-classification", {"method": "lora"}, {}),
    "bert-frozen": ("bert", "token-classification", {}, {"freeze": ["*embeddings*"]}),
    "bert-recomputed": (
        "bert", "text-classification", {}, {"gradient_checkpointing": True, "batch_size": 64},
    ),
    "llama-recomputed": (
        "llama", "text-generation", {"method": "lora"},
        {"gradient_checkpointing": True, "batch_size": 8},
    ),
    "bert-taught": (
        "bert", "text-classification", {"method": "distillation", "teacher": "t"}, {},
    ),
    "bert-masked": ("bert", "fill-mask", {}, {}),
    "bert-pairs": ("bert", "embeddings", {}, {}),
    "gpt2": ("gpt2", "text-generation", {}, {}),
    "gpt2-ranks": ("gpt2", "text-generation", {"resources": {"devices": 2}}, {"batch_size": 32}),
    "gpt2-range": (
        "gpt2", "text-generation", {"resources": {"devices": {"min": 1, "max": 4}}},
        {"batch_size": 32, "micro_batch_size": 2},
    ),
    "gpt2-evaluated": (
        "gpt2", "text-generation", {"data": {"train": "-", "validation": "-"}}, {"batch_size": 2},
    ),
    "llama-adafactor": ("llama", "text-generation", {}, {"optimizer": "adafactor", "l1": 1e-4}),
    "llama-accumulated": ("llama", "text-generation", {}, {"micro_batch_size": 4}),
    "gpt2-preference": ("gpt2", "text-generation", {"preference": {}}, {"batch_size": 4}),
    "t5-sgd": ("t5", "text2text", {}, {"optimizer": "sgd"}),
}  # fmt: skip


def ask(name: str, **changes: Any) -> Configuration:
    model, task, fields, hyperparameters = CASES[name]
    spec = TrainSpec.model_validate(
        {
            "kind": "train", "task": task, "model": "-", "data": {"train": "-"},
            "hyperparameters": {
                "batch_size": 16, "precision": "fp32", **hyperparameters, **changes,
            },
            **fields,
        }
    )  # fmt: skip
    config = CONFIGS[model].to_dict()
    labels = 4 if "classification" in task else 0
    teacher = config if spec.teacher else None
    return configuration(spec, config, teacher, labels=labels, length=96, device="cpu")


def really(asked: Configuration) -> int:
    """Bytes of the tensors of a step on a real model."""
    torch.set_num_threads(1)
    return peak_of(asked, make_subject(asked, torch.device("cpu")), LiveBytes(), "fp32")


def by_arithmetic(asked: Configuration, model: str) -> int:
    tensors = tuple(
        (name, parameter.numel())
        for name, parameter in make_subject(
            asked.model_copy(update={"spec": asked.spec.model_copy(update={"method": "full"})}),
            torch.device("meta"),
        ).model.named_parameters()
    )
    stored = 4 * sum(elements for _, elements in tensors)
    shape = _shape(CONFIGS[model].to_dict(), tensors, stored)
    return training_bytes(shape, asked, shape if asked.teacher else None) - RUNTIME


@pytest.mark.parametrize("name", CASES)
def test_it_is_measured_within_5_percent_and_estimated_within_20(name: str) -> None:
    asked = ask(name)
    truth = really(asked)
    assert truth > 10e6
    assert measure(asked) == pytest.approx(truth, rel=0.05)
    assert by_arithmetic(asked, CASES[name][0]) == pytest.approx(truth, rel=0.2)


def test_measuring_compiles_nothing() -> None:
    # What compiled layers take is remembered by itself, and until then they count as any other.
    compiled, plain = ask("gpt2", compile=True), ask("gpt2")
    assert compiled.key != plain.key
    assert measure(compiled) == measure(plain)


def test_measuring_takes_no_memory_of_the_models_size() -> None:
    config = {**CONFIGS["llama"].to_dict(), "hidden_size": 4096, "intermediate_size": 11008}
    asked = ask("llama-accumulated").model_copy(update={"model": config})
    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    assert measure(asked) > 5e9
    assert memory("VmHWM") - before < 1e9


def memory(name: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{name}:")[1].split()[0]) * 1024


def test_auto_is_what_takes_more() -> None:
    both = {p: measure(ask("gpt2", precision=p)) for p in ("fp32", "bf16", "auto")}
    assert both["fp32"] != both["bf16"]
    assert both["auto"] == max(both["fp32"], both["bf16"])


def test_attention_takes_less_where_it_is_fused() -> None:
    asked = ask("bert")
    fused = measure(asked.model_copy(update={"device": "cuda"}))
    assert fused < measure(asked)
    no_dropout = ask("bert", dropout=0.0)
    assert measure(no_dropout.model_copy(update={"device": "cuda"})) == measure(no_dropout)


def test_what_matches_nothing_is_said() -> None:
    with pytest.raises(TrainingFailed, match="freeze pattern"):
        measure(ask("bert", freeze=["nothing.*"]))


def test_a_model_from_scratch_is_measured_by_its_architecture() -> None:
    spec = TrainSpec.model_validate(
        {
            "kind": "train", "task": "text-generation", "method": "pretrain",
            "architecture": {"type": "gpt2", "hidden": 64, "layers": 2, "vocabulary": 1000},
            "data": {"train": "-"}, "hyperparameters": {"batch_size": 8, "precision": "fp32"},
        }
    )  # fmt: skip
    asked = configuration(spec, None, None, labels=0, length=64, device="cpu")
    assert measure(asked) == pytest.approx(really(asked), rel=0.05)


def test_the_tracker_counts_a_storage_once_and_forgets_it() -> None:
    counted = LiveBytes()
    with counted:
        block = torch.zeros(1000)
        view = block[10:20].view(2, 5)
        assert counted.now == 4000
        del block
        assert counted.now == 4000, "the view holds it"
        del view
        assert (counted.now, counted.peak) == (0, 4000)
        torch.zeros(10)
        assert counted.peak == 4000
