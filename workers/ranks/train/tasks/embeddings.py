"""embeddings: an encoder whose mean vectors are near for texts that belong together."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy, normalize

from shared.examples import Pair
from shared.formats import DataFile
from shared.specs import TrainSpec
from workers.ranks.loading import load_encoder
from workers.ranks.train.device import Compute
from workers.ranks.train.examples import Batch, Examples, Ragged, pad_tokens
from workers.ranks.train.failures import DataProblem
from workers.ranks.train.gang import Gang
from workers.ranks.train.order import Indices, derive
from workers.ranks.train.rows import Collector, read_chunks, tokenise
from workers.ranks.train.tasks.base import Evaluation, Loaded, Task
from workers.ranks.train.tasks.model import UNLIMITED, text_limit, tokenizer_with_pad
from workers.ranks.train.tasks.retrieval import contrastive_loss, retrieval_scores, same_pairs

POOL = 2000
"""Pairs that an evaluation searches at most."""


class Embeddings(Task):
    """Finds the text that belongs to a text among those of the other pairs: InfoNCE (van den Oord et
    al. 2018) with in-batch negatives, from the first text to the second (Henderson et al. 2017), on
    the cosine of mean-pooled vectors (Reimers and Gurevych 2019).

    The other pairs are those of the **micro-batch**: unlike any other task's, the loss depends on how
    a batch is cut. More at once is harder and teaches more. A pair whose texts also belong to another
    one (``same_pairs``) is not held against it; a pair alone, as the rest of an epoch may be, teaches
    nothing.

    Evaluation searches all of the validation pairs, at most ``POOL``, which a fixed seed chooses; its
    loss is over that pool, so larger than the training loss of an equally good model.
    """

    best = "recall_at_1"

    @classmethod
    def open(cls, spec: TrainSpec, model_path: Path, labels: Sequence[str]) -> Self:  # noqa: ARG003
        options = spec.hyperparameters
        model = load_encoder(model_path, dtype=torch.float32, dropout=options.dropout)
        tokenizer = tokenizer_with_pad(model_path)
        limit = text_limit(model, tokenizer, options)
        return cls(Loaded(model, tokenizer, limit, "the mean of its token vectors"), spec)

    def read(self, file: DataFile) -> Examples:
        collected = Collector()
        rows = 0
        for chunk in read_chunks(file, self.spec):
            pairs = [placed.example for placed in chunk if isinstance(placed.example, Pair)]
            rows += len(pairs)
            tokenizer, limit = self.loaded.tokenizer, self.loaded.max_length
            texts, texts_cut = tokenise(tokenizer, [pair.text for pair in pairs], limit)
            others, others_cut = tokenise(tokenizer, [pair.other for pair in pairs], limit)
            for text, other, *cut in zip(texts, others, texts_cut, others_cut, strict=True):
                collected.add(
                    {"tokens": text, "other_tokens": other},
                    length=max(len(text), len(other)),
                    cut=any(cut),
                )
        if rows < 2:
            raise DataProblem(
                "too_few_rows",
                "the file has one pair: there is no other to tell it from",
                name=file.name,
                hint="Give more pairs.",
            )
        return collected.done()

    def batch(self, examples: Examples, indices: Indices | Sequence[int], seed: int) -> Batch:  # noqa: ARG002
        """``inputs`` hold the first texts and below them the second ones: one pass of the model."""
        chosen = np.asarray(indices, np.int64)
        texts, others = _texts(examples, chosen)
        both = Ragged.of([*texts, *others])
        inputs, tokens = pad_tokens(both, range(len(both)), self.pad)
        same = same_pairs(*map(_as_bytes, (texts, others)))
        return Batch(inputs, {"same": torch.from_numpy(same)}, tokens)

    def loss(self, model: nn.Module, batch: Batch, compute: Compute) -> torch.Tensor:
        with compute.autocast():
            hidden = _hidden(model, batch)
        first, second = mean_vectors(hidden, batch.inputs["attention_mask"]).chunk(2)
        similarity = first @ second.T / self.spec.hyperparameters.contrastive_temperature
        own = torch.eye(len(similarity), dtype=torch.bool, device=similarity.device)
        similarity = similarity.masked_fill(batch.targets["same"] & ~own, -torch.inf)
        truth = torch.arange(len(similarity), device=similarity.device)
        return cross_entropy(similarity, truth, reduction="sum")

    def evaluate(
        self,
        model: nn.Module,
        examples: Examples,
        *,
        batch_size: int,
        compute: Compute,
        gang: Gang,
    ) -> Evaluation:
        """Each rank embeds its part of the pool, all gather, and each searches all of it."""
        seed = derive(self.spec.hyperparameters.seed, "pool")
        draw = np.random.Generator(np.random.Philox(key=seed))
        pool = np.sort(draw.permutation(len(examples))[:POOL])
        by_length = np.argsort(-examples.lengths[pool], kind="stable")
        starts = range(0, len(pool), batch_size)
        vectors = np.zeros((2, len(pool), self._width), np.float64)
        model.eval()
        with torch.inference_mode():
            for start, counts in gang.deal(starts):
                places = by_length[start : start + batch_size]
                batch = self.batch(examples, pool[places], seed).to(compute.device)
                with compute.autocast():
                    hidden = _hidden(model, batch)
                pooled = mean_vectors(hidden, batch.inputs["attention_mask"])
                if counts:
                    vectors[:, places] = pooled.double().cpu().numpy().reshape(2, len(places), -1)
        model.train()
        first, second = np.array(gang.sum(vectors.ravel().tolist())).reshape(vectors.shape)
        similarity = first @ second.T
        same = same_pairs(*map(_as_bytes, _texts(examples, pool)))
        temperature = self.spec.hyperparameters.contrastive_temperature
        loss = contrastive_loss(similarity, same, temperature)
        values = {"loss": loss, **retrieval_scores(similarity, same)}
        return Evaluation(values, {"searched_pairs": len(pool)})

    def finish(self, folder: Path) -> None:
        """Say how the vectors are pooled, as Sentence Transformers reads it."""
        modules = [("", "Transformer"), ("1_Pooling", "Pooling")]
        described: list[dict[str, Any]] = [
            {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for i, (path, kind) in enumerate(modules)
        ]
        _write(folder / "modules.json", described)
        kinds = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens")
        modes = {f"pooling_mode_{kind}": kind == "mean_tokens" for kind in kinds}
        (folder / "1_Pooling").mkdir()
        pooling = {"word_embedding_dimension": self._width, **modes}
        _write(folder / "1_Pooling" / "config.json", pooling)
        if self.loaded.max_length < UNLIMITED:
            limit = {"max_seq_length": self.loaded.max_length, "do_lower_case": False}
            _write(folder / "sentence_bert_config.json", limit)

    @property
    def _width(self) -> int:
        return int(self.loaded.model.config.hidden_size)


def mean_vectors(hidden: torch.Tensor, attention: torch.Tensor) -> torch.Tensor:
    """The mean over the attended tokens, of length 1, in fp32: [texts, hidden] from [texts, tokens,
    hidden] and [texts, tokens]."""
    mask = attention.unsqueeze(-1).float()
    return normalize((hidden.float() * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1.0), dim=-1)


def _hidden(model: nn.Module, batch: Batch) -> torch.Tensor:
    answer: Any = model(**batch.inputs)
    hidden: torch.Tensor = answer.last_hidden_state
    return hidden


def _texts(examples: Examples, chosen: Indices) -> tuple[list[Any], list[Any]]:
    """The token ids of both sides."""
    sides = (examples.ragged["tokens"], examples.ragged["other_tokens"])
    texts, others = ([side[int(index)] for index in chosen] for side in sides)
    return texts, others


def _as_bytes(texts: Sequence[Any]) -> list[bytes]:
    return [text.tobytes() for text in texts]


def _write(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
