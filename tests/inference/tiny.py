"""More tiny models: encoders under every head, and encoder-decoders."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    BertForTokenClassification,
    BertTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaTokenizer,
    T5Config,
    T5ForConditionalGeneration,
)

from workers.ranks.engine.computation import Computation

_PIECES = """
    [PAD] [UNK] [CLS] [SEP] [MASK] the cat sat on a mat while many birds sang angela merkel visited
    paris berlin and new york u s . , ! in old town ##s ##ing ##ed ##er b c d e f g walk bank river
"""
VOCABULARY = tuple(_PIECES.split())
TAGS = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")


def words(count: int, start: int = 0) -> list[str]:
    """So many words of the vocabulary, others for every start."""
    known = [word for word in VOCABULARY if word.isalpha() and len(word) > 1]
    return [known[(start * 7 + 5 * i) % len(known)] for i in range(count)]


def sentence(count: int, start: int = 0) -> str:
    return " ".join(words(count, start))


def wordpiece(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)


def byte_level(folder: Path, pieces: Iterable[str]) -> None:
    """A RoBERTa tokenizer that knows some words with their space before them, else bytes."""
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: i for i, piece in enumerate([*special, *alphabet])}
    merges: list[tuple[str, str]] = []
    for piece in pieces:
        whole = "Ġ"
        for letter in piece:
            if whole + letter not in vocabulary:
                vocabulary[whole + letter] = len(vocabulary)
                merges.append((whole, letter))
            whole += letter
    mask = AddedToken("<mask>", lstrip=True)
    RobertaTokenizer(vocab=vocabulary, merges=merges, mask_token=mask).save_pretrained(folder)


def unigram(folder: Path) -> None:
    """As T5's: SentencePiece pieces, and an end token behind every text."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -6.0)]
    pieces += [(f"▁{word}", -3.0) for word in VOCABULARY if word.isalpha() and len(word) > 1]
    pieces += [(letter, -8.0) for letter in "abcdefghijklmnopqrstuvwxyz.,!"]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    ).save_pretrained(folder)


def size_of(folder: Path) -> int:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    return max(tokenizer.get_vocab().values()) + 1


def bert_config(labels: Sequence[str] = ()) -> BertConfig:
    names = {"id2label": dict(enumerate(labels))} if labels else {}
    return BertConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
        **names,
    )


def widen(model: PreTrainedModel, factor: float = 6.0) -> None:
    """Larger weights than a fresh model has: its answers then depend on the input."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "embed" not in name and "shared" not in name:
                parameter.mul_(factor)


def make_tagger(folder: Path, labels: Sequence[str] = TAGS, *, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    wordpiece(folder)
    model = BertForTokenClassification(bert_config(labels)).eval()
    widen(model)
    with torch.no_grad():  # every label comes up
        logits = model(
            torch.tensor([[(5 * i + k) % len(VOCABULARY) for i in range(40)] for k in range(9)])
        ).logits
        model.classifier.bias -= logits.mean(dim=(0, 1))
    model.save_pretrained(folder)
    return folder


def make_masked(folder: Path, *, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    wordpiece(folder)
    model = BertForMaskedLM(bert_config())
    widen(model)
    model.save_pretrained(folder)
    return folder


def make_roberta(folder: Path, *, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    byte_level(folder, [word for word in VOCABULARY if word.isalpha()])
    config = RobertaConfig(
        vocab_size=size_of(folder), hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64, max_position_embeddings=66, pad_token_id=1,
    )  # fmt: skip
    model = RobertaForMaskedLM(config)
    widen(model)
    model.save_pretrained(folder)
    return folder


def make_t5(folder: Path, *, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    unigram(folder)
    config = T5Config(
        vocab_size=size_of(folder) + 3, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    model = T5ForConditionalGeneration(config)
    widen(model, 3.0)
    with torch.no_grad():
        model.shared.weight *= 0.1  # what was written last does not decide alone
    model.generation_config.eos_token_id = [1, 6, 21, 25]
    model.save_pretrained(folder)
    return folder


def make_bart(folder: Path, *, seed: int = 0, **generation: object) -> Path:
    torch.manual_seed(seed)
    byte_level(folder, [word for word in VOCABULARY if word.isalpha()])
    config = BartConfig(
        vocab_size=size_of(folder), d_model=32, encoder_layers=2, decoder_layers=2,
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=64,
        decoder_ffn_dim=64, max_position_embeddings=64, init_std=0.1,
    )  # fmt: skip
    model = BartForConditionalGeneration(config)
    _listen(model)
    for name, value in generation.items():
        setattr(model.generation_config, name, value)
    model.save_pretrained(folder)
    return folder


def _listen(model: PreTrainedModel, factor: float = 3.0) -> None:
    """The source decides."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "encoder_attn" in name and parameter.dim() > 1:
                parameter.mul_(factor)


def make_seq2seq(folder: Path, family: str, *, seed: int = 0) -> Path:
    """Of a family that is made as T5 or as BART is."""
    torch.manual_seed(seed)
    byte_level(folder, [word for word in VOCABULARY if word.isalpha()])
    like_t5 = family in ("mt5", "umt5")
    if like_t5:
        sizes: dict[str, float] = {
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 64,
            "num_layers": 2,
            "num_heads": 4,
        }
    else:
        sizes = {
            "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
            "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
            "max_position_embeddings": 64, "init_std": 0.1,
        }  # fmt: skip
    if family == "led":
        del sizes["max_position_embeddings"]
        sizes |= {"max_encoder_position_embeddings": 64, "max_decoder_position_embeddings": 64}
        sizes["attention_window"] = 8
    config = AutoConfig.for_model(
        family, vocab_size=size_of(folder), pad_token_id=1, decoder_start_token_id=0, **sizes
    )
    model = AutoModelForSeq2SeqLM.from_config(config)
    if like_t5:
        widen(model)
    else:
        _listen(model, 8.0)
    model.generation_config.eos_token_id = [2, *range(40, size_of(folder), 9)]
    model.generation_config.forced_eos_token_id = None
    model.generation_config.no_repeat_ngram_size = 1
    model.save_pretrained(folder)
    return folder


def finish(computation: Computation) -> dict[int, dict[str, object]]:
    """Step until nothing is left; results by row, each exactly once."""
    results: dict[int, dict[str, object]] = {}
    while computation.busy:
        for row in (answered.result for answered in computation.step().results):
            assert row["row"] not in results
            results[row["row"]] = row
    return results
