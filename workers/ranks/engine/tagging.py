"""Token classification: a tag for each word, and the entities that tags make together."""

from __future__ import annotations

import math
from typing import Any

from workers.ranks.engine.classification import label_names
from workers.ranks.engine.entities import find_entities, has_prefixes
from workers.ranks.engine.models import LoadedModel
from workers.ranks.engine.passes import Batch, SortedPasses
from workers.ranks.engine.prompts import Prompt


class Tagging(SortedPasses):
    """The first token of a word decides its tag, as in training."""

    def __init__(self, loaded: LoadedModel) -> None:
        super().__init__(loaded)
        self._labels = label_names(loaded)
        self._prefixed = has_prefixes(self._labels)

    def read(self, batch: Batch) -> list[dict[str, Any] | None]:
        best = self.forward(batch).logits.float().softmax(dim=-1).max(dim=-1)
        rows = zip(batch.prompts, best.values.tolist(), best.indices.tolist(), strict=True)
        return [self._output(prompt, scores, classes) for prompt, scores, classes in rows]

    def _output(
        self, prompt: Prompt, scores: list[float], classes: list[int]
    ) -> dict[str, Any] | None:
        if not all(map(math.isfinite, scores[: len(prompt.ids)])):
            return None
        firsts = [word.token for word in prompt.words]
        tags = [None if at is None else self._labels[classes[at]] for at in firsts]
        chances = [None if at is None else scores[at] for at in firsts]
        entities = []
        for entity in find_entities(tags, chances, prefixed=self._prefixed):
            start, end = prompt.words[entity.first].start, prompt.words[entity.last].end
            piece = prompt.source[start:end]
            entities.append(
                {
                    "label": entity.label,
                    "score": entity.score,
                    "start": start,
                    "end": end,
                    "text": piece if isinstance(piece, str) else " ".join(piece),
                }
            )
        if isinstance(prompt.source, str):
            return {"entities": entities}
        return {"tags": tags, "scores": chances, "entities": entities}
