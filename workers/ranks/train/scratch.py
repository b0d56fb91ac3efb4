"""A model from scratch: its tokenizer from the training data, its weights from the seed.

What comes out is a model folder like any other, in the attempt's own folder, and training goes on from
there. It is a function of data and spec alone, so that a resumed attempt, which makes it anew, gets the
same: the checkpoint's fingerprint of the data would tell if not.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import torch
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from shared.examples import Chat, Completion, Example, Pair, Passage, Preferred, Tagged
from shared.formats import DataFile
from shared.messages import TrainAssignment
from shared.specs import Architecture, TrainSpec
from workers.ranks.checkpoint import place
from workers.ranks.loading import quiet
from workers.ranks.train.gang import Gang
from workers.ranks.train.order import derive
from workers.ranks.train.reading import training_file
from workers.ranks.train.reports import Reporter
from workers.ranks.train.rows import read_rows

TOKENIZER_TEXTS = 1_000_000
"""Texts that the tokenizer is trained on, at most: the first of the file."""
Texts = Callable[[], Iterator[str]]
"""Begins anew with each call."""
_ASIDE = ".writing-"
_ALPHABET = 1000
"""Characters that get a token of their own, at most, as BERT's trainers have it."""
_MULTIPLE = 8
"""The vocabulary of the model is rounded up to it: matrices of such sizes are faster on a GPU."""


def begin_from_scratch(assignment: TrainAssignment, gang: Gang, reporter: Reporter) -> Path:
    """The folder of the untrained model. Rank 0 makes it, the others wait for it.

    Raises:
        DataProblem: the training data cannot be read.
    """
    spec, work = assignment.spec, Path(assignment.work_dir)
    assert spec.architecture is not None  # noqa: S101  the caller looks
    folder = work / f"new-{spec.architecture.type}"
    if gang.rank == 0:
        tokenizer = make_tokenizer(spec, training_file(assignment))
        model = make_model(spec, tokenizer)
        aside = work / f"{_ASIDE}{folder.name}"
        shutil.rmtree(aside, ignore_errors=True)
        with quiet():
            model.save_pretrained(aside)
            tokenizer.save_pretrained(aside)
        place(aside, folder)
        reporter.say(
            f"from scratch: a tokenizer of {len(tokenizer):,} tokens, trained on the data, and "
            f"{sum(p.numel() for p in model.parameters()):,} random weights"
        )
    gang.share("initial", folder.name)
    return folder


def make_tokenizer(spec: TrainSpec, train: DataFile) -> PreTrainedTokenizerFast:
    """WordPiece in lower case for BERT, byte-level BPE for the others (no text is unknown to it).

    Raises:
        DataProblem: the training data cannot be read.
    """
    assert spec.architecture is not None  # noqa: S101
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # as everywhere in ranks
    make = _word_piece if spec.architecture.type == "bert" else _byte_level
    return make(lambda: islice(_texts(spec, train), TOKENIZER_TEXTS), spec.architecture)


def make_model(spec: TrainSpec, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """The model with random weights, a function of the architecture, the seed and the vocabulary."""
    assert spec.architecture is not None  # noqa: S101
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive(spec.hyperparameters.seed, "initial"))
        match spec.architecture.type:
            case "bert":
                return _bert(spec.architecture, tokenizer, headed=spec.task == "fill-mask")
            case "gpt2":
                return _gpt2(spec.architecture, tokenizer)
            case "llama":
                return _llama(spec.architecture, tokenizer)
            case "t5":
                return _t5(spec.architecture, tokenizer)
            case "bart":
                return _bart(spec.architecture, tokenizer)


def _texts(spec: TrainSpec, train: DataFile) -> Iterator[str]:
    for placed in read_rows(train, spec):
        yield from _texts_of(placed.example)


def _texts_of(example: Example) -> tuple[str, ...]:
    match example:
        case Tagged(words=words):
            return (" ".join(words),)
        case Pair(text=text, other=other):
            return (text, other)
        case Completion(prompt=prompt, completion=completion):
            return (prompt, completion)
        case Chat(turns=turns):
            return tuple(content for _, content in turns)
        case Passage(text=text):
            return (text,)
        case Preferred(chosen=chosen, rejected=rejected):
            return (*_texts_of(chosen), *_texts_of(rejected))
        case _:
            return (example.text,)


