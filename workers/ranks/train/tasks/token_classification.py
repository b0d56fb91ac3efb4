"""token-classification: a tag for each word, such as entities (BIO) or parts of speech.

The first token of a word speaks for it: it alone carries the word's tag, in training and when the
model is judged. Words that were cut away count for nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerBase

from shared.formats import DataFile
from shared.specs import TrainSpec
from workers.ranks.loading import LoadError, load_token_classifier, load_tokenizer
from workers.ranks.train.device import Compute
from workers.ranks.train.examples import IGNORED, Batch, Examples, pad_tokens
from workers.ranks.train.order import Indices, derive
from workers.ranks.train.rows import Collector, class_of, read_chunks
from workers.ranks.train.tasks.base import Evaluation, Loaded, Sums
from workers.ranks.train.tasks.entities import count_entities, entity_kinds
from workers.ranks.train.tasks.model import order_labels, text_limit, tokenizer_with_pad
from workers.ranks.train.tasks.prediction import TokenPrediction
from workers.ranks.train.tasks.samples import SAMPLES, tagged
from workers.ranks.train.tasks.scores import Counts, by_label, count, score
from workers.ranks.train.tasks.text2text import choose


class TokenClassification(TokenPrediction):
    """Cross entropy over words. Judged by entity where the tags are BIO, else by tag."""

    better = "higher"

    def __init__(self, loaded: Loaded, spec: TrainSpec) -> None:
        super().__init__(loaded, spec)
        self.kinds = entity_kinds(loaded.labels)
        """Of entities; none where the tags are not BIO."""
        self.best = "f1" if self.kinds else "accuracy"

    @classmethod
    def open(cls, spec: TrainSpec, model_path: Path, labels: Sequence[str]) -> Self:
        options = spec.hyperparameters
        labels = order_labels(outside_first(labels), model_path)
        classifier = load_token_classifier(
            model_path, labels=labels, dropout=options.dropout, seed=derive(options.seed, "head")
        )
        tokenizer = tokenizer_of_words(model_path)
        head = "a new" if classifier.fresh_head else "its own"
        loaded = Loaded(
            model=classifier.model,
            tokenizer=tokenizer,
            max_length=text_limit(classifier.model, tokenizer, options),
            head=f"{head} tagging head for {len(labels)} tags",
            labels=labels,
            fresh=classifier.fresh_head,
        )
        return cls(loaded, spec)

    def read(self, file: DataFile) -> Examples:
        classes = {name: index for index, name in enumerate(self.loaded.labels)}
        collected = Collector()
        for chunk in read_chunks(file, self.spec):
            texts = [placed.example.words for placed in chunk]  # type: ignore[union-attr]
            tokenised = tokenise_words(self.loaded.tokenizer, texts, self.loaded.max_length)
            for placed, (tokens, words, cut) in zip(chunk, tokenised, strict=True):
                tags = [class_of(tag, classes, file, placed.line) for tag in placed.example.labels]
                labels = align(words, tags)
                collected.add(
                    {"tokens": tokens, "labels": labels},
                    length=len(tokens),
                    weight=sum(label != IGNORED for label in labels),
                    cut=cut,
                )
        return collected.done()

    def batch(self, examples: Examples, indices: Indices | Sequence[int], seed: int) -> Batch:  # noqa: ARG002
        inputs, tokens = pad_tokens(examples.ragged["tokens"], indices, self.pad)
        labels = examples.ragged["labels"].padded(indices, IGNORED)
        return Batch(inputs, {"labels": torch.from_numpy(labels)}, tokens)

    @property
    def sums(self) -> int:
        return 3 + 3 * len(self.kinds or self.loaded.labels)

    def measure(self, model: nn.Module, batch: Batch) -> Sums:
        answer: Any = model(**batch.inputs)
        logits, truth = answer.logits.float(), batch.targets["labels"]
        guess, known = logits.argmax(dim=-1), truth != IGNORED
        loss = float(cross_entropy(logits[known], truth[known], reduction="sum"))
        right = float(((guess == truth) & known).sum())
        counts = self._by_entity if self.kinds else self._by_tag
        return np.array([loss, right, float(known.sum()), *counts(truth, guess, known).reshape(-1)])

    def conclude(self, sums: Sums) -> Evaluation:
        words = max(1.0, float(sums[2]))
        scores = score(*sums[3:].reshape(3, -1))
        values = {"loss": float(sums[0]) / words, "accuracy": float(sums[1]) / words}
        if not self.kinds:
            values["macro_f1"] = scores.macro_f1
            return Evaluation(values, {"per_tag": by_label(scores, self.loaded.labels)})
        values["precision"] = scores.micro_precision
        values["recall"] = scores.micro_recall
        values["f1"] = scores.micro_f1
        return Evaluation(values, {"per_entity": by_label(scores, self.kinds)})

    def samples(self, examples: Examples, compute: Compute) -> list[dict[str, Any]]:
        seed, columns = self.spec.hyperparameters.seed, examples.ragged
        chosen = choose(len(examples), SAMPLES, seed)
        batch = self.batch(examples, chosen, seed).to(compute.device)
        answer: Any = self.loaded.model(**batch.inputs)
        guess = answer.logits.argmax(dim=-1).cpu().numpy()
        found = []
        for row, index in enumerate(chosen.tolist()):
            tokens, truth = columns["tokens"][index], columns["labels"][index]
            own = guess[row, : len(tokens)]
            found.append(tagged(self.loaded.tokenizer, tokens, truth, own, self.loaded.labels))
        return found

    def _by_tag(self, truth: torch.Tensor, guess: torch.Tensor, known: torch.Tensor) -> Counts:
        truth, guess, classes = truth[known], guess[known], len(self.loaded.labels)
        hits = guess[guess == truth]
        return np.stack([count(values, classes) for values in (hits, guess, truth)])

    def _by_entity(self, truth: torch.Tensor, guess: torch.Tensor, known: torch.Tensor) -> Counts:
        counts = np.zeros((3, len(self.kinds)), np.float64)
        for row, mask in enumerate(known):
            counts += count_entities(
                self._names(truth[row][mask]), self._names(guess[row][mask]), self.kinds
            )
        return counts

    def _names(self, classes: torch.Tensor) -> list[str]:
        return [self.loaded.labels[index] for index in classes.tolist()]


def outside_first(tags: Iterable[str]) -> tuple[str, ...]:
    """Sorted, ``O`` before all others."""
    return tuple(sorted(tags, key=lambda tag: (tag != "O", tag)))


def tokenizer_of_words(path: Path) -> PreTrainedTokenizerBase:
    """A tokenizer that takes texts as words and says which word a token is of.

    A byte-level one (RoBERTa, GPT-2) knows a word within a text by the space before it, and is told to
    put one before every word. The tokenizer that is delivered does it by itself.

    Raises:
        LoadError: it has no padding token, or none of the ``tokenizers`` library stands behind it.
    """
    tokenizer = tokenizer_with_pad(path)
    if not tokenizer.is_fast:
        raise LoadError(
            "model_unsuitable",
            f"the tokenizer of '{path.name}' ({type(tokenizer).__name__}) cannot say which word a "
            "token is of",
            "Tagging needs a fast tokenizer, one that save_pretrained writes a tokenizer.json for.",
        )
    if not _lacks_prefix_space(tokenizer):
        return tokenizer
    tokenizer = load_tokenizer(path, add_prefix_space=True)
    if _lacks_prefix_space(tokenizer):
        # Transformers 5 keeps the option, but does not apply it to a tokenizer.json that no class
        # of its own makes anew.
        tokenizer.backend_tokenizer.pre_tokenizer.add_prefix_space = True
    return tokenizer


def _lacks_prefix_space(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Not where byte-level comes after other splitters: there each piece would get a space."""
    splitter = tokenizer.backend_tokenizer.pre_tokenizer
    return isinstance(splitter, ByteLevel) and not splitter.add_prefix_space


def tokenise_words(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[Sequence[str]], max_length: int
) -> list[tuple[list[int], list[int | None], bool]]:
    """Of each text: its token ids with special tokens, the word that each is of (None for special
    tokens), and whether it was cut to ``max_length``."""
    words = [list(text) for text in texts]
    options: dict[str, Any] = {"is_split_into_words": True, "verbose": False}
    # Whole first: what a cut leaves does not say whether there was one.
    whole = tokenizer(words, truncation=False, **options)
    found: list[tuple[list[int], list[int | None], bool]] = []
    for index, ids in enumerate(whole["input_ids"]):
        if len(ids) <= max_length:
            found.append((ids, whole.word_ids(index), False))
            continue
        part = tokenizer([words[index]], truncation=True, max_length=max_length, **options)
        found.append((part["input_ids"][0], part.word_ids(0), True))
    return found


def align(words: Sequence[int | None], classes: Sequence[int]) -> list[int]:
    """The class of each token: its word's where it is the first of it, else ``IGNORED``.

    Args:
        words: The word that each token is of; None for special tokens.
        classes: The class of each word.
    """
    labels = []
    before: int | None = None
    for word in words:
        labels.append(IGNORED if word is None or word == before else classes[word])
        before = word
    return labels
