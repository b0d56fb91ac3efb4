"""Tokenised data in the cache: used again by ranks, attempts and jobs, never wrong, never in the way."""

from __future__ import annotations

import os
import random
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shared.formats import DataFile
from shared.lifecycle import FailureClass
from shared.messages import Done, Notice
from shared.specs import TrainSpec
from tests.training.accidents import KEY, add_on_a_full_disk, die_while_adding
from tests.training.harness import (
    Gang,
    in_another_process,
    make_assignment,
    make_bert,
    make_rows,
    write_rows,
)
from workers.ranks.train.columns import Collector
from workers.ranks.train.examples import Examples
from workers.ranks.train.tasks import open_task
from workers.ranks.train.tasks.base import NOT_READ, Task
from workers.ranks.train.token_cache import (
    KEPT_SECONDS,
    Entry,
    TokenCache,
    content_key,
    tokenizer_identity,
)

MB = 1024 * 1024


class Cache(TokenCache):
    """A cache with its notices."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.notices: list[str] = []
        super().__init__(folder, lambda _code, message: self.notices.append(message))

    @property
    def names(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir())


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache" / "tokens")


def reading(lists: Sequence[Sequence[int]] = ((1, 2, 3), (), (4,))) -> Callable[[], Examples]:
    def read() -> Examples:
        collected = Collector()
        for items in lists:
            collected.add({"tokens": items}, length=len(items), numbers={"label": 7.0})
        return collected.done()

    return read


def tokens(entry: Entry | None) -> list[list[int]]:
    assert entry is not None
    return [entry.examples[i]["tokens"].tolist() for i in range(len(entry.examples))]


# --- the folder --------------------------------------------------------------------------------


def test_what_was_added_is_found_and_equal(cache: Cache) -> None:
    draw = random.Random(1)
    # More than is held back from a file at once.
    lists = [draw.choices(range(1000), k=draw.randint(0, 90)) for _ in range(4000)]
    in_memory = reading(lists)()
    added = cache.add(KEY, reading(lists))
    found = cache.find(KEY)
    assert tokens(added) == tokens(found) == lists
    assert added is not None and found is not None
    for entry in (added, found):
        assert entry.examples.digest() == in_memory.digest()
        assert entry.examples.dense["label"].tolist() == [7.0] * 4000
        assert entry.examples.lengths.tolist() == in_memory.lengths.tolist()
        assert entry.examples.cut.tolist() == in_memory.cut.tolist()
        part, wanted = entry.examples.subset(np.array([3, 0])), in_memory.subset(np.array([3, 0]))
        assert part[0]["tokens"].tolist() == wanted[0]["tokens"].tolist() == lists[3]
        assert part.digest() == wanted.digest() != entry.examples.digest()
        again = part.subset(np.array([1]))
        assert again[0]["tokens"].tolist() == lists[0]
    assert cache.names == [KEY]


def test_columns_without_a_number_in_them(cache: Cache) -> None:
    cache.add(KEY, reading([(), ()]))
    assert tokens(cache.find(KEY)) == [[], []]


def test_nothing_is_found_where_nothing_is(cache: Cache) -> None:
    assert cache.find(KEY) is None
    assert cache.notices == []


def _cut(entry: Path) -> None:
    os.truncate(entry / "tokens.values", 8)


def _lose(entry: Path) -> None:
    (entry / "tokens.ends").unlink()


def _lose_manifest(entry: Path) -> None:
    (entry / "manifest.json").unlink()


def _garble(entry: Path) -> None:
    (entry / "manifest.json").write_text("{")


def _no_object(entry: Path) -> None:
    (entry / "manifest.json").write_text("[]")


def _other_format(entry: Path) -> None:
    manifest = entry / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"format": 1', '"format": 99'))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (_cut, "tokens.values has 8 bytes and had 16"),
        (_lose, "tokens.ends is missing"),
        (_lose_manifest, "manifest.json is missing"),
        (_garble, "cannot be read"),
        (_no_object, "cannot be read"),
        (_other_format, "format 99, not 1"),
        (shutil.rmtree, None),
    ],
)
def test_what_is_damaged_is_made_anew(
    cache: Cache, damage: Callable[[Path], None], says: str | None
) -> None:
    cache.add(KEY, reading())
    damage(cache.folder / KEY)
    assert cache.find(KEY) is None
    assert len(cache.notices) == (0 if says is None else 1)
    assert all(str(says) in notice for notice in cache.notices)
    assert tokens(cache.add(KEY, reading())) == tokens(cache.find(KEY)) == [[1, 2, 3], [], [4]]
    assert cache.names == [KEY]


def test_of_two_that_write_the_same_both_are_right(cache: Cache) -> None:
    inner: list[Entry | None] = []

    def slowly() -> Examples:
        collected = Collector()
        collected.add({"tokens": [1]}, length=1)
        inner.append(Cache(cache.folder).add(KEY, reading([[1], [2]])))
        collected.add({"tokens": [2]}, length=1)
        return collected.done()

    outer = cache.add(KEY, slowly)
    assert tokens(outer) == tokens(inner[0]) == tokens(cache.find(KEY)) == [[1], [2]]
    assert cache.names == [KEY]


def test_what_fails_while_it_is_read_leaves_nothing(cache: Cache) -> None:
    def fail() -> Examples:
        Collector().add({"tokens": [1] * 100_000}, length=1)
        raise ValueError("row 7")

    with pytest.raises(ValueError, match="row 7"):
        cache.add(KEY, fail)
    assert cache.names == []


def test_what_did_not_come_from_its_files_is_not_kept(cache: Cache) -> None:
    assert cache.add(KEY, lambda: reading()().subset(np.array([0]))) is None
    assert cache.names == []


def test_death_while_it_is_written_leaves_nothing_that_counts(cache: Cache) -> None:
    with pytest.raises(EOFError):
        in_another_process(die_while_adding, cache.folder)
    (left,) = cache.names
    assert left.startswith(".writing-")
    assert cache.find(KEY) is None
    cache.add(KEY, reading())
    assert cache.names == [left, KEY], "another may be writing it right now"
    for path in (*(cache.folder / left).iterdir(), cache.folder / left):
        os.utime(path, (0, time.time() - 25 * 3600))
    cache.add("1" * 64, reading())
    assert cache.names == [KEY, "1" * 64]


def test_a_full_disk_leaves_nothing(cache: Cache) -> None:
    assert in_another_process(add_on_a_full_disk, cache.folder) == "OSError"
    assert cache.names == []


# --- what is not used goes -----------------------------------------------------------------------


def test_what_nobody_opened_for_long_goes_with_the_next(cache: Cache) -> None:
    old = time.time() - KEPT_SECONDS - 60
    for digit in "0123":
        cache.add(digit * 64, reading())
    used = {digit: cache.folder / (digit * 64) / "used" for digit in "0123"}
    for digit in "012":
        os.utime(used[digit], (old, old))
    cache.find("1" * 64)  # used a moment ago
    held = cache.find("2" * 64)  # in use since long ago
    os.utime(used["2"], (old, old))
    cache.add("4" * 64, reading())
    assert [name[0] for name in cache.names] == ["1", "2", "3", "4"]
    assert tokens(held) == [[1, 2, 3], [], [4]]
    del held
    cache.add("5" * 64, reading())
    assert [name[0] for name in cache.names] == ["1", "3", "4", "5"]


def test_what_is_mapped_outlives_its_files(cache: Cache) -> None:
    entry = cache.add(KEY, reading())
    shutil.rmtree(cache.folder)
    assert tokens(entry) == [[1, 2, 3], [], [4]]


# --- the key -----------------------------------------------------------------------------------


def key(bert: Path, file: DataFile, **changes: Any) -> str | None:
    return key_of(opened(bert, file, **changes), file)


def key_of(task: Task, file: DataFile) -> str | None:
    return content_key(file.path, file.format, task.loaded.tokenizer, task.cache_key())


def opened(bert: Path, file: DataFile, **changes: Any) -> Task:
    spec = {"task": "text-classification", "model": "m", "data": {"train": "x"}, **changes}
    return open_task(TrainSpec.model_validate(spec), bert, file)


def test_equal_keys_for_what_reads_alike(tmp_path: Path, bert: Path, train_file: Path) -> None:
    file = DataFile(train_file)
    task = opened(bert, file)
    first = key_of(task, file)
    assert first is not None and len(first) == 64
    task.read(file)
    assert key_of(task, file) == first, "a tokenizer that was used is still the same"
    copied = DataFile(shutil.copy(train_file, tmp_path / "copy.jsonl"))
    assert key(bert, copied) == first
    hyperparameters = {"epochs": 9, "seed": 1, "learning_rate": 0.1, "batch_size": 4}
    more = {"name": "x", "priority": 3, "resources": {"devices": 2}}
    assert key(bert, file, hyperparameters=hyperparameters, **more) == first
    data = {"train": "y", "validation_split": 0.1, "format": "jsonl"}
    assert key(bert, file, data=data) == first


def test_other_keys_for_what_reads_otherwise(tmp_path: Path, bert: Path) -> None:
    def written(name: str, rows: list[dict[str, Any]]) -> DataFile:
        return DataFile(write_rows(tmp_path / name, rows))

    rows = [{"text": "a fish", "label": n, "gloss": "a dog"} for n in (0, 1)]
    file = written("rows.jsonl", rows)
    other_model = make_bert(tmp_path / "other")
    tokenizer = other_model / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace('"fish"', '"frog"'))
    keys = [
        key(bert, file),
        key(bert, written("more.jsonl", [*rows, rows[0]])),
        key(bert, written("labels.jsonl", [{**row, "label": row["label"] + 1} for row in rows])),
        key(bert, file, data={"train": "x", "columns": {"text": "gloss"}}),
        key(bert, file, hyperparameters={"max_length": 4}),
        key(bert, file, problem="regression"),
        key(other_model, file),
    ]
    assert None not in keys
    assert len(set(keys)) == len(keys)
    assert key_of(opened(bert, file), DataFile(file.path, "csv")) not in keys


def test_a_tokenizer_without_a_state_of_its_own_goes_by_its_files(
    bert: Path, train_file: Path
) -> None:
    class Slow:
        chat_template = None
        truncation_side = "right"
        special_tokens_map: dict[str, str] = {}  # noqa: RUF012

        def __init__(self, name_or_path: str) -> None:
            self.name_or_path = name_or_path

    first = tokenizer_identity(Slow(str(bert)))  # type: ignore[arg-type]
    assert first is not None
    assert tokenizer_identity(Slow(str(train_file.parent))) not in (first, None)  # type: ignore[arg-type]
    assert tokenizer_identity(Slow("google/bert")) is None  # type: ignore[arg-type]


def test_what_is_said_not_to_be_read_exists() -> None:
    fields = TrainSpec.model_fields
    for name, inner in NOT_READ.items():
        assert name in fields
        if inner is not True:
            nested: Any = fields[name].annotation
            assert set(inner) <= set(nested.model_fields)


# --- whole trainings ---------------------------------------------------------------------------


class Training:
    """Runs trainings over one cache."""

    def __init__(self, folder: Path, bert: Path, train: Path, validation: Path | None) -> None:
        self.folder, self.bert, self.train, self.validation = folder, bert, train, validation
        self.cache = folder / "cache"
        self.runs = 0

    def run(self, *, cached: bool = True, gang: dict[str, Any] | None = None, **more: Any) -> Gang:
        self.runs += 1
        options = {"epochs": 1, "batch_size": 16, "ranks": 2, "validation": self.validation, **more}
        assignment = make_assignment(
            self.folder / f"work-{self.runs}",
            self.bert,
            self.train,
            cache=self.cache if cached else None,
            **options,
        )
        return Gang(assignment, **(gang or {})).run()


@pytest.fixture
def training(tmp_path: Path, bert: Path, train_file: Path, validation_file: Path) -> Training:
    return Training(tmp_path, bert, train_file, validation_file)


def test_a_second_attempt_and_a_second_job_find_it_and_nothing_differs(training: Training) -> None:
    without = training.run(cached=False)
    assert "token cache" not in without.log.read_text()
    first = training.run()
    assert first.log.read_text().count("tokenised into the token cache") == 2
    assert first.weights == without.weights
    assert first.done.summary["metrics"] == without.done.summary["metrics"]
    again = training.run()
    assert again.log.read_text().count("from the token cache") == 2
    assert "tokenised" not in again.log.read_text()
    assert again.weights == without.weights
    other_job = training.run(epochs=2, seed=5, ranks=1)
    assert other_job.log.read_text().count("from the token cache") == 2
    assert len(list((training.cache / "tokens").iterdir())) == 2


def test_a_split_of_the_cache_trains_alike(training: Training) -> None:
    split = {"validation": None, "validation_split": 0.2}
    runs = [training.run(cached=cached, **split) for cached in (False, True, True)]
    assert len({gang.weights for gang in runs}) == 1
    assert "250 examples from the token cache" in runs[2].log.read_text()


def test_damage_is_told_and_mended(training: Training) -> None:
    first = training.run()
    for entry in (training.cache / "tokens").iterdir():
        os.truncate(entry / "tokens.values", 4)
    again = training.run()
    assert {notice.code for notice in again.of(Notice)} == {"token_cache_damaged"}
    assert again.weights == first.weights
    assert training.run().of(Notice) == []


def test_a_cache_that_cannot_be_written_is_done_without(training: Training) -> None:
    training.cache.write_text("a file, no folder")
    gang = training.run()
    assert gang.done
    log = gang.log.read_text()
    assert log.count("tokenised in memory (the token cache cannot be written:") == 2


def test_a_rank_that_does_not_see_the_cache_of_rank_0_makes_its_own(training: Training) -> None:
    elsewhere = training.folder / "elsewhere"
    gang = training.run(gang={"differing": {1: {"cache_dir": str(elsewhere)}}})
    assert gang.weights == training.run(cached=False).weights
    entries = [
        sorted(p.name for p in (c / "tokens").iterdir()) for c in (training.cache, elsewhere)
    ]
    assert entries[0] == entries[1] and len(entries[0]) == 2


def test_ranks_of_which_only_one_is_told_of_a_cache(training: Training) -> None:
    for rank in (0, 1):
        assert training.run(gang={"differing": {rank: {"cache_dir": None}}}).done


def test_a_bad_row_of_validation_ends_all_ranks(training: Training, tmp_path: Path) -> None:
    rows = make_rows(8, seed=3)
    rows[5]["text"] = None
    gang = training.run(validation=write_rows(tmp_path / "v.jsonl", rows))
    assert not gang.of(Done)
    assert gang.failed.failure_class == FailureClass.DATA_ERROR
    assert "v.jsonl, line 6" in gang.failed.message


def write_many(path: Path, count: int) -> Path:
    """Rows of 62 words: 64 tokens, as many as the model takes."""
    draw = random.Random(1)
    with path.open("w") as file:
        for number in range(count):
            words = " ".join(draw.choices(("the", "old", "town", "fish", "of", "river"), k=62))
            file.write(f'{{"text": "{words}", "label": "{"ab"[number % 2]}"}}\n')
    return path


def run_and_watch(gang: Gang) -> int:
    """The most memory that rank 0 had as its own, looked at every few milliseconds, in bytes."""
    most, over = 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not over.wait(0.005):
            most = max(most, gang.own_memory(0))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        gang.run()
    finally:
        over.set()
        watcher.join()
    assert gang.done
    return most


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_data_need_not_fit_into_memory(tmp_path: Path, bert: Path) -> None:
    """60 MB of text, 51 MB of tokens: from the first row to the trained model."""
    few, many = (
        write_many(tmp_path / "few.jsonl", 2000),
        write_many(tmp_path / "many.jsonl", 200_000),
    )
    assert many.stat().st_size > 60_000_000

    def gang(work: str, train: Path, cache: Path | None) -> Gang:
        options = {"max_steps": 5, "batch_size": 16, "validation_split": 0.01}
        return Gang(make_assignment(tmp_path / work, bert, train, cache=cache, **options))

    cache = tmp_path / "cache"
    least = run_and_watch(gang("few", few, tmp_path / "other"))
    first, again = gang("first", many, cache), gang("again", many, cache)
    without = gang("without", many, None)
    grown = {name: run_and_watch(of) - least for name, of in
             {"first": first, "again": again, "without": without}.items()}  # fmt: skip
    assert "200,000 examples tokenised into the token cache" in first.log.read_text()
    assert "200,000 examples from the token cache" in again.log.read_text()
    assert grown["first"] < 25 * MB and grown["again"] < 25 * MB, grown
    assert grown["without"] > 50 * MB, grown
    assert first.weights == again.weights == without.weights
