"""Texts read as a whole, against Transformers' ``pipeline`` at batch sizes 1, 8, 16 and 32.

A BERT of MiniLM's size (6 layers, 384 hidden, 12 heads), fp32, random weights scaled so that what is told
depends on the text; texts of 8 to 200 tokens, as often of 8 to 40 as of 40 to 200, in any order. The tasks are
text-classification, token-classification (entities by the first token of a word) and embeddings (the
``feature-extraction`` pipeline and a mean over its vectors). Ours is the engine's whole path, from reading the
input file to the rows of the results. What is told has to be the same: labels, tags and spans equal,
scores to 1e-6, vectors to 1e-5. Prints a table, and with ``--json`` one object.

    python -m benchmarks.encoders [--texts 512] [--threads 1] [--task embeddings]
"""

from __future__ import annotations

import argparse
import glob
import json
import random
import sysconfig
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    PreTrainedTokenizerFast,
    pipeline,
)

from benchmarks.attempts import compute, timed
from workers.ranks.engine.models import ModelCache

TASKS = ("text-classification", "token-classification", "embeddings")
BATCH_SIZES = (1, 8, 16, 32)
SHORTEST, LONGEST = 8, 200
VOCABULARY = 30_522
TOPICS = tuple(f"topic {i}" for i in range(10))
TAGS = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC", "B-ORG", "I-ORG")
TOLERANCE = {"embeddings": 1e-5}
"""Else 1e-6. Vectors that are not normalised have numbers of any size."""


@dataclass(frozen=True, slots=True)
class Told:
    """What is told of a text: what has to be equal, and what has to be close."""

    names: tuple[Any, ...]
    numbers: Any


def make_tokenizer(folder: Path) -> list[str]:
    """Save it; the texts that others are cut from."""
    sources = sorted(glob.glob(sysconfig.get_paths()["stdlib"] + "/*.py"))[:120]  # noqa: PTH207
    texts = [Path(source).read_text(errors="ignore") for source in sources]
    wordpiece = Tokenizer(models.WordPiece(unk_token="[UNK]"))  # noqa: S106
    wordpiece.normalizer = normalizers.BertNormalizer()
    wordpiece.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    trainer = trainers.WordPieceTrainer(
        vocab_size=VOCABULARY, special_tokens=special, show_progress=False
    )
    wordpiece.train_from_iterator(texts, trainer)
    wordpiece.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer: Any = PreTrainedTokenizerFast
    tokenizer(
        tokenizer_object=wordpiece, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]",  # noqa: S106
        sep_token="[SEP]", model_max_length=512,  # noqa: S106
    ).save_pretrained(folder)  # fmt: skip
    return texts


