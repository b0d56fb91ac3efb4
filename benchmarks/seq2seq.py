"""Text written for another, against ``generate``: one by one, and in batches of 16 as they arrive.

Encoder-decoders of T5-small's size (6 and 6 layers, 512 hidden) and of BART-base's (6 and 6 layers, 768
hidden), fp32, random weights scaled so that answers depend on the source; sources of 8 to 200 tokens; greedy
answers ended by one of several end tokens, as trained models end theirs at various lengths. Ours is the
engine's whole path: reading the input file, tokenising, computing, detokenising. Transformers' pipeline for it
is gone since version 5; it was ``generate`` in batches as they arrive, padded to their longest source and
computed until their longest answer. Prints a table, and with ``--json`` one object.

    python -m benchmarks.seq2seq [--model t5|bart] [--requests 96] [--threads 1] [--slots 16 32]
"""

from __future__ import annotations

import argparse
import glob
import json
import random
import sysconfig
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from benchmarks.attempts import Answers, compute, measure, timed
from workers.ranks.engine.models import ModelCache

MAX_NEW_TOKENS = 128
VOCABULARY = 8192
START = 2
END_TOKENS = [1, *range(60, VOCABULARY, 25)]
"""Enough of them for answers of all lengths from a model that means nothing."""
SIZES = {"t5": "T5-small's size", "bart": "BART-base's size"}


def make_model(kind: str, folder: Path) -> list[str]:
    """Save model and tokenizer; the texts that sources are cut from."""
    sources = sorted(glob.glob(sysconfig.get_paths()["stdlib"] + "/*.py"))[:60]  # noqa: PTH207
    texts = [Path(source).read_text(errors="ignore") for source in sources]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<eos>", "<start>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", 1)]
    )
    tokenizer: Any = PreTrainedTokenizerFast
    tokenizer(tokenizer_object=bpe, pad_token="<pad>", eos_token="<eos>").save_pretrained(folder)  # noqa: S106
    torch.manual_seed(0)
    common: dict[str, Any] = {
        "vocab_size": VOCABULARY, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": START,
        "decoder_start_token_id": START, "forced_eos_token_id": None,
    }  # fmt: skip
    if kind == "t5":
        t5 = {"num_layers": 6, "num_heads": 8, "tie_word_embeddings": False, **common}
        model: Any = T5ForConditionalGeneration(T5Config(**t5))
    else:
        bart = BartConfig(
            d_model=768, encoder_layers=6, decoder_layers=6, encoder_attention_heads=12,
            decoder_attention_heads=12, encoder_ffn_dim=3072, decoder_ffn_dim=3072, **common,
        )  # fmt: skip
        model = BartForConditionalGeneration(bart)
    scale(kind, model)
    model.generation_config.eos_token_id = END_TOKENS
    # As summarisers have it; without it a model that means nothing says one word again and again.
    model.generation_config.no_repeat_ngram_size = 2
    model.save_pretrained(folder)
    return texts


@torch.no_grad()
def scale(kind: str, model: Any) -> None:
    """Until the source decides what comes first; not so far that rounding does."""
    for name, parameter in model.named_parameters():
        kind_of = name.split(".")[-2]
        if (
            parameter.dim() < 2
            or "embed" in name
            or kind_of in ("relative_attention_bias", "lm_head")
        ):
            continue
        if kind_of in ("q", "k", "q_proj", "k_proj"):
            parameter.mul_(1.5 if kind == "t5" else 3.0)
        elif "encoder_attn" in name or "EncDecAttention" in name:
            parameter.mul_(4.0)
        elif kind_of == "shared":
            parameter.mul_(0.3 if kind == "t5" else 1.0)
        else:
            parameter.mul_(2.0 if kind == "t5" else 3.0)


def make_sources(tokenizer: Any, texts: list[str], requests: int) -> list[str]:
    ids = tokenizer("\n".join(texts), verbose=False)["input_ids"]
    rnd = random.Random(0)
    sources = []
    for _ in range(requests):
        length = rnd.randint(8, 200)
        start = rnd.randrange(len(ids) - length)
        sources.append(tokenizer.decode(ids[start : start + length]))
    return sources


