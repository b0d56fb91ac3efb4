"""What precision int8 costs in quality and gains in speed on the CPU, on the two real models that pip installs.

SmolLM2-135M-Instruct writes on after prompts of running English (the topics of Python's own documentation,
which every Python has) and scores the same pieces: perplexity, share of the greedy answers that are those of
fp32, and how far they agree. MiniLM embeds the demo's definitions: the cosine to the vector of fp32, and how
often the nearest of the others is of the same topic (a classifier by nearest neighbour), or is the one that
fp32 finds. Speed is counted in seconds of CPU time. Prints a table, and with ``--json`` one object.

    python -m benchmarks.quantised [--models FOLDER] [--texts 64] [--prompts 32] [--threads 1]
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import os
import pydoc_data.topics
import random
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.texts import GLOSSES
from gpuyard.local.demo_models import ENCODER, GENERATOR, Conversion, provide_encoder
from shared.messages import DeviceHandle, InferAssignment
from shared.rows import cut_into_shards
from shared.specs import InferSpec
from workers.ranks.engine.attempt import Attempt
from workers.ranks.engine.models import ModelCache
from workers.ranks.engine.sharing import Computations

PRECISIONS: dict[str, torch.dtype] = {"fp32": torch.float32, "int8": torch.int8}
NEW_TOKENS = 32
WORDS = 120
"""Of a text that is scored or embedded."""

Rows = list[dict[str, Any]]


def texts(count: int) -> list[str]:
    """Pieces of running English, each of another place."""
    prose = " ".join(pydoc_data.topics.topics.values()).split()
    starts = random.Random(0).sample(range(0, len(prose) - WORDS, WORDS), count)
    return [" ".join(prose[start : start + WORDS]) for start in starts]


class Engine:
    """The engine in this process, with its models warm."""

    def __init__(self) -> None:
        self._models = ModelCache()

    def run(
        self, folder: Path, precision: str, rows: Rows, **spec: Any
    ) -> tuple[list[dict[str, Any]], float]:
        """The outputs of the rows, and the CPU seconds that they took once the model was there."""
        with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file, _quiet():
            file.writelines(json.dumps(row) + "\n" for row in rows)
            file.flush()
            assignment = InferAssignment(
                job_id="bench", attempt_id="bench", attempt=1, token=1,
                device=DeviceHandle(
                    id="cpu0", kind="cpu", memory_bytes=8 << 30, threads=torch.get_num_threads()
                ),
                spec=InferSpec.model_validate(
                    {"model": "bench", "input": file.name, "precision": precision, **spec}
                ),
                model_path=str(folder), input_path=file.name,
            )  # fmt: skip
            loaded, warm = self._models.get(
                assignment.spec.task, str(folder), PRECISIONS[precision], torch.device("cpu")
            )
            started = time.process_time()
            shared = Computations().join(assignment, loaded)
            attempt = Attempt(assignment, shared, warm)
            attempt.order(tuple(cut_into_shards(Path(file.name), len(rows))))
            done = []
            while attempt.busy:
                done += attempt.feed()
                step, seconds = shared.step()
                found = [answered.result for answered in step.results]
                done += attempt.take(found, step.tokens.get(attempt.id, 0), seconds)
            spent = time.process_time() - started
        results = [row for shard in done for row in shard.results]
        assert all(row["error"] is None for row in results), results
        return [row["output"] for row in results], spent


def writing(
    engine: Engine, folder: Path, pieces: Sequence[str], prompts: int
) -> list[dict[str, Any]]:
    """A language model: perplexity and greedy answers."""
    asked: Rows = [{"prompt": " ".join(piece.split()[:40])} for piece in pieces[:prompts]]
    found = []
    reference: list[str] = []
    for precision in PRECISIONS:
        scored, scoring = engine.run(
            folder, precision, [{"text": p} for p in pieces], task="scoring"
        )
        nats = -sum(output["logprob"] for output in scored)
        tokens = sum(output["tokens"] for output in scored)
        generation = {"max_new_tokens": NEW_TOKENS}
        outputs, writing = engine.run(
            folder, precision, asked, task="text-generation", generation=generation
        )
        answers = [output["text"] for output in outputs]
        reference = reference or answers
        pairs = list(zip(answers, reference, strict=True))
        found.append(
            {
                "precision": precision,
                "perplexity": round(math.exp(nats / tokens), 3),
                "scored_tokens": tokens,
                "identical_answers": sum(ours == theirs for ours, theirs in pairs),
                "answers": len(answers),
                "same_beginning": round(sum(_common(*pair) for pair in pairs) / len(pairs), 3),
                "scoring_cpu_seconds": round(scoring, 2),
                "writing_cpu_seconds": round(writing, 2),
            }
        )
    return found


def embedding(engine: Engine, folder: Path, count: int) -> list[dict[str, Any]]:
    """An encoder: its vectors, and what is nearest by them."""
    rows: Rows = [json.loads(line) for line in GLOSSES.read_text().splitlines()[:count]]
    topics = [row["label"] for row in rows]
    found = []
    vectors = torch.empty(0)
    for precision in PRECISIONS:
        outputs, spent = engine.run(
            folder, precision, [{"text": row["text"]} for row in rows], task="embeddings"
        )
        own = torch.tensor([output["embedding"] for output in outputs])
        vectors = own if not len(vectors) else vectors
        nearest = _nearest(own)
        same = nearest == _nearest(vectors)
        right = sum(topics[other] == topic for topic, other in zip(topics, nearest, strict=True))
        found.append(
            {
                "precision": precision,
                "least_cosine": round((own * vectors).sum(1).min().item(), 4),
                "accuracy": round(right / len(rows), 4),
                "same_nearest": int(same.sum()),
                "texts": len(rows),
                "cpu_seconds": round(spent, 2),
            }
        )
    return found


def bench(models: Path, count: int, prompts: int) -> dict[str, Any]:
    """Both models, which are made in ``models/`` of the folder where they are not there."""
    encoder = provide_encoder(models)
    conversion = Conversion(models)
    if conversion.start():
        conversion.wait()
    engine, pieces = Engine(), texts(count)
    with torch.inference_mode():
        return {
            "threads": torch.get_num_threads(),
            GENERATOR: writing(engine, conversion.target, pieces, prompts),
            ENCODER: embedding(engine, encoder, 12 * count) if encoder is not None else [],
        }


def table(result: dict[str, Any]) -> str:
    lines = [
        f"| {GENERATOR} | perplexity | greedy answers as in fp32 | the same up to | scoring, CPU s | "
        "writing, CPU s |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {row['precision']} | {row['perplexity']} | {row['identical_answers']} of {row['answers']} | "
        f"{row['same_beginning']:.0%} | {row['scoring_cpu_seconds']} | {row['writing_cpu_seconds']} |"
        for row in result[GENERATOR]
    ]
    lines += [
        "",
        f"| {ENCODER} | least cosine to fp32 | accuracy by nearest neighbour | the same neighbour | CPU s |",
        "| --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {row['precision']} | {row['least_cosine']} | {row['accuracy']} | {row['same_nearest']} of {row['texts']} | "
        f"{row['cpu_seconds']} |"
        for row in result[ENCODER]
    ]
    return "\n".join(lines)


def _common(ours: str, theirs: str) -> float:
    """The share of a text that is as the other from its beginning on."""
    longest = max(len(ours), len(theirs))
    return len(os.path.commonprefix([ours, theirs])) / longest if longest else 1.0  # noqa: RUF071


def _nearest(vectors: torch.Tensor) -> torch.Tensor:
    similar = vectors @ vectors.T
    similar.fill_diagonal_(-math.inf)
    return similar.argmax(1)


@contextlib.contextmanager
def _quiet() -> Any:
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--models", type=Path, default=Path("bench-out"), help="a data folder")
    parser.add_argument("--texts", type=int, default=64)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    result = bench(args.models, args.texts, args.prompts)
    print(json.dumps(result) if args.json else table(result))


if __name__ == "__main__":
    main()
