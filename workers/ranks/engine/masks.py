"""Filling masks: the likeliest tokens for each mask of a text, and the text with the best of them."""

from __future__ import annotations

import math
import re
from typing import Any

from transformers import PreTrainedTokenizerBase

from shared.specs import InferSpec
from workers.ranks.engine.head import only_at
from workers.ranks.engine.inputs import Request, RowProblem
from workers.ranks.engine.models import LoadedModel
from workers.ranks.engine.passes import Batch, SortedPasses
from workers.ranks.engine.prompts import Prompt, PromptEncoder

LITERALS = ("[MASK]", "<mask>")
"""Taken for the mask whatever the model's own looks like: one file then serves every model."""


class MaskEncoder(PromptEncoder):
    """Prompts that hold masks; ``source`` is the text with the model's own mask token."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, spec: InferSpec, context: int) -> None:
        super().__init__(tokenizer, spec, context)
        self._mask = str(tokenizer.mask_token)
        self._mask_id = tokenizer.mask_token_id
        names = sorted({*LITERALS, self._mask}, key=len, reverse=True)
        self._any = re.compile("|".join(map(re.escape, names)))

    def _prepare(self, text: str) -> str:
        if not self._any.search(text):
            raise RowProblem(
                "no_mask", f"the text has no mask: write {self._mask} where a token is wanted"
            )
        return self._any.sub(lambda _: self._mask, text)

    def _prompt(self, request: Request, text: str, ids: list[int]) -> Prompt:
        if self._mask_id not in ids:
            raise RowProblem("no_mask", "every mask of the text was cut away: it is too long")
        return Prompt(request.row, request.id, tuple(ids), text)


class MaskFilling(SortedPasses):
    """The ``top_k`` likeliest tokens for each mask. Each is chosen by itself, the others masked."""

    def __init__(self, loaded: LoadedModel, *, top_k: int) -> None:
        super().__init__(loaded)
        self._tokenizer = loaded.tokenizer
        self._top_k = top_k
        self._filler = Filler(loaded.tokenizer)

    def read(self, batch: Batch) -> list[dict[str, Any] | None]:
        rows, columns = (batch.ids == self._tokenizer.mask_token_id).nonzero(as_tuple=True)
        # The logits of a whole batch over the vocabulary would take gigabytes.
        with only_at(self._model, rows, columns, batch.ids.shape) as narrowed:
            logits = self.forward(batch).logits
        at_masks = logits[:, 0] if narrowed() else logits[rows, columns]
        chances = at_masks.float().softmax(dim=-1)
        best = chances.topk(min(self._top_k, chances.shape[-1]), dim=-1)
        found: list[list[list[tuple[int, float]]]] = [[] for _ in batch.prompts]
        for row, tokens, scores in zip(
            rows.tolist(), best.indices.tolist(), best.values.tolist(), strict=True
        ):
            found[row].append(list(zip(tokens, scores, strict=True)))
        return [self._output(p, m) for p, m in zip(batch.prompts, found, strict=True)]

    def _output(
        self, prompt: Prompt, masks: list[list[tuple[int, float]]]
    ) -> dict[str, Any] | None:
        if not all(math.isfinite(score) for mask in masks for _, score in mask):
            return None
        assert isinstance(prompt.source, str)  # noqa: S101  (as MaskEncoder made it)
        parts = prompt.source.split(self._filler.mask)
        # What was cut away has no tokens and stays a mask.
        cut = len(parts) - 1 - len(masks)
        shown: list[dict[str, Any] | None] = [
            {"tokens": [{"token": self._filler.text(t), "score": s} for t, s in mask]}
            for mask in masks
        ]
        fills = [mask[0][0] for mask in masks]
        return {"masks": shown + [None] * cut, "text": self._filler.fill(parts, fills)}


class Filler:
    """Writes tokens into a text as their tokenizer would."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self.mask = str(tokenizer.mask_token)
        added = tokenizer.added_tokens_decoder.get(tokenizer.mask_token_id)
        self._takes_space = added is not None and added.lstrip

    def text(self, token: int) -> str:
        """A token as the tokenizer writes it: a space at its beginning is part of it."""
        text = self._tokenizer.decode([token], clean_up_tokenization_spaces=False)
        assert isinstance(text, str)  # noqa: S101  (one sequence in, one string out)
        return text

    def fill(self, parts: list[str], tokens: list[int]) -> str:
        """The text between masks joined by tokens, and by masks where there are no more tokens."""
        whole = parts[0]
        for i, part in enumerate(parts[1:]):
            whole = self._join(whole, tokens[i]) if i < len(tokens) else whole + self.mask
            whole += part
        return whole

    def _join(self, before: str, token: int) -> str:
        piece = self._tokenizer.convert_ids_to_tokens(token)
        text = self.text(token)
        if isinstance(piece, str) and piece.startswith("##"):
            return before.rstrip() + text.removeprefix("##")
        if isinstance(piece, str) and piece.startswith(("Ġ", "▁")):
            space = " " if before and not before[-1].isspace() else ""
            return before + space + text.lstrip()
        if self._takes_space:
            # The mask stood for the space before it as well, and this token has none.
            return before.rstrip() + text
        return before + text