def with_generate(model: Any, tokenizer: Any, sources: list[str], batch: int) -> Answers:
    """Transformers' own, in batches as they arrive."""
    answers: Answers = []
    for first in range(0, len(sources), batch):
        inputs = tokenizer(sources[first : first + batch], return_tensors="pt", padding=True)
        output = model.generate(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"],
            max_new_tokens=MAX_NEW_TOKENS, do_sample=False, num_beams=1,
        )  # fmt: skip
        for row in output[:, 1:].tolist():
            ends = [i for i, token in enumerate(row) if token in END_TOKENS]
            generated = row[: ends[0] + 1] if ends else row
            text = tokenizer.decode(generated[:-1] if ends else generated, skip_special_tokens=True)
            answers.append((len(generated), text.rstrip("\ufffd")))
    return answers


def with_engine(cache: ModelCache, folder: Path, sources: list[str], slots: int) -> Answers:
    """Ours."""
    results = compute(
        cache, folder, [{"text": source} for source in sources], task="text2text",
        batch_size=slots, generation={"max_new_tokens": MAX_NEW_TOKENS},
    )  # fmt: skip
    return [(row["usage"]["output_tokens"], row["output"]["text"]) for row in results]


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", choices=["t5", "bart"], default="t5")
    parser.add_argument("--requests", type=int, default=96)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--slots", type=int, nargs="+", default=[16, 32])
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    return parser.parse_args(argv)


def main() -> None:
    args = parse_arguments()
    result = bench(args)
    print(json.dumps(result) if args.json else table(result))


def bench(args: argparse.Namespace) -> dict[str, Any]:
    """Run all engines over the same requests, one after the other in this process."""
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as name, torch.inference_mode():
        folder = Path(name)
        texts = make_model(args.model, folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model: Any = AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float32)
        model.eval()
        sources = make_sources(tokenizer, texts, args.requests)
        cache = ModelCache()
        timed(partial(with_generate, model, tokenizer, sources[:2], 1))
        timed(partial(with_engine, cache, folder, sources[:2], 2))

        def theirs(batch: int) -> Answers:
            return with_generate(model, tokenizer, sources, batch)

        rows = [measure("generate, one by one", partial(theirs, 1), None)]
        reference = rows[0]["answers"]
        rows.append(measure("generate, batches of 16", partial(theirs, 16), reference))
        rows += [
            measure(
                f"gpuyard, {slots} slots",
                partial(with_engine, cache, folder, sources, slots),
                reference,
            )
            for slots in args.slots
        ]
    tokens = [count for count, _ in reference]
    for row in rows:
        del row["answers"]
        for of in ("tokens_per_second", "tokens_per_cpu_second"):
            row[f"times_{of}"] = round(row[of] / rows[0][of], 2)
    return {
        "model": args.model,
        "requests": args.requests,
        "threads": args.threads,
        "generated_tokens": sum(tokens),
        "shortest_and_longest": [min(tokens), max(tokens)],
        "different_answers": len({text for _, text in reference}),
        "rows": rows,
    }


def table(result: dict[str, Any]) -> str:
    low, high = result["shortest_and_longest"]
    lines = [
        f"{SIZES[result['model']]}, fp32, {result['threads']} thread(s), {result['requests']} requests, "
        f"{result['generated_tokens']} tokens in answers of {low} to {high}, {result['different_answers']} of "
        "them different",
        "",
        "| engine | tokens/s | times one by one | tokens per CPU second | identical to one by one |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in result["rows"]:
        same = (
            "reference"
            if row["identical"] is None
            else f"{row['identical']} of {result['requests']}"
        )
        lines.append(
            f"| {row['engine']} | {row['tokens_per_second']} | {row['times_tokens_per_second']} | "
            f"{row['tokens_per_cpu_second']} ({row['times_tokens_per_cpu_second']} times) | {same} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
