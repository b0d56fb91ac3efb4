"""Texts of several lengths, made of the demo's glosses: each is a few of one topic in a row."""

from __future__ import annotations

import json
import random
from collections import defaultdict
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parents[1]
GLOSSES = ROOT / "examples" / "data" / "glosses-train.jsonl"
Length = Literal["short", "mixed", "long"]
_TOGETHER: dict[Length, tuple[int, int]] = {"short": (1, 1), "mixed": (1, 20), "long": (8, 20)}
"""Glosses a text is made of, at least and at most. One has a median of 15 tokens."""


def write_texts(folder: Path, length: Length, rows: int = 2000) -> Path:
    """A JSONL file of ``rows`` labelled texts; the same for the same arguments."""
    random_ = random.Random(length)
    topics: dict[str, list[str]] = defaultdict(list)
    for line in GLOSSES.read_text().splitlines():
        row = json.loads(line)
        topics[row["label"]].append(row["text"])
    fewest, most = _TOGETHER[length]
    path = folder / f"{length}.jsonl"
    with path.open("w") as file:
        for number in range(rows):
            label = sorted(topics)[number % len(topics)]
            # As often a text of 1 to 4 as one of 5 to 20: short ones are common, long ones are there.
            many = round(fewest * (most / fewest) ** random_.random())
            text = "; ".join(random_.choices(topics[label], k=many))
            file.write(json.dumps({"text": text, "label": label}) + "\n")
    return path