def _word_piece(texts: Texts, wanted: Architecture) -> PreTrainedTokenizerFast:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = _lower_case_words(models.WordPiece(unk_token="[UNK]"))  # noqa: S106 - a token of text
    alphabet = _alphabet(texts(), tokenizer.normalizer)
    # The trainer numbers the pieces of one character in the order in which a hash map gives it the
    # words, another one in each process, and breaks ties by those numbers. Named beforehand, they are
    # always the same. That makes them special tokens, so a second tokenizer takes the vocabulary over.
    pieces = [*alphabet, *(f"##{character}" for character in alphabet)]
    tokenizer.train_from_iterator(
        texts(),
        trainers.WordPieceTrainer(
            vocab_size=wanted.vocabulary, special_tokens=[*special, *pieces], show_progress=False
        ),
    )
    vocabulary = tokenizer.get_vocab()
    tokenizer = _lower_case_words(models.WordPiece(vocabulary, unk_token="[UNK]"))  # noqa: S106
    tokenizer.add_special_tokens(special)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(name, vocabulary[name]) for name in ("[CLS]", "[SEP]")],
    )
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        pad_token="[PAD]",  # noqa: S106
        unk_token="[UNK]",  # noqa: S106
        cls_token="[CLS]",  # noqa: S106
        sep_token="[SEP]",  # noqa: S106
        mask_token="[MASK]",  # noqa: S106
        model_max_length=wanted.positions,
    )


def _lower_case_words(model: models.WordPiece) -> Tokenizer:
    """BERT's own way of cutting text into words."""
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def _alphabet(texts: Iterator[str], normalizer: normalizers.Normalizer) -> list[str]:
    """The characters of the texts, sorted; of very many the most frequent."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update("".join(normalizer.normalize_str(text).split()))
    frequent = sorted(counts, key=lambda character: (-counts[character], character))
    return sorted(frequent[:_ALPHABET])


def _byte_level(texts: Texts, wanted: Architecture) -> PreTrainedTokenizerFast:
    ends = wanted.type in ("t5", "bart")
    pad, end = "<pad>", "</s>" if ends else "<|endoftext|>"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts(),
        trainers.BpeTrainer(
            vocab_size=wanted.vocabulary,
            special_tokens=[pad, end],
            # Every byte is a token, so no text is unknown.
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    if ends:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"$A {end}", special_tokens=[(end, tokenizer.token_to_id(end))]
        )
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        pad_token=pad,
        eos_token=end,
        bos_token=None if ends else end,
        model_max_length=wanted.positions,
        clean_up_tokenization_spaces=False,
    )


def _size(tokenizer: PreTrainedTokenizerFast) -> int:
    return -(-len(tokenizer) // _MULTIPLE) * _MULTIPLE


def _bert(
    wanted: Architecture, tokenizer: PreTrainedTokenizerFast, *, headed: bool
) -> PreTrainedModel:
    config = BertConfig(
        vocab_size=_size(tokenizer),
        hidden_size=wanted.hidden,
        num_hidden_layers=wanted.layers,
        num_attention_heads=wanted.heads,
        intermediate_size=wanted.inner,
        max_position_embeddings=wanted.positions,
        pad_token_id=tokenizer.pad_token_id,
    )
    return BertForMaskedLM(config) if headed else BertModel(config)


def _gpt2(wanted: Architecture, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    config = GPT2Config(
        vocab_size=_size(tokenizer),
        n_embd=wanted.hidden,
        n_layer=wanted.layers,
        n_head=wanted.heads,
        n_inner=wanted.inner,
        n_positions=wanted.positions,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return GPT2LMHeadModel(config)


def _llama(wanted: Architecture, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=_size(tokenizer),
        hidden_size=wanted.hidden,
        num_hidden_layers=wanted.layers,
        num_attention_heads=wanted.heads,
        intermediate_size=wanted.inner,
        max_position_embeddings=wanted.positions,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def _t5(wanted: Architecture, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    config = T5Config(
        vocab_size=_size(tokenizer),
        d_model=wanted.hidden,
        num_layers=wanted.layers,
        num_decoder_layers=wanted.layers,
        num_heads=wanted.heads,
        d_kv=wanted.hidden // wanted.heads,
        d_ff=wanted.inner,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,  # type: ignore[call-arg]
    )
    return T5ForConditionalGeneration(config)


def _bart(wanted: Architecture, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    config = BartConfig(
        vocab_size=_size(tokenizer),
        d_model=wanted.hidden,
        encoder_layers=wanted.layers,
        decoder_layers=wanted.layers,
        encoder_attention_heads=wanted.heads,
        decoder_attention_heads=wanted.heads,
        encoder_ffn_dim=wanted.inner,
        decoder_ffn_dim=wanted.inner,
        max_position_embeddings=wanted.positions,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.eos_token_id,
        forced_eos_token_id=tokenizer.eos_token_id,
    )
    return BartForConditionalGeneration(config)
