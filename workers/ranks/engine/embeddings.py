"""Embeddings: one vector a text, out of the vectors of its tokens.

How they become one is what a sentence-transformers folder says: ``modules.json`` lists an encoder, a
pooling (its ``config.json`` names the mode) and maybe more.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from shared.errors import UnsupportedModel
from shared.specs import Embedding
from workers.ranks.engine.models import LoadedModel
from workers.ranks.engine.parts import Piece
from workers.ranks.engine.passes import Batch, SortedPasses
from workers.ranks.folders import LoadError, read_json

Pooling = Literal["mean", "cls"]
POOLING_FOLDER = "1_Pooling"
_MODULES = frozenset({"Transformer", "Pooling", "Normalize"})
_DECIMALS = 8
"""More would be noise of float32, and every vector is stored as text."""


class Embeddings(SortedPasses):
    """One vector a text. Pooled in float32 over attended tokens alone, so that padding is not seen. Of a
    text in windows it is the mean of theirs by tokens, made of length 1 at the end."""

    def __init__(self, loaded: LoadedModel, *, options: Embedding) -> None:
        super().__init__(loaded)
        self._pooling = choose_pooling(Path(loaded.key.path), options)
        self.looks_at_first = self._pooling == "cls"
        self._normalize = options.normalize
        self._encoding = options.encoding

    def read(self, batch: Batch) -> list[dict[str, Any] | None]:
        hidden = self.forward(batch).last_hidden_state.float()
        if self._pooling == "cls":
            vectors = hidden[:, 0]
        else:
            # Not a product with the mask: what padding computes need not be finite.
            attended = hidden.masked_fill(batch.mask[..., None] == 0, 0.0)
            vectors = attended.sum(dim=1) / batch.mask.sum(dim=1, keepdim=True)
        whole = self._shown(vectors)
        return [
            found if found is None or prompt.parts is None else {"vector": vector}
            for prompt, found, vector in zip(batch.prompts, whole, vectors.cpu(), strict=True)
        ]

    def unite(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        vectors = torch.stack([piece.output["vector"] for piece in pieces]).double()
        tokens = torch.tensor([len(piece.prompt.ids) for piece in pieces], dtype=torch.float64)
        mean = (vectors * (tokens / tokens.sum())[:, None]).sum(dim=0, keepdim=True)
        [found] = self._shown(mean.float())
        assert found is not None  # noqa: S101  (a mean of what is finite)
        return {**found, "windows": len(pieces)}

    def _shown(self, vectors: torch.Tensor) -> list[dict[str, Any] | None]:
        """The output of each pooled vector [rows, dimensions]."""
        if self._normalize:
            vectors = torch.nn.functional.normalize(vectors, dim=-1)
        finite = vectors.isfinite().all(dim=-1).tolist()
        shown: list[Any]
        if self._encoding == "base64":
            shown = [base64.b64encode(row).decode() for row in vectors.cpu().numpy().astype("<f4")]
        else:
            shown = vectors.double().round(decimals=_DECIMALS).tolist()
        return [
            {"embedding": vector, "dimensions": vectors.shape[-1]} if good else None
            for vector, good in zip(shown, finite, strict=True)
        ]


def choose_pooling(folder: Path, options: Embedding) -> Pooling:
    """How to pool: as asked, else as the folder says, else the mean.

    Raises:
        UnsupportedModel: the folder says something that is not done here.
    """
    if options.pooling != "auto":
        return options.pooling
    where = POOLING_FOLDER
    for module in _modules(folder):
        kind = str(module.get("type", "")).rpartition(".")[2]
        if kind not in _MODULES:
            raise _unsupported(folder, f"has a module '{kind}' behind its encoder")
        if kind == "Pooling":
            where = str(module.get("path") or where)
    if Path(where).name != where:
        raise _unsupported(folder, f"has its pooling in '{where}'")
    try:
        config = read_json(folder / where / "config.json", required=False)
    except LoadError as error:
        raise UnsupportedModel(error.message, param="model", code=error.code) from error
    modes = _modes(config)
    if not modes or modes == {"mean"}:
        return "mean"
    if modes == {"cls"}:
        return "cls"
    raise _unsupported(folder, f"pools by {', '.join(sorted(modes))}")


def _modes(config: dict[str, Any]) -> set[str]:
    """The modes of a pooling's configuration: flags (``pooling_mode_mean_tokens``), lately a name."""
    if isinstance(named := config.get("pooling_mode"), str):
        return {named}
    flags = (name.removeprefix("pooling_mode_") for name, on in config.items() if on is True)
    return {
        flag.removesuffix("_tokens").removesuffix("_token")
        for flag in flags
        if f"pooling_mode_{flag}" in config
    }


def _modules(folder: Path) -> list[dict[str, Any]]:
    """The modules of a sentence-transformers model; none for other folders."""
    try:
        content = json.loads((folder / "modules.json").read_bytes())
    except FileNotFoundError:
        return []
    except (OSError, ValueError):
        content = None
    if not isinstance(content, list) or not all(isinstance(item, dict) for item in content):
        raise UnsupportedModel(
            f"modules.json of '{folder.name}' cannot be read", param="model", code="model_damaged"
        )
    return content


def _unsupported(folder: Path, what: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"model '{folder.name}' {what}: its own embeddings are not made here",
        param="model",
        hint="Set embedding.pooling to mean or cls to get its encoder's vectors all the same.",
    )