def make_model(task: str, folder: Path) -> None:
    """Save one into a folder with a tokenizer."""
    torch.manual_seed(0)
    labels = {"text-classification": TOPICS, "token-classification": TAGS}.get(task, ())
    names: dict[str, Any] = {}
    if labels:
        names = {
            "id2label": dict(enumerate(labels)),
            "label2id": {name: i for i, name in enumerate(labels)},
        }
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=384, num_hidden_layers=6, num_attention_heads=12,
        intermediate_size=1536, **names,
    )  # fmt: skip
    kinds: dict[str, Any] = {
        "text-classification": BertForSequenceClassification,
        "token-classification": BertForTokenClassification,
    }
    model = kinds.get(task, BertModel)(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "embed" not in name:
                parameter.mul_(2.0)
    model.save_pretrained(folder)


def make_texts(tokenizer: Any, texts: list[str], count: int) -> list[str]:
    ids = tokenizer("\n".join(texts), add_special_tokens=False, verbose=False)["input_ids"]
    rnd = random.Random(0)
    made: list[str] = []
    while len(made) < count:
        length = round(SHORTEST * (LONGEST / SHORTEST) ** rnd.random())
        start = rnd.randrange(len(ids) - length)
        made.append(tokenizer.decode(ids[start : start + length]))
    return made


def with_pipeline(
    task: str, folder: Path, texts: list[str], lengths: list[int], batch: int
) -> Callable[[], list[Told]]:
    """Transformers' own, loaded; called, it reads the texts. Its vectors are also those of padding, so the
    tokens of each text are told."""
    options: dict[str, Any] = {"model": str(folder), "batch_size": batch}
    make: Any = pipeline
    if task == "text-classification":
        classify = make(task, top_k=None, **options)
        return lambda: [
            Told(tuple(e["label"] for e in row), [e["score"] for e in row])
            for row in classify(texts)
        ]
    if task == "token-classification":
        tag = make(task, aggregation_strategy="first", **options)
        return lambda: [
            Told(
                tuple((e["entity_group"], e["start"], e["end"]) for e in row),
                [float(e["score"]) for e in row],
            )
            for row in tag(texts)
        ]
    embed = make("feature-extraction", return_tensors=True, **options)
    return lambda: [
        Told((), row[0, :length].mean(dim=0).tolist())
        for row, length in zip(embed(texts), lengths, strict=True)
    ]


def with_engine(cache: ModelCache, task: str, folder: Path, texts: list[str]) -> list[Told]:
    """Ours."""
    fields: dict[str, Any] = {"task": task, "batch_size": 128}
    if task == "text-classification":
        fields["top_k_labels"] = len(TOPICS)
    if task == "embeddings":
        fields["embedding"] = {"pooling": "mean", "normalize": False}
    outputs = [
        row["output"] for row in compute(cache, folder, [{"text": t} for t in texts], **fields)
    ]
    if task == "text-classification":
        return [
            Told(tuple(e["label"] for e in o["labels"]), [e["score"] for e in o["labels"]])
            for o in outputs
        ]
    if task == "token-classification":
        return [
            Told(
                tuple((e["label"], e["start"], e["end"]) for e in o["entities"]),
                [e["score"] for e in o["entities"]],
            )
            for o in outputs
        ]
    return [Told((), o["embedding"]) for o in outputs]


def same(task: str, ours: Sequence[Told], theirs: Sequence[Told]) -> int:
    """Texts of which the same is told."""
    most = TOLERANCE.get(task, 1e-6)
    return sum(
        one.names == other.names
        and float(np.abs(np.subtract(one.numbers, other.numbers)).max(initial=0.0)) <= most
        for one, other in zip(ours, theirs, strict=True)
    )


def bench_task(task: str, texts: list[str], lengths: list[int], folder: Path) -> dict[str, Any]:
    make_model(task, folder)
    cache = ModelCache()
    timed(partial(with_engine, cache, task, folder, texts[:8]))
    rows: list[dict[str, Any]] = []
    reference: list[Told] = []
    for batch in (*BATCH_SIZES, None):
        run: Callable[[], list[Told]] = partial(with_engine, cache, task, folder, texts)
        if batch is not None:
            run, _, _ = timed(partial(with_pipeline, task, folder, texts, lengths, batch))
        told, wall, cpu = timed(run)
        reference = reference or told
        rows.append(
            {
                "engine": "gpuyard" if batch is None else f"pipeline, batch size {batch}",
                "texts_per_second": round(len(texts) / wall, 1),
                "texts_per_cpu_second": round(len(texts) / cpu, 1),
                "tokens_per_second": round(sum(lengths) / wall),
                "same": same(task, told, reference),
            }
        )
    for of in ("texts_per_second", "texts_per_cpu_second"):
        best = max(row[of] for row in rows[:-1])
        for row in rows:
            row[f"times_{of}"] = round(row[of] / best, 2)
    different = len({str(told) for told in reference})
    return {"task": task, "different": different, "rows": rows}


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--task", choices=TASKS, action="append", help="one task, or several")
    parser.add_argument("--texts", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    return parser.parse_args(argv)


def main() -> None:
    args = parse_arguments()
    result = bench(args)
    print(json.dumps(result) if args.json else table(result))


def bench(args: argparse.Namespace) -> dict[str, Any]:
    """Run all tasks and engines over the same texts, one after the other in this process."""
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as name, torch.inference_mode():
        folder = Path(name)
        sources = make_tokenizer(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        texts = make_texts(tokenizer, sources, args.texts)
        lengths = [len(ids) for ids in tokenizer(texts)["input_ids"]]
        tasks = []
        for task in args.task or TASKS:
            here = folder / task
            here.mkdir()
            tokenizer.save_pretrained(here)
            tasks.append(bench_task(task, texts, lengths, here))
    return {
        "threads": args.threads,
        "texts": args.texts,
        "tokens": sum(lengths),
        "shortest_median_longest": [min(lengths), round(median(lengths)), max(lengths)],
        "tasks": tasks,
    }


def table(result: dict[str, Any]) -> str:
    low, middle, high = result["shortest_median_longest"]
    lines = [
        f"MiniLM's size, fp32, {result['threads']} thread(s), {result['texts']} texts of {low} to {high} "
        f"tokens, median {middle}",
        "",
        "| task | engine | texts/s | times the best pipeline | texts per CPU second | the same is told of |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {task['task']} | {row['engine']} | {row['texts_per_second']} | "
        f"{row['times_texts_per_second']} | {row['texts_per_cpu_second']} "
        f"({row['times_texts_per_cpu_second']} times) | {row['same']} of {result['texts']} |"
        for task in result["tasks"]
        for row in task["rows"]
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
