"""What a Transformers user would write: fine-tuning with ``Trainer`` under bare torchrun.

``--batches own`` is its random sampler with dynamic padding; ``--batches ours`` hands it, with a batch
sampler, the very batches that gpuyard makes of the same file. A checkpoint every ``--save-steps``. The
clock starts after the first step and stops when training is over. Rank 0 prints one JSON line.

    torchrun --nproc-per-node 2 -m benchmarks.baselines.hf_trainer --model DIR --data FILE --steps 40
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from workers.ranks.train.order import epoch_order


class Texts(Dataset[dict[str, Any]]):
    def __init__(self, encoded: list[list[int]], labels: list[int]) -> None:
        self.encoded, self.labels = encoded, labels

    def __len__(self) -> int:
        return len(self.encoded)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": self.encoded[index], "labels": self.labels[index]}


class OurBatches(Trainer):
    """``Trainer`` on gpuyard's batches."""

    def get_train_dataloader(self) -> DataLoader[Any]:
        texts = self.train_dataset
        assert isinstance(texts, Texts)
        lengths = np.array([len(tokens) for tokens in texts.encoded], dtype=np.int32)
        ranks = self.args.world_size
        size = self.args.per_device_train_batch_size * ranks
        order = epoch_order(lengths, size, self.args.seed, 0)
        whole = [order[at : at + size] for at in range(0, len(order) - size + 1, size)]
        # Accelerate hands batch i to rank i modulo the ranks.
        batches = [batch[rank::ranks].tolist() for batch in whole for rank in range(ranks)]
        loader: DataLoader[Any] = DataLoader(
            texts, batch_sampler=batches, collate_fn=self.data_collator
        )
        prepared: DataLoader[Any] = self.accelerator.prepare(loader)
        return prepared


class Clock(TrainerCallback):
    """When the first step was done."""

    first_step = 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        if state.global_step == 1:
            self.first_step = time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--batch-size", type=int, default=32, help="over all ranks")
    parser.add_argument("--batches", choices=["own", "ours"], default="own")
    parser.add_argument("--save-steps", type=int, default=None)
    args = parser.parse_args()

    torch.set_num_threads(1)
    rows = [json.loads(line) for line in args.data.read_text().splitlines() if line]
    labels = sorted({row["label"] for row in rows})
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=len(labels))
    encoded = tokenizer([row["text"] for row in rows], truncation=True, max_length=512)["input_ids"]
    texts = Texts(encoded, [labels.index(row["label"]) for row in rows])
    clock = Clock()
    with tempfile.TemporaryDirectory(prefix="hf-trainer-") as folder:
        options = TrainingArguments(
            output_dir=folder,
            max_steps=args.steps,
            per_device_train_batch_size=args.batch_size // int(os.environ["WORLD_SIZE"]),
            learning_rate=3e-4,
            weight_decay=0.01,
            max_grad_norm=1.0,
            lr_scheduler_type="linear",
            save_strategy="no" if args.save_steps is None else "steps",
            save_steps=args.save_steps or 500,
            save_total_limit=2,
            logging_strategy="no",
            report_to=[],
            seed=42,
            use_cpu=True,
            ddp_backend="gloo",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        kind = OurBatches if args.batches == "ours" else Trainer
        trainer = kind(
            model=model,
            args=options,
            train_dataset=texts,
            data_collator=DataCollatorWithPadding(tokenizer),
            callbacks=[clock],
        )
        trainer.train()
        seconds = time.perf_counter() - clock.first_step
        if options.process_index == 0:
            examples = (args.steps - 1) * args.batch_size
            print(json.dumps({"examples_per_second": examples / seconds}))


if __name__ == "__main__":
    main()
