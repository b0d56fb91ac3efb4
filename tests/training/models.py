"""Tiny untrained models of other kinds than ``harness.make_bert``, over the same words."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from tests.training.harness import FILLER, TOPICS

WORDS = (*FILLER, *(word for topic in TOPICS.values() for word in topic))
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|> {{ m['content'] }} {{ eos_token }} "
    "{% endfor %}{% if add_generation_prompt %}<|assistant|> {% endif %}"
)


def save_words(
    folder: Path, special: Sequence[str], *, around: str | None = None, **options: Any
) -> int:
    """Write a word-level tokenizer; returns the size of its vocabulary.

    Args:
        special: Special tokens, in the order of their ids from 0.
        around: What the tokenizer puts around a text, as ``TemplateProcessing`` reads it.
        options: What ``PreTrainedTokenizerFast`` takes.
    """
    words = [*special, *WORDS]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=special[0]))
    tokenizer.add_special_tokens(list(special))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if around is not None:
        put = [(word, vocabulary[word]) for word in around.split() if word != "$A"]
        tokenizer.post_processor = processors.TemplateProcessing(single=around, special_tokens=put)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token=special[0], **options
    ).save_pretrained(folder)
    return len(words)


def make_gpt2(folder: Path) -> Path:
    """GPT-2 of 2 layers and 32 hidden; its tokenizer has an end of text and no padding token."""
    size = save_words(folder, ["<unk>", "<|endoftext|>"], eos_token="<|endoftext|>")
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=size, n_embd=32, n_layer=2, n_head=2, n_positions=64,
        bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def make_llama(folder: Path) -> Path:
    """Llama of 2 layers and 32 hidden, with a chat template."""
    special = ["<unk>", "<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>"]
    size = save_words(
        folder, special, bos_token="<s>", eos_token="</s>", chat_template=CHAT_TEMPLATE
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=size, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64,
        bos_token_id=1, eos_token_id=2, tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def make_masked_bert(folder: Path) -> Path:
    """BERT of 2 layers and 32 hidden, with its masked-language-model head and a mask token."""
    size = save_words(
        folder,
        ["[UNK]", "[PAD]", "[CLS]", "[SEP]", "[MASK]"],
        around="[CLS] $A [SEP]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=size, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=64, pad_token_id=1, initializer_range=0.1,
    )  # fmt: skip
    BertForMaskedLM(config).save_pretrained(folder)
    return folder
