"""CTranslate2. Its environment needs ``ctranslate2``, and for the conversion ``transformers`` and ``torch``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import ctranslate2
from ctranslate2.converters import TransformersConverter

from benchmarks.baselines.measuring import Answers, Compute, Load, measure


def prepare(load: Load, args: argparse.Namespace) -> Compute:
    """``--how``: ``float32:32`` or ``int8:32``, the type and the rows of a batch."""
    kind, _, rows = args.how.partition(":")
    folder = convert(Path(load.model))
    generator = ctranslate2.Generator(
        str(folder), device="cpu", compute_type=kind, inter_threads=1, intra_threads=args.threads
    )
    return lambda some: generate(generator, some, int(rows))


def convert(model: Path) -> Path:
    """The model in its own form, beside the original."""
    folder = model.with_name(f"{model.name}-ctranslate2")
    if not (folder / "model.bin").exists():
        TransformersConverter(str(model)).convert(str(folder), force=True)
        config = folder / "config.json"
        known = json.loads(config.read_text())
        # It writes nulls for what the tokenizer does not have, and does not load them.
        known |= {name: known[name] or known["eos_token"] for name in ("bos_token", "unk_token")}
        config.write_text(json.dumps({k: v for k, v in known.items() if v is not None}))
    return folder


def generate(generator: ctranslate2.Generator, load: Load, rows: int) -> Answers:
    found = generator.generate_batch(
        load.pieces,
        max_batch_size=rows,
        max_length=load.most,
        sampling_topk=1,
        include_prompt_in_result=False,
        end_token=load.end_tokens,
        return_end_token=True,
    )
    return [list(each.sequences_ids[0]) for each in found]


if __name__ == "__main__":
    measure(__doc__ or "", prepare)
