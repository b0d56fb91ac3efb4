"""Model folders as submission sees them, made by hand in milliseconds: a real safetensors header over
zeros, a config and a tokenizer file. Nothing loads them."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

ENCODER = {
    "architectures": ["BertModel"],
    "model_type": "bert",
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 50,
    "max_position_embeddings": 128,
}
CLASSIFIER = {**ENCODER, "architectures": ["BertForSequenceClassification"]}
CAUSAL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 50,
    "max_position_embeddings": 256,
}


def write_model(
    folder: Path, config: dict[str, Any], tensors: dict[str, tuple[int, ...]] | None = None
) -> Path:
    """A folder that submission accepts for what ``config`` says."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    write_safetensors(folder / "model.safetensors", tensors or {"embeddings.weight": (50, 16)})
    return folder


def write_safetensors(path: Path, tensors: dict[str, tuple[int, ...]]) -> None:
    """fp32 zeros of the given shapes."""
    header, offset = {}, 0
    for name, shape in tensors.items():
        size = 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(offset))
