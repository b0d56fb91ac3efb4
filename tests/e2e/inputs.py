"""Tiny models and labelled texts, made when tests start."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

LABELS = ("animal", "plant", "food")
ROWS = 400
"""Of the prompts."""
WORDS = [f"w{i}" for i in range(300)]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def make_models(folder: Path) -> None:
    """``tinybert`` (encoder without a head) and ``tinyllama``, some ten thousand parameters each."""
    torch.manual_seed(0)
    tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(
        [" ".join(WORDS)], trainers.WordLevelTrainer(special_tokens=SPECIAL, show_progress=False)
    )
    size = tokenizer.get_vocab_size()
    plain = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", eos_token="[SEP]"
    )
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=size,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            intermediate_size=64,
            max_position_embeddings=256,
            eos_token_id=3,
            pad_token_id=0,
        )
    ).save_pretrained(folder / "tinyllama")
    plain.save_pretrained(folder / "tinyllama")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    bert = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )
    BertModel(
        BertConfig(
            vocab_size=size,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=128,
        )
    ).save_pretrained(folder / "tinybert")
    bert.save_pretrained(folder / "tinybert")


def labelled_rows(count: int, seed: int) -> list[dict[str, str]]:
    """Texts whose words give the label away."""
    chance = random.Random(seed)
    rows = []
    for _ in range(count):
        label = chance.randrange(len(LABELS))
        words = [f"w{label * 100 + chance.randrange(100)}" for _ in range(chance.randint(3, 24))]
        rows.append({"text": " ".join(words), "label": LABELS[label]})
    return rows


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
