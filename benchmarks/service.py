"""A local stack for benchmarks, with the demo's encoder and a tiny language model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from gpuyard import Client
from gpuyard.local.background import RunningStack, stack
from gpuyard.local.demo_models import provide_encoder
from gpuyard.local.stack import StackOptions


@dataclass(frozen=True)
class Service:
    client: Client
    running: RunningStack
    data: Path
    encoder: Path


@contextlib.contextmanager
def service(data: Path) -> Iterator[Service]:
    """Two CPU slots on a fresh data folder; fsync is on, as users have it."""
    encoder = provide_encoder(data)
    if encoder is None:
        raise SystemExit("the demo's models are not installed: run `make bench`")
    make_tiny_language_model(data / "models" / "tiny")
    options = StackOptions(data=data, devices="cpu:2", api_port=0, flower_port=0)
    with (
        stack(options) as running,
        Client(url=running.api_url, api_key=running.api_key) as client,
    ):
        yield Service(client, running, data, encoder)


def make_tiny_language_model(folder: Path) -> None:
    """As good as no work: what a job on it costs is what the service costs."""
    torch.manual_seed(0)
    tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))  # noqa: S106 - a token of text
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordLevelTrainer(special_tokens=["[PAD]", "[UNK]"], show_progress=False)
    tokenizer.train_from_iterator([" ".join(f"w{i}" for i in range(50))], trainer)
    kind: Any = PreTrainedTokenizerFast
    fast = kind(tokenizer_object=tokenizer, pad_token="[PAD]")  # noqa: S106
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    fast.save_pretrained(folder)
