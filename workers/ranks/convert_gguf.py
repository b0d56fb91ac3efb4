"""Turns the Llama-type model of a GGUF file into a plain folder: safetensors, tokenizer, template.

``python -m workers.ranks.convert_gguf FILE FOLDER``. The quantised weights are widened to bf16, once;
the folder then loads in seconds and needs no ``gguf`` package. It is written aside and renamed, so
that a folder that exists is whole.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

# What a GGUF file says of its own storage, and what depends on how it was loaded here.
_NOT_ARCHITECTURE = (
    *("quantization_config", "_name_or_path", "_model_name_or_path", "transformers_version"),
    "dtype",
)


def convert(source: Path, target: Path) -> None:
    """Write ``target`` from the GGUF file ``source``. Does nothing if ``target`` exists.

    Raises:
        ValueError: the file holds no Llama-type model, or tensors are missing.
    """
    if target.exists():
        return
    where = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    loaded = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    if not isinstance(loaded, LlamaForCausalLM):
        raise ValueError(f"{source.name} holds a {type(loaded).__name__}, not a Llama-type model")
    model = _plain(loaded, tokenizer)
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        model.save_pretrained(fresh)
        tokenizer.save_pretrained(fresh)
        fresh.chmod(0o755)
        for path in fresh.rglob("*"):
            path.chmod(0o644)
            with path.open("rb") as file:
                os.fsync(file.fileno())
        try:
            fresh.rename(target)
        except OSError:
            # Another process converted the same model meanwhile: the first one stays.
            if not target.exists():
                raise
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _plain(loaded: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The same weights in a model that knows nothing of GGUF: one loaded from it refuses to save."""
    settings = loaded.config.to_dict()
    config = LlamaConfig(**{k: v for k, v in settings.items() if k not in _NOT_ARCHITECTURE})
    config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    config.pad_token_id = tokenizer.pad_token_id
    model = LlamaForCausalLM(config)
    missing, unexpected = model.load_state_dict(loaded.state_dict(), strict=False)
    if missing or unexpected:
        raise ValueError(f"tensors do not match: missing {missing}, unexpected {unexpected}")
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.bfloat16()
    return model


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code."""
    parser = argparse.ArgumentParser("convert_gguf", description=__doc__)
    parser.add_argument("source", type=Path, metavar="FILE")
    parser.add_argument("target", type=Path, metavar="FOLDER")
    options = parser.parse_args(argv)
    convert(options.source.resolve(), options.target.resolve())
    return 0


if __name__ == "__main__":
    sys.exit(main())
