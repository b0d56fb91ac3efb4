"""What a user would write: fine-tuning under bare torchrun, as the PyTorch tutorials teach it.

``--padding grouped`` sorts texts of like length into a batch and pads to its longest, as gpuyard does;
``--padding 512`` pads every text to the model's maximum, as most tutorials do. No checkpoints, no
evaluation, no metrics: nothing but the loop. Rank 0 prints one JSON line.

    torchrun --nproc-per-node 2 -m benchmarks.baselines.ddp_loop --model DIR --data FILE --steps 40
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForSequenceClassification, AutoTokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--batch-size", type=int, default=32, help="over all ranks")
    parser.add_argument("--padding", choices=["grouped", "512"], default="grouped")
    parser.add_argument("--freeze", default=None, help="prefix of parameters to freeze")
    parser.add_argument("--tell", type=Path, help="file for (process, time) of each step of rank 0")
    args = parser.parse_args()

    torch.set_num_threads(1)
    torch.manual_seed(42)
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()

    rows = [json.loads(line) for line in args.data.read_text().splitlines() if line]
    labels = sorted({row["label"] for row in rows})
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=len(labels))
    for name, parameter in model.named_parameters():
        if args.freeze and name.startswith(args.freeze):
            parameter.requires_grad_(False)
    model.train()
    ddp = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=3e-4, weight_decay=0.01
    )

    encoded = tokenizer([row["text"] for row in rows], truncation=True, max_length=512)["input_ids"]
    targets = [labels.index(row["label"]) for row in rows]
    batches = _batches(encoded, args.batch_size, grouped=args.padding == "grouped")

    examples, started, first_step_at = 0, time.perf_counter(), 0.0
    for step in range(args.steps):
        batch = batches[step % len(batches)]
        mine = batch[rank::ranks]
        features = {"input_ids": [encoded[i] for i in mine]}
        if args.padding == "512":
            inputs = tokenizer.pad(
                features, padding="max_length", max_length=512, return_tensors="pt"
            )
        else:
            inputs = tokenizer.pad(features, padding="longest", return_tensors="pt")
        output = ddp(**inputs, labels=torch.tensor([targets[i] for i in mine]))
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        examples += len(batch)
        first_step_at = first_step_at or time.time()
        if args.tell is not None and rank == 0:
            with args.tell.open("a") as file:
                print(json.dumps([os.getpid(), time.time()]), file=file)
    seconds = time.perf_counter() - started
    if rank == 0:
        figures = {"examples_per_second": examples / seconds, "first_step_at": first_step_at}
        print(json.dumps(figures))
    dist.destroy_process_group()


def _batches(encoded: list[list[int]], size: int, *, grouped: bool) -> list[list[int]]:
    generator = random.Random(42)
    order = list(range(len(encoded)))
    generator.shuffle(order)
    if grouped:
        window = size * 16
        order = [
            i
            for start in range(0, len(order), window)
            for i in sorted(order[start : start + window], key=lambda i: -len(encoded[i]))
        ]
    batches = [order[start : start + size] for start in range(0, len(order) - size + 1, size)]
    generator.shuffle(batches)
    return batches


if __name__ == "__main__":
    main()
