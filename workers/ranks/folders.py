"""Looks a model folder over that somebody else wrote, before anything of it is loaded.

Transformers follows an index to ``../other.safetensors`` and an ``adapter_config.json`` to another
model: what names a place outside the folder, code or a pickle is refused here. No torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_JSON_LIMIT = 64 * 1024 * 1024
_ENTRY_LIMIT = 10_000


class LoadError(Exception):
    """A model folder that cannot be used. ``code`` is stable, ``hint`` says what to do.

    Codes: ``model_not_found``, ``model_unsafe`` (reaches outside itself or needs code or pickle),
    ``model_damaged`` (truncated, tensors missing), ``model_unsuitable`` (sound, for another use).
    """

    def __init__(self, code: str, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.hint = hint


def inspect_folder(path: str | Path, *, weights: bool = True) -> Path:
    """Look a model folder over without loading anything; returns its resolved path.

    Raises:
        LoadError: not a folder, no safetensors weights (where ``weights``), or something in it
            names a file outside of it, another model, or code.
    """
    given = Path(path)
    if not given.is_absolute() or not given.is_dir():
        # Transformers would take a path that does not exist for a hub id.
        raise LoadError("model_not_found", f"'{path}' is no model folder")
    folder = given.resolve()
    _refuse_links_outside(folder)
    config = read_json(folder / "config.json", required=weights)
    if "transformers_weights" in config:
        raise LoadError("model_unsafe", f"config.json of '{folder.name}' names its own weight file")
    if (folder / "adapter_config.json").exists():
        raise LoadError(
            "model_unsuitable",
            f"'{folder.name}' holds an adapter, not a whole model",
            "Merge the adapter into its base model (merge_and_unload) and save that.",
        )
    tokenizer = read_json(folder / "tokenizer_config.json", required=False)
    for name in _strings(tokenizer.get("fast_tokenizer_files")):
        _require_plain_name(folder, name, "tokenizer_config.json")
    if weights:
        _inspect_weights(folder)
    return folder


def _inspect_weights(folder: Path) -> None:
    if (folder / ".metadata").exists() or any(folder.glob("shard-*-model-*.safetensors")):
        raise LoadError(
            "model_unsuitable",
            f"'{folder.name}' is a distributed checkpoint, not a model folder",
            "Load it where it was made and save it with model.save_pretrained(folder).",
        )
    if (folder / WEIGHTS).is_file():
        return
    if not (folder / INDEX).is_file():
        pickles = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
        if pickles:
            raise LoadError(
                "model_unsafe",
                f"'{folder.name}' has its weights only as a pickle ({pickles[0]}): it could run code",
                "Convert it where you trust it: model.save_pretrained(folder) writes safetensors.",
            )
        raise LoadError(
            "model_not_found",
            f"'{folder.name}' has no {WEIGHTS} and no {INDEX}",
            "A model folder is what model.save_pretrained(folder) writes.",
        )
    index = read_json(folder / INDEX, required=True)
    files = index.get("weight_map")
    if not isinstance(files, dict) or not files:
        raise LoadError("model_damaged", f"{INDEX} of '{folder.name}' has no weight_map")
    for name in sorted({str(value) for value in files.values()}):
        _require_plain_name(folder, name, INDEX)
        if not name.endswith(".safetensors"):
            raise LoadError(
                "model_unsafe", f"{INDEX} of '{folder.name}' names '{name}', not safetensors"
            )
        if not (folder / name).is_file():
            raise LoadError("model_damaged", f"'{name}' is missing from '{folder.name}'")


def _refuse_links_outside(folder: Path) -> None:
    for count, entry in enumerate(folder.rglob("*")):
        if count >= _ENTRY_LIMIT:
            raise LoadError(
                "model_unsuitable",
                f"'{folder.name}' has over {_ENTRY_LIMIT} entries: it is no model folder",
            )
        if entry.is_symlink() and not entry.resolve().is_relative_to(folder):
            raise LoadError(
                "model_unsafe",
                f"'{entry.relative_to(folder)}' in '{folder.name}' links to a place outside it",
                "Copy the folder with its links followed (cp -rL).",
            )


def _require_plain_name(folder: Path, name: str, where: str) -> None:
    if name in ("", ".", "..") or Path(name).name != name or "\\" in name or "\0" in name:
        raise LoadError(
            "model_unsafe", f"{where} of '{folder.name}' names '{name}', a file outside the folder"
        )


def read_json(path: Path, *, required: bool) -> dict[str, Any]:
    if not path.is_file():
        if required:
            raise LoadError(
                "model_not_found",
                f"'{path.parent.name}' has no {path.name}",
                "A model folder is what model.save_pretrained(folder) writes.",
            )
        return {}
    try:
        if path.stat().st_size > _JSON_LIMIT:
            raise ValueError("it is far too large")
        content = json.loads(path.read_bytes())
        if not isinstance(content, dict):
            raise ValueError("it is no JSON object")
    except ValueError as error:
        raise LoadError(
            "model_damaged",
            f"{path.name} of '{path.parent.name}' cannot be read: {first_line(error)}",
        ) from error
    return content


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, Iterable) and not isinstance(value, str | bytes):
        yield from (str(item) for item in value)


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:300]
