"""What the processors could do at best: the rate of matrix products, the bandwidth of memory, and the least
time that a load of generation takes by them.

Run as a process by ``benchmarks.inference``.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks.baselines.measuring import Load

ROWS = (1, 16, 32, 64, 1024)
"""Rows of a product: one text, some that decode together, prompts."""
LARGE = 2048
READ_BYTES = 512 << 20
TURNS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--load", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--how", default="")
    args = parser.parse_args()
    load = Load(**json.loads(args.load.read_text()))
    torch.set_num_threads(args.threads)
    with torch.inference_mode():
        args.out.write_text(json.dumps(measure(load.model)))


def measure(folder: str) -> dict[str, Any]:
    """GFLOP/s of products, GB/s of reading, and what the model has to compute."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = model.config
    head = config.vocab_size * config.hidden_size
    layers = sum(
        each.numel()
        for name, each in model.named_parameters()
        if each.dim() == 2 and not name.endswith(("wte.weight", "wpe.weight", "embed_tokens.weight", "lm_head.weight"))
    )  # fmt: skip
    kept = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = config.hidden_size // config.num_attention_heads
    a, b = torch.randn(LARGE, LARGE), torch.randn(LARGE, LARGE)
    best = 2 * LARGE**3 / seconds(lambda: a @ b) / 1e9
    lines = torch.ones(READ_BYTES // 4)
    return {
        "gflops_large": round(best),
        "gflops_by_rows": {rows: round(over_layers(rows, config.hidden_size)) for rows in ROWS},
        "read_gb_per_second": round(READ_BYTES / seconds(lambda: lines.sum()) / 1e9, 1),
        "layer_weights": layers,
        "head_weights": head,
        "cache_bytes_per_position": 2 * config.num_hidden_layers * kept * size * 4,
    }


def over_layers(rows: int, hidden: int) -> float:
    """GFLOP/s over weights of a decoder's shapes that no cache holds, by inputs as the engine has them."""
    shapes = [(hidden, 3 * hidden), (hidden, hidden), (hidden, 4 * hidden), (4 * hidden, hidden)]
    copies = 6
    weights = [torch.randn(i, o + 16)[:, :o] for _ in range(copies) for i, o in shapes]
    inputs = {i: torch.randn(rows, i) for i, _ in shapes}
    flops = sum(2 * rows * weight.numel() for weight in weights)

    def compute() -> None:
        for weight in weights:
            torch.mm(inputs[weight.shape[0]], weight)

    return flops / seconds(compute) / 1e9


def seconds(compute: Callable[[], object]) -> float:
    """The best of some turns, the first left out."""
    compute()
    turns = []
    for _ in range(TURNS):
        started = time.perf_counter()
        compute()
        turns.append(time.perf_counter() - started)
    return min(turns)


def least_seconds(limits: dict[str, Any], lengths: Sequence[tuple[int, int]]) -> dict[str, float]:
    """What a load must take by these limits.

    Args:
        lengths: tokens of prompt and answer of each request.
    """
    computed = sum(prompt + answer - 1 for prompt, answer in lengths)
    generated = sum(answer for _, answer in lengths)
    flops = 2 * (limits["layer_weights"] * computed + limits["head_weights"] * generated)
    positions = sum(
        (answer - 1) * prompt + answer * (answer - 1) // 2 for prompt, answer in lengths
    )
    read = positions * limits["cache_bytes_per_position"]
    products = flops / limits["gflops_large"] / 1e9
    reading = read / limits["read_gb_per_second"] / 1e9
    return {
        "least_seconds_of_products": round(products, 2),
        "least_seconds_of_reading_caches": round(reading, 2),
        "least_seconds": round(products + reading, 2),
    }


if __name__ == "__main__":
    main()
