"""fill-mask: masked language models, after BERT (Devlin et al. 2019, section 3.1)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from shared.formats import DataFile
from shared.specs import TrainSpec
from workers.ranks.loading import LoadError, load_masked_lm
from workers.ranks.train.examples import IGNORED, Batch, Examples, pad_tokens
from workers.ranks.train.failures import DataProblem
from workers.ranks.train.order import Indices, derive
from workers.ranks.train.rows import Collector, read_chunks, tokenise
from workers.ranks.train.tasks.base import Loaded
from workers.ranks.train.tasks.model import text_limit, tokenizer_with_pad
from workers.ranks.train.tasks.prediction import TokenPrediction

_MASKED, _REPLACED = 0.8, 0.1
"""Of the tokens to be guessed: shares that become the mask token, and any other; the rest stay."""


class FillMask(TokenPrediction):
    """Guesses tokens of a text from all others.

    Which ones is a function of the seed and the example's index: other ones in every step, the same
    whatever else is in the batch. Their number, the example's weight, is a function of the text.
    Special tokens, among them the one for unknown words, are never guessed and never put in.
    """

    def __init__(self, loaded: Loaded, spec: TrainSpec) -> None:
        super().__init__(loaded, spec)
        tokenizer = loaded.tokenizer
        self.mask = int(tokenizer.mask_token_id)
        known = np.array(sorted(tokenizer.get_vocab().values()), np.int64)
        self.special = np.zeros(int(known.max()) + 1, np.bool_)
        self.special[list(tokenizer.all_special_ids)] = True
        known = known[~self.special[known]]
        rows = next(loaded.model.get_input_embeddings().parameters()).shape[0]
        self.ordinary = known[known < rows]

    @classmethod
    def open(cls, spec: TrainSpec, model_path: Path, labels: Sequence[str]) -> Self:  # noqa: ARG003
        options = spec.hyperparameters
        model, head, fresh = _load(spec, model_path)
        tokenizer = tokenizer_with_pad(model_path)
        if tokenizer.mask_token_id is None:
            raise LoadError(
                "model_unsuitable",
                f"the tokenizer of '{model_path.name}' has no mask token",
                "Choose a model that was pretrained on masked text (BERT, RoBERTa and kin).",
            )
        limit = text_limit(model, tokenizer, options)
        return cls(Loaded(model, tokenizer, limit, head, fresh=fresh), spec)

    def read(self, file: DataFile) -> Examples:
        collected = Collector()
        for chunk in read_chunks(file, self.spec):
            texts = [placed.example.text for placed in chunk]  # type: ignore[union-attr]
            ids, cut = tokenise(self.loaded.tokenizer, texts, self.loaded.max_length)
            for tokens, was_cut in zip(ids, cut, strict=True):
                candidates = int((~self.special[np.array(tokens, np.int64)]).sum())
                collected.add(
                    {"tokens": tokens},
                    length=len(tokens),
                    weight=self._how_many(candidates),
                    cut=was_cut,
                )
        examples = collected.done()
        if not examples.weights.any():
            raise DataProblem(
                "nothing_to_learn", "no row has a token that can be masked", name=file.name
            )
        return examples

    def batch(self, examples: Examples, indices: Indices | Sequence[int], seed: int) -> Batch:
        inputs, tokens = pad_tokens(examples.ragged["tokens"], indices, self.pad)
        ids = inputs["input_ids"].numpy()
        labels = np.full_like(ids, IGNORED)
        for row, index in enumerate(indices):
            original = examples.ragged["tokens"][int(index)]
            places, shown = self._draw(original, derive(seed, "mask", int(index)))
            labels[row, places] = original[places]
            ids[row, places] = shown
        return Batch(inputs, {"labels": torch.from_numpy(labels)}, tokens)

    @property
    def largest_token(self) -> int:
        return max(self.pad, self.mask)

    def _how_many(self, candidates: int) -> int:
        share = round(self.spec.hyperparameters.mask_probability * candidates)
        return min(candidates, max(1, share))

    def _draw(
        self, tokens: NDArray[np.int32], seed: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The places that are to be guessed, and what stands there instead."""
        draw = np.random.Generator(np.random.Philox(key=seed))
        candidates = np.flatnonzero(~self.special[tokens])
        places = draw.permutation(candidates)[: self._how_many(len(candidates))]
        fate = draw.random(len(places))
        others = self.ordinary[draw.integers(0, len(self.ordinary), len(places))]
        shown = np.where(fate < _MASKED + _REPLACED, others, tokens[places])
        return places, np.where(fate < _MASKED, self.mask, shown)


def _load(spec: TrainSpec, model_path: Path) -> tuple[PreTrainedModel, str, bool]:
    """The model, what its head is, and whether that is new."""
    options = spec.hyperparameters
    try:
        model = load_masked_lm(model_path, dropout=options.dropout)
    except LoadError as problem:
        if problem.code != "model_unsuitable":
            raise
        # An encoder without such a head; what cannot have one is refused again.
        seed = derive(options.seed, "head")
        model = load_masked_lm(
            model_path, dropout=options.dropout, seed=seed, allow_fresh_head=True
        )
        return model, "a new masked-language-model head", True
    return model, "its own masked-language-model head", False
