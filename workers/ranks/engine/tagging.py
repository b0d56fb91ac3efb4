"""Token classification: a tag for each word, and the entities that tags make together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from workers.ranks.engine.classification import label_names
from workers.ranks.engine.entities import OUTSIDE, Entity, find_entities, has_prefixes
from workers.ranks.engine.models import LoadedModel
from workers.ranks.engine.parts import Piece
from workers.ranks.engine.passes import Batch, SortedPasses
from workers.ranks.engine.prompts import Prompt, Word

Told = tuple[str, float] | tuple[None, None]
"""The tag of a word and its probability; of a word without tokens, nothing."""


class Tagging(SortedPasses):
    """A tag a word, by the tokens that ``aggregation`` names; by the first, as in training, unless
    something else is asked for. ``average`` and ``max`` are those of Transformers' pipeline."""

    def __init__(self, loaded: LoadedModel, *, aggregation: str = "first") -> None:
        super().__init__(loaded)
        self._labels = label_names(loaded)
        self._prefixed = has_prefixes(self._labels)
        self._aggregation = aggregation

    def read(self, batch: Batch) -> list[dict[str, Any] | None]:
        chances = self.forward(batch).logits.float().softmax(dim=-1).cpu().numpy()
        rows = zip(batch.prompts, chances, strict=True)
        return [self._output(prompt, row[: len(prompt.ids)]) for prompt, row in rows]

    def _output(self, prompt: Prompt, chances: NDArray[np.float32]) -> dict[str, Any] | None:
        if not np.isfinite(chances).all():
            return None
        told = [self._tag(word, chances) for word in prompt.words]
        if prompt.parts is not None:
            return {"told": told}
        return self._whole(prompt.source, prompt.words, told)

    def unite(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        words = [word for piece in pieces for word in piece.prompt.words]
        told = [each for piece in pieces for each in piece.output["told"]]
        whole = self._whole(pieces[0].prompt.source, words, told)
        return {**whole, "windows": len(pieces)}

    def _whole(
        self, source: str | tuple[str, ...], words: Sequence[Word], told: Sequence[Told]
    ) -> dict[str, Any]:
        tags, scores = [tag for tag, _ in told], [score for _, score in told]
        entities = []
        for entity in self._entities(tags, scores):
            start, end = words[entity.first].start, words[entity.last].end
            piece = source[start:end]
            entities.append(
                {
                    "label": entity.label,
                    "score": entity.score,
                    "start": start,
                    "end": end,
                    "text": piece if isinstance(piece, str) else " ".join(piece),
                }
            )
        if isinstance(source, str):
            return {"entities": entities}
        return {"tags": tags, "scores": scores, "entities": entities}

    def _tag(self, word: Word, chances: NDArray[np.float32]) -> Told:
        """Of a word, out of the probabilities [tokens, labels] of its row."""
        if word.token is None:
            return None, None
        last = word.token if word.last is None else word.last
        tokens = chances[word.token : last + 1]
        if self._aggregation == "average":
            of_word = tokens.mean(axis=0)
        elif self._aggregation == "max":
            of_word = tokens[tokens.max(axis=1).argmax()]
        else:
            of_word = tokens[0]
        best = int(of_word.argmax())
        return self._labels[best], float(of_word[best])

    def _entities(self, tags: Sequence[str | None], scores: Sequence[float | None]) -> list[Entity]:
        if self._aggregation != "none":
            return find_entities(tags, scores, prefixed=self._prefixed)
        told = zip(tags, scores, strict=True)
        return [
            Entity(tag, score, at, at)
            for at, (tag, score) in enumerate(told)
            if tag is not None and score is not None and tag != OUTSIDE
        ]
