"""``python -m benchmarks.footprint``: the footprint by arithmetic and as measured without weights, against
the peak of real trainings on the CPU. Some five minutes on idle cores; prints each pair as it is done.

Each pair is a model of 15 to 30 million weights in a folder, real rows in a file, and a real training
rank in a process of its own: ``workers.ranks.train``, from the assignment to the delivered model. What it
takes is what the kernel says: the peak of the process's own pages (RssAnon) from the first step on, and the
pages of the weight file that it still looks at (frozen weights stay there). What a process has before
it has a model is taken off. Beside it the tensors of one step are counted in another process.

glibc gives blocks above a threshold back to the kernel as they are freed, and raises that threshold up to
32 MiB with every such block that is freed; from then on tensors lie in the heap, with holes that stay the
process's. That is up to chance and to the order of sizes, so the peak is taken with the threshold held at
128 KiB (``MALLOC_MMAP_THRESHOLD_``), where what is freed is gone; and once more as ranks run, as that is
what a host has to give. Arenas play no part: on the CPU, backward runs in the thread that asks for it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scheduler.footprint import training_bytes, training_length
from scheduler.submission.models import shape_of_folder
from shared.footprint import RUNTIME, Configuration, configuration
from shared.specs import TrainSpec

ROOT = Path(__file__).resolve().parents[1]
MB = 1e6
VOCABULARY = 12_000
HEAD = (
    "| pair | peak | arithmetic | measured | tensors counted | peak, usual malloc |"
    " whole process, usual malloc | measured and runtime |",
    "| --- | --- | --- | --- | --- | --- | --- | --- |",
)
GLIBC = {"MALLOC_MMAP_THRESHOLD_": "131072"}


@dataclass(frozen=True, slots=True)
class Pair:
    """A model and a way to train it."""

    name: str
    model: str
    task: str
    rows: int
    tokens: int
    fields: dict[str, Any] = field(default_factory=dict)
    hyperparameters: dict[str, Any] = field(default_factory=dict)


PAIRS = (
    Pair("BERT, text-classification, full", "bert", "text-classification", 16, 128),
    Pair(
        "BERT, text-classification, LoRA", "bert", "text-classification", 32, 128,
        {"method": "lora"},
    ),
    Pair(
        "BERT, token-classification, embeddings frozen", "bert", "token-classification", 16, 128,
        {}, {"freeze": ["*embeddings*"]},
    ),
    Pair("GPT-2, text-generation, AdamW", "gpt2", "text-generation", 8, 128),
    Pair(
        "Llama, text-generation, Adafactor, 2 micro-batches", "llama", "text-generation", 8, 128,
        {}, {"optimizer": "adafactor", "batch_size": 16, "micro_batch_size": 8},
    ),
    Pair("T5, text2text, full", "t5", "text2text", 8, 128),
    Pair(
        "BERT, distillation from a larger BERT", "bert", "text-classification", 16, 128,
        {"method": "distillation", "teacher": "-"},
    ),
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="pairs whose name has this in it")
    args = parser.parse_args(argv)
    print("\n".join(HEAD), flush=True)
    for pair in PAIRS:
        if args.only in pair.name:
            print(table_row(bench(pair)), flush=True)


def bench(pair: Pair) -> dict[str, Any]:
    """All figures of one pair, in bytes."""
    with tempfile.TemporaryDirectory(prefix="gpuyard-footprint-") as folder:
        place = Path(folder)
        _in_process("make", str(place), pair.name)
        asked, spec = _asked(pair, place)
        shape = shape_of_folder(place / "model")
        teacher = shape_of_folder(place / "teacher") if spec.teacher else None
        return {
            "name": pair.name,
            "arithmetic": training_bytes(shape, asked, teacher) - RUNTIME,
            "measured": _in_process("measure", str(place), pair.name)["bytes"],
            "counted": _in_process("count", str(place), pair.name)["bytes"],
            "tight": _in_process("train", str(place), pair.name, environment=GLIBC),
            "usual": _in_process("train", str(place), pair.name),
        }


def table_row(found: dict[str, Any]) -> str:
    """Of Markdown. All but the last two columns are of what the model takes beyond the bare runtime: the
    harder question."""
    whole = found["usual"]["peak"] + found["usual"]["mapped"]
    usual, tight = (
        found[how]["peak"] - found[how]["bare"] + found[how]["mapped"] for how in ("usual", "tight")
    )
    return (
        f"| {found['name']} | {tight / MB:.0f} MB | {_error(found['arithmetic'], tight)} |"
        f" {_error(found['measured'], tight)} | {found['counted'] / MB:.0f} MB |"
        f" {usual / MB:.0f} MB ({_error(usual, tight)}) | {whole / MB:.0f} MB |"
        f" {_error(found['measured'] + RUNTIME, whole)} |"
    )


def _error(said: float, truth: float) -> str:
    return f"{said / truth - 1:+.1%}"


def _spec(pair: Pair, place: Path) -> TrainSpec:
    return TrainSpec.model_validate(
        {
            "kind": "train", "task": pair.task, "model": "-",
            "data": {"train": str(place / "train.jsonl")},
            "checkpoint": {"every_seconds": None},
            "hyperparameters": {
                "batch_size": pair.rows, "max_steps": 4, "precision": "fp32",
                "max_length": pair.tokens, **pair.hyperparameters,
            },
            **pair.fields,
        }
    )  # fmt: skip


def _asked(pair: Pair, place: Path) -> tuple[Configuration, TrainSpec]:
    spec = _spec(pair, place)

    def config(name: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((place / name / "config.json").read_text())
        return found

    asked = configuration(
        spec,
        config("model"),
        config("teacher") if spec.teacher else None,
        labels=4 if "classification" in pair.task else 0,
        length=training_length(shape_of_folder(place / "model"), spec, None),
        device="cpu",
    )
    return asked, spec


def _in_process(what: str, *arguments: str, environment: dict[str, str] | None = None) -> Any:
    """A process of its own for each figure: what one leaves in memory must not be the next one's."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.baselines.footprint_process", what, *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(f"{what} {arguments}:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def write_rows(pair: Pair, path: Path) -> None:
    """Texts of about the length that counts, some of it, some a little below."""
    draw = random.Random(1)
    words = [f"w{number}" for number in range(5000)]
    with path.open("w") as file:
        for row in range(6 * pair.rows * 2):
            length = pair.tokens + 8 if row % 4 == 0 else draw.randint(pair.tokens - 8, pair.tokens)
            text = draw.choices(words, k=length)
            fields: dict[str, Any]
            match pair.task:
                case "token-classification":
                    fields = {"tokens": text, "tags": [f"T{draw.randint(0, 3)}" for _ in text]}
                case "text2text":
                    fields = {
                        "text": " ".join(text),
                        "target": " ".join(draw.choices(words, k=length)),
                    }
                case "text-generation":
                    fields = {"text": " ".join(text)}
                case _:
                    fields = {"text": " ".join(text), "label": f"L{row % 4}"}
            file.write(json.dumps(fields) + "\n")


def pair_of(name: str) -> Pair:
    return next(pair for pair in PAIRS if pair.name == name)


if __name__ == "__main__":
    main()
