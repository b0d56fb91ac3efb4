"""What the files of a tokenizer say, as far as they say it without the tokenizer itself.

What they leave open is no, so that nothing is refused that a rank could use.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CONFIG = "tokenizer_config.json"
SPECIAL = "special_tokens_map.json"
TEMPLATES = ("chat_template.jinja", "chat_template.json", "additional_chat_templates")
"""Beside the ``chat_template`` of the config: files and folders that hold some."""
_WITHOUT_DEFAULTS = frozenset({"PreTrainedTokenizerFast", "TokenizersBackend"})
"""Classes that have no special tokens but those they are told."""
_LIMIT = 64 * 1024 * 1024


def lacks_chat_template(folder: Path) -> bool:
    """Whether there is surely none."""
    if any((folder / name).exists() for name in TEMPLATES):
        return False
    config = _read(folder / CONFIG)
    return config is not None and not config.get("chat_template")


def lacks_padding(folder: Path) -> bool:
    """Whether there is surely no padding token: most classes have one of their own."""
    config, special = _read(folder / CONFIG), _read(folder / SPECIAL)
    if config is None or special is None:
        return False
    told = config.get("pad_token") or special.get("pad_token")
    return not told and config.get("tokenizer_class") in _WITHOUT_DEFAULTS


def _read(path: Path) -> dict[str, Any] | None:
    """Empty where there is no such file; None where it cannot be read."""
    try:
        if not path.is_file():
            return {}
        content = json.loads(path.read_bytes()) if path.stat().st_size <= _LIMIT else None
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None
