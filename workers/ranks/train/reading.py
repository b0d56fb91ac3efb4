"""The data of a rank: tokenised once, by rank 0, and found in the cache by all others and later on."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from shared.formats import DataFile
from shared.messages import TrainAssignment
from shared.specs import DataFormat, InstalledDataset
from workers.ranks.train.examples import Examples
from workers.ranks.train.failures import DataProblem
from workers.ranks.train.gang import Gang
from workers.ranks.train.order import Indices
from workers.ranks.train.reports import Reporter
from workers.ranks.train.rows import split
from workers.ranks.train.tasks.base import Task
from workers.ranks.train.token_cache import Entry, TokenCache, content_key

_POLL_SECONDS = 0.1


def training_file(assignment: TrainAssignment) -> DataFile:
    return _file(assignment.train_path, assignment.train_format, assignment.spec.data.train)


def _file(path: str, format: DataFormat, source: str | InstalledDataset | None) -> DataFile:
    dataset = source.dataset if isinstance(source, InstalledDataset) else None
    return DataFile(Path(path), format, dataset)


def read_data(
    assignment: TrainAssignment, task: Task, gang: Gang, reporter: Reporter
) -> tuple[Examples, Examples | None, Indices | None]:
    """(training data, validation data, the rows of the file that are trained on where that is not all).
    Validation data are of a file of their own, split off, or none.

    Raises:
        DataProblem: a file cannot be read, or a row is malformed.
        Stopped: the worker ordered it, or is gone.
    """
    data, seed = assignment.spec.data, assignment.spec.hyperparameters.seed
    cache = None
    if assignment.cache_dir is not None:
        cache = TokenCache(Path(assignment.cache_dir) / "tokens", reporter.notice)
    reader = _Reader(task, cache, gang, reporter)
    training = reader.read(training_file(assignment), "training")
    if assignment.validation_path is not None:
        file = _file(assignment.validation_path, assignment.validation_format, data.validation)
        return training, reader.read(file, "validation"), None
    if data.validation_split is not None:
        kept, held_out = split(training, data.validation_split, seed, by=task.split_by)
        return training.subset(kept), training.subset(held_out), kept
    return training, None, None


@dataclass(frozen=True, slots=True)
class _Reader:
    task: Task
    cache: TokenCache | None
    gang: Gang
    reporter: Reporter

    def read(self, file: DataFile, role: str) -> Examples:
        """A file, from the cache if there is one.

        Rank 0 sees to it that the entry is there before it names it to the others. Who does not find
        it then, on a host with another cache, does the same for itself.
        """
        topic, entry = f"tokens/{role}", None
        if self.cache is None:
            if self.gang.rank == 0:
                self.gang.share(topic, None)
            return self.task.read(file)
        if self.gang.rank != 0:
            # Not by the store's own timeout: tokenising may take hours.
            self.gang.wait_for(topic, lambda: self.reporter.check_orders(wait=_POLL_SECONDS))
            key = self.gang.share(topic, None)
            entry = self.cache.find(key) if key is not None else None
            return entry.examples if entry else self._obtain(self.cache, file)[0]
        examples, key = self._obtain(self.cache, file)
        self.gang.share(topic, key)
        return examples

    def _obtain(self, cache: TokenCache, file: DataFile) -> tuple[Examples, str | None]:
        """The examples, and their key where they are in the cache."""
        began = time.monotonic()
        entry, how = self._from_cache(cache, file)
        examples = entry.examples if entry else self.task.read(file)
        seconds = time.monotonic() - began
        self.reporter.say(f"{file.name}: {len(examples):,} examples {how}, {seconds:.1f} s")
        return examples, entry.key if entry else None

    def _from_cache(self, cache: TokenCache, file: DataFile) -> tuple[Entry | None, str]:
        """(entry, how it came about); None where the cache is of no use here."""
        tokenizer = self.task.loaded.tokenizer
        try:
            key = content_key(file.path, file.format, tokenizer, self.task.cache_key())
        except OSError as error:
            raise DataProblem(
                "data_unreadable", f"cannot be read: {error.strerror}", name=file.name
            ) from error
        if key is None:
            return None, "tokenised in memory (the tokenizer cannot be told from others)"
        if (found := cache.find(key)) is not None:
            return found, f"from the token cache ({key[:12]})"
        try:
            entry = cache.add(key, lambda: self.task.read(file))
        except OSError as error:
            return None, f"tokenised in memory (the token cache cannot be written: {error})"
        if entry is None:
            return None, "tokenised in memory"
        return entry, f"tokenised into the token cache ({key[:12]})"
