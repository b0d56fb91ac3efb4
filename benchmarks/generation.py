"""Batched generation against ``generate``: one by one, and in batches of 16 as they arrive.

A GPT-2 type of 6 layers and 512 hidden (or a Llama type with grouped-query attention), fp32, random
weights; prompts of 8 to 200 tokens; greedy answers of 1 to 128 tokens, ended by one of several end
tokens as trained models end theirs at various lengths. Ours is the whole path of the engine: reading
the input file, tokenising, computing, detokenising. Prints a table, and with ``--json`` one object.

    python -m benchmarks.generation [--model gpt2|llama] [--requests 64] [--threads 1] [--slots 16 32]
"""

from __future__ import annotations

import argparse
import contextlib
import glob
import io
import json
import random
import sysconfig
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from benchmarks.attempts import Answers, compute, measure
from workers.ranks.engine.models import ModelCache

MAX_NEW_TOKENS = 128
VOCABULARY = 8192
END_TOKENS = [1, *range(60, VOCABULARY, 55)]
"""Enough of them for answers of all lengths from a model that means nothing."""


def make_model(kind: str, folder: Path) -> list[str]:
    """Save model and tokenizer; the text that prompts are cut from."""
    sources = sorted(glob.glob(sysconfig.get_paths()["stdlib"] + "/*.py"))[:60]  # noqa: PTH207
    texts = [Path(source).read_text(errors="ignore") for source in sources]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    special = {"pad_token": "<pad>", "eos_token": "<eos>"}
    tokenizer: Any = PreTrainedTokenizerFast
    tokenizer(tokenizer_object=bpe, padding_side="left", **special).save_pretrained(folder)
    torch.manual_seed(0)
    common: dict[str, Any] = {
        "vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": END_TOKENS, "pad_token_id": 0,
    }  # fmt: skip
    if kind == "gpt2":
        config = GPT2Config(n_layer=6, n_embd=512, n_head=8, n_positions=1024, **common)
        model: Any = GPT2LMHeadModel(config)
    else:
        llama = LlamaConfig(
            num_hidden_layers=6, hidden_size=512, intermediate_size=1408, num_attention_heads=8,
            num_key_value_heads=4, max_position_embeddings=1024, **common,
        )  # fmt: skip
        model = LlamaForCausalLM(llama)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and not name.endswith(("wte.weight", "wpe.weight")):
                parameter.mul_(3.0)  # answers that depend on the prompt
    model.save_pretrained(folder)
    return texts


def make_prompts(tokenizer: Any, texts: list[str], requests: int) -> list[str]:
    ids = tokenizer("\n".join(texts), verbose=False)["input_ids"]
    rnd = random.Random(0)
    prompts = []
    for _ in range(requests):
        length = rnd.randint(8, 200)
        start = rnd.randrange(len(ids) - length)
        prompts.append(tokenizer.decode(ids[start : start + length]))
    return prompts


def with_generate(model: Any, tokenizer: Any, prompts: list[str], batch: int) -> Answers:
    """Transformers' own, in batches as they arrive."""
    answers: Answers = []
    for first in range(0, len(prompts), batch):
        inputs = tokenizer(prompts[first : first + batch], return_tensors="pt", padding=True)
        output = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        for row in output[:, inputs["input_ids"].shape[1] :].tolist():
            ends = [i for i, token in enumerate(row) if token in END_TOKENS]
            generated = row[: ends[0] + 1] if ends else row
            text = tokenizer.decode(generated[:-1] if ends else generated, skip_special_tokens=True)
            answers.append((len(generated), text.rstrip("\ufffd")))
    return answers


def with_engine(
    cache: ModelCache, folder: Path, prompts: list[str], slots: int, precision: str = "fp32"
) -> Answers:
    """Ours: an attempt with all its shards ordered."""
    results = compute(
        cache, folder, [{"prompt": prompt} for prompt in prompts], task="text-generation",
        batch_size=slots, generation={"max_new_tokens": MAX_NEW_TOKENS}, precision=precision,
    )  # fmt: skip
    return [(row["usage"]["output_tokens"], row["output"]["text"]) for row in results]


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", choices=["gpt2", "llama"], default="gpt2")
    parser.add_argument("--requests", type=int, default=64)
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
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        model.eval()
        prompts = make_prompts(tokenizer, texts, args.requests)
        cache = ModelCache()
        with contextlib.redirect_stdout(io.StringIO()):
            with_generate(model, tokenizer, prompts[:2], 1)
            for precision in ("fp32", "int8"):
                with_engine(cache, folder, prompts[:2], 2, precision)

        def ours(slots: int, precision: str = "fp32") -> Answers:
            return with_engine(cache, folder, prompts, slots, precision)

        def theirs(batch: int) -> Answers:
            return with_generate(model, tokenizer, prompts, batch)

        rows = [measure("generate, one by one", lambda: theirs(1), None)]
        reference = rows[0]["answers"]
        rows.append(measure("generate, batches of 16", lambda: theirs(16), reference))
        rows += [
            measure(f"gpuyard, {slots} slots", partial(ours, slots), reference)
            for slots in args.slots
        ]
        rows += [
            measure(f"gpuyard int8, {slots} slots", partial(ours, slots, "int8"), reference)
            for slots in args.slots
        ]
    tokens = [count for count, _ in reference]
    for row in rows:
        del row["answers"]
        row["times_one_by_one"] = round(row["tokens_per_second"] / rows[0]["tokens_per_second"], 2)
    return {
        "model": args.model,
        "requests": args.requests,
        "threads": args.threads,
        "generated_tokens": sum(tokens),
        "shortest_and_longest": [min(tokens), max(tokens)],
        "rows": rows,
    }


def table(result: dict[str, Any]) -> str:
    low, high = result["shortest_and_longest"]
    lines = [
        f"{result['model']} type, 6 layers, 512 hidden, fp32, {result['threads']} thread(s), "
        f"{result['requests']} requests, {result['generated_tokens']} tokens in answers of {low} to {high}",
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
            f"| {row['engine']} | {row['tokens_per_second']} | {row['times_one_by_one']} | "
            f"{row['tokens_per_cpu_second']} | {same} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
