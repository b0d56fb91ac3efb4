"""Tokenised files that outlive the attempt: ``<data>/cache/tokens/<key>/``, a folder of columns each.

The key is a SHA-256 over all that decides about the content: the file, the tokenizer, and how the task
reads. An entry is written aside and renamed into place, so that it is whole or not there; of several
that write the same one, the first counts, and all are right. Who has an entry mapped holds a shared
lock on its ``used`` file, which is touched when it is opened: what nobody holds and nobody opened for
``KEPT_SECONDS`` is deleted by who adds the next.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import secrets
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import tokenizers
import transformers
from transformers import PreTrainedTokenizerBase

from workers.ranks.checkpoint import digest, place
from workers.ranks.train.columns import FORMAT, ColumnsDamaged, collected_in, map_columns
from workers.ranks.train.examples import Examples

KEPT_SECONDS = 14 * 24 * 3600.0
_ABANDONED_SECONDS = 24 * 3600.0
"""What is written aside and did not grow for so long was left by a process that is gone."""
_ASIDE = ".writing-"
_TRASH = ".deleting-"
_USED = "used"
_SETTINGS_OF_A_CALL = ("truncation", "padding")
_NOT_TOKENIZER = (".safetensors", ".bin", ".gguf")


@dataclass(frozen=True, slots=True)
class Entry:
    """Examples that are in the cache under ``key``."""

    key: str
    examples: Examples


class TokenCache:
    """One folder of entries."""

    def __init__(self, folder: Path, notice: Callable[[str, str], None]) -> None:
        """``notice`` is called with (code, message) for what a user should know."""
        self._folder = folder
        self._notice = notice

    def find(self, key: str) -> Entry | None:
        """What is in the cache, if it is whole. What is not goes, with a notice."""
        folder = self._folder / key
        try:
            held = _hold(folder)
            examples = map_columns(folder)
        except OSError:  # not there, or not for us to read
            return None
        except ColumnsDamaged as problem:
            self._notice(
                "token_cache_damaged", f"tokenised data in the cache are made anew: {problem}"
            )
            _delete(folder)
            return None
        examples.held = held
        return Entry(key, examples)

    def add(self, key: str, read: Callable[[], Examples]) -> Entry | None:
        """Run ``read``, keep what it collects, and return it; None where ``read`` collects nothing
        that can be kept.

        Raises:
            OSError: the cache cannot be written; nothing of it stays.
            Exception: what ``read`` raises; the same.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        self._tidy()
        aside = self._folder / f"{_ASIDE}{key[:16]}-{secrets.token_hex(8)}"
        try:
            aside.mkdir()
            with collected_in(aside):
                examples = read()
            if examples.folder != aside:
                return None
            (aside / _USED).touch()
            examples.held = _hold(aside)
            try:
                place(aside, self._folder / key)
            except OSError:
                # Another was faster. Ours stays mapped, and is as good.
                if not (self._folder / key).is_dir():
                    raise
            return Entry(key, examples)
        finally:
            shutil.rmtree(aside, ignore_errors=True)

    def _tidy(self) -> None:
        """Delete what is not used, and what was left half-written."""
        now = time.time()
        for folder in self._folder.iterdir():
            with contextlib.suppress(OSError):
                if folder.name.startswith((_ASIDE, _TRASH)):
                    newest = max(p.stat().st_mtime for p in (folder, *folder.iterdir()))
                    if now - newest > _ABANDONED_SECONDS:
                        shutil.rmtree(folder)
                elif now - (folder / _USED).stat().st_mtime > KEPT_SECONDS:
                    with (folder / _USED).open("r+b") as used:
                        fcntl.flock(used, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        _delete(folder)


def content_key(
    file: Path, format: str, tokenizer: PreTrainedTokenizerBase, reads: Mapping[str, Any]
) -> str | None:
    """The key of a file as a task reads it; None for a tokenizer that cannot be told from others.

    Raises:
        OSError: the file cannot be read.
    """
    identity = tokenizer_identity(tokenizer)
    if identity is None:
        return None
    parts = {
        "columns": FORMAT,
        "content": digest(file).sha256,
        "format": format,
        "tokenizer": identity,
        "versions": [transformers.__version__, tokenizers.__version__],
        "reads": dict(reads),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def tokenizer_identity(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """A digest of all that decides how a tokenizer tokenises: what it was before its first call."""
    parts: dict[str, Any] = {
        "class": type(tokenizer).__name__,
        "chat_template": tokenizer.chat_template,
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "side": tokenizer.truncation_side,
    }
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        state = json.loads(backend.to_str())
        parts["state"] = {k: v for k, v in state.items() if k not in _SETTINGS_OF_A_CALL}
    else:
        folder = Path(tokenizer.name_or_path)
        if not folder.is_dir():
            return None
        files = sorted(p for p in folder.iterdir() if p.is_file())
        parts["files"] = {
            p.name: digest(p).sha256 for p in files if not p.name.endswith(_NOT_TOKENIZER)
        }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _hold(folder: Path) -> BinaryIO | None:
    """Say that the entry is used, from now until the file that is returned is closed.

    Raises:
        FileNotFoundError: there is none, or it is being deleted.
    """
    try:
        used = (folder / _USED).open("rb")
    except FileNotFoundError:
        if folder.is_dir():
            return None  # damaged: the manifest tells
        raise
    try:
        fcntl.flock(used, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        used.close()
        raise FileNotFoundError(folder) from None
    except OSError:
        pass  # a file system without locks: its age has to do
    with contextlib.suppress(OSError):
        (folder / _USED).touch()
    return used


def _delete(folder: Path) -> None:
    """Renamed first: nobody may find half of it. What is mapped stays readable."""
    trash = folder.with_name(f"{_TRASH}{secrets.token_hex(8)}")
    with contextlib.suppress(OSError):
        folder.rename(trash)
        shutil.rmtree(trash, ignore_errors=True)
