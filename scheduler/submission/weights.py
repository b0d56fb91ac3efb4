"""The headers of safetensors files: what is in them, and whether they are whole.

Format: 8 bytes, the length n of the header (little endian), n bytes of JSON that give each tensor's
dtype, shape and place, then the data. https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path

from scheduler.submission.paths import printable
from shared.errors import UnsupportedModel

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_HEADER_LIMIT = 100_000_000  # the format's own
_CONVERT = "Convert it where you trust it: model.save_pretrained(folder) writes safetensors."


def read_tensors(folder: Path, name: str) -> tuple[tuple[tuple[str, int], ...], int]:
    """(name and number of elements of each tensor, bytes of all of them) of a model folder.

    Raises:
        UnsupportedModel: no safetensors (only pickles, say), a file is missing, damaged, or lies
            outside the folder.
    """
    shown, tensors, stored = printable(name), [], 0
    for file in _weight_files(folder, shown):
        try:
            found, size = _read_header(file)
        except (OSError, ValueError) as error:
            raise UnsupportedModel(
                f"{file.name} of model '{shown}' is damaged: {error}",
                param="model",
                hint="Copy the file again; it is probably cut off.",
            ) from None
        tensors += found
        stored += size
    return tuple(tensors), stored


def _weight_files(folder: Path, shown: str) -> list[Path]:
    if (folder / WEIGHTS).is_file():
        names = [WEIGHTS]
    elif (folder / INDEX).is_file():
        try:
            names = sorted(
                {str(v) for v in json.loads((folder / INDEX).read_bytes())["weight_map"].values()}
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise UnsupportedModel(
                f"{INDEX} of model '{shown}' cannot be read", param="model"
            ) from None
    else:
        pickles = [p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth")]
        if pickles:
            raise UnsupportedModel(
                f"model '{shown}' has its weights only as a pickle ({min(pickles)}), which can run code",
                param="model",
                hint=_CONVERT,
            )
        raise UnsupportedModel(f"model '{shown}' has no {WEIGHTS}", param="model", hint=_CONVERT)
    files = [folder / name for name in names]
    for name, file in zip(names, files, strict=True):
        # An index may name `../other.safetensors`, and Transformers would load it.
        if Path(name).name != name or not file.resolve().is_relative_to(folder):
            raise UnsupportedModel(
                f"model '{shown}' names a weight file outside its folder ('{printable(name)}')",
                param="model",
                hint="Copy the folder with its links followed (cp -rL).",
            )
        if not file.is_file():
            raise UnsupportedModel(f"'{name}' is missing from model '{shown}'", param="model")
    return files


def _read_header(path: Path) -> tuple[list[tuple[str, int]], int]:
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if len(start) < 8:
            raise ValueError("it is too short")
        (length,) = struct.unpack("<Q", start)
        if length > min(_HEADER_LIMIT, size - 8):
            raise ValueError("its header is cut off")
        header = json.loads(file.read(length))
    if not isinstance(header, dict):
        raise ValueError("its header is no JSON object")
    header.pop("__metadata__", None)
    try:
        tensors = [(name, math.prod(tensor["shape"])) for name, tensor in header.items()]
        stored = max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
    except (KeyError, TypeError, IndexError):
        raise ValueError("its header is malformed") from None
    if 8 + length + stored != size:
        raise ValueError(f"it has {size} bytes and should have {8 + length + stored}")
    return tensors, stored
