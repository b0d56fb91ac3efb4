"""Encoder-decoders: sources are read once, then all rows decode in lockstep.

Rows that begin together are always at the same step, so the model's own cache holds them without
padding of the decoder; sources are padded under the encoder's mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import BaseModelOutput

from shared.errors import UnsupportedModel
from workers.ranks.engine.padding import close, pad_rows, pad_token, sample_rows


@dataclass(frozen=True, slots=True)
class CacheCost:
    """Memory of a row in bytes, and whether rows may share a pass."""

    per_source_token: int
    per_generated_token: int
    batches: bool
    slots: bool = False
    """They may be at different places of their texts."""

    def of(self, rows: int, source: int, generated: int) -> int:
        """Of ``rows`` rows padded to ``source`` tokens that write up to ``generated`` tokens."""
        return rows * (source * self.per_source_token + generated * self.per_generated_token)


class LockstepDecoder:
    """Forward passes over the rows of one group: :meth:`encode` its sources, in any number of passes,
    then :meth:`decode` a token for every row, again and again; :meth:`keep` lets finished rows go."""

    def __init__(self, model: PreTrainedModel, pad: int) -> None:
        self._model = model
        self._pad = pad
        self._encoded: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._hidden: torch.Tensor | None = None
        self._mask: torch.Tensor | None = None
        self._cache: Any = None

    def encode(self, sources: Sequence[Sequence[int]]) -> None:
        """Read some sources; their rows come behind those of earlier calls."""
        ids, mask = pad_rows(sources, self._pad, self._model.device)
        encoder: Any = self._model.get_encoder()
        hidden = encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        self._encoded.append((hidden, mask))

    def decode(self, tokens: Sequence[int]) -> torch.Tensor:
        """Logits [rows, vocabulary] behind one more token for each row."""
        if self._encoded:
            self._hidden, self._mask = _joined(self._encoded)
            self._encoded = []
        output: Any = self._model(
            encoder_outputs=BaseModelOutput(last_hidden_state=self._hidden),
            attention_mask=self._mask,
            decoder_input_ids=torch.tensor(tokens, device=self._model.device)[:, None],
            past_key_values=self._cache,
            use_cache=True,
        )
        self._cache = output.past_key_values
        logits: torch.Tensor = output.logits
        return logits[:, -1]

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows alone, in this order."""
        assert self._hidden is not None and self._mask is not None  # noqa: S101
        chosen = torch.tensor(rows, device=self._model.device)
        self._hidden, self._mask = self._hidden[chosen], self._mask[chosen]
        self._cache.batch_select_indices(chosen)

    def reset(self) -> None:
        """Forget all rows and give their memory back."""
        self._encoded, self._hidden, self._mask, self._cache = [], None, None, None

    def cost(self) -> tuple[int, int]:
        """Bytes per source token and per generated token of a row, after the first :meth:`decode`."""
        assert self._hidden is not None  # noqa: S101
        cross = _bytes_per_position(self._cache.cross_attention_cache)
        hidden = self._hidden.shape[-1] * self._hidden.element_size()
        return cross + hidden, _bytes_per_position(self._cache.self_attention_cache)


def decoder_start(model: PreTrainedModel) -> int:
    """The token that every output begins behind.

    Raises:
        UnsupportedModel: the model names none.
    """
    for config in (model.generation_config, model.config):
        for name in ("decoder_start_token_id", "bos_token_id"):
            if isinstance(token := getattr(config, name, None), int):
                return token
    raise UnsupportedModel(
        f"a model of type '{model.config.model_type}' names no token that its outputs begin with",
        param="model",
        hint="Set decoder_start_token_id in its generation_config.json.",
    )


@torch.inference_mode()
def measure_decoder(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> CacheCost:
    """What the rows' caches will take; whether padded sources give what they give alone.

    Raises:
        UnsupportedModel: the model cannot be decoded step by step.
    """
    start, pad = decoder_start(model), pad_token(model, tokenizer)
    rows = sample_rows(tokenizer)
    sources = rows or [tokenizer("one")["input_ids"]]
    alone: list[torch.Tensor] = []
    per_source_token = per_generated_token = 0
    for source in sources:
        decoder = LockstepDecoder(model, pad)
        try:
            alone.append(_two_steps(decoder, [source], start)[0])
            per_source_token, per_generated_token = decoder.cost()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise UnsupportedModel(
                f"a model of type '{model.config.model_type}' cannot be decoded token by token: "
                f"{type(error).__name__}: {str(error)[:200]}",
                param="model",
                hint="T5, BART and kin can.",
            ) from error
    batches = rows is not None
    if batches:
        together = _two_steps(LockstepDecoder(model, pad), sources, start)
        batches = all(close(together[i], one, model.dtype) for i, one in enumerate(alone))
    return CacheCost(per_source_token, per_generated_token, batches)


def _two_steps(
    decoder: LockstepDecoder, sources: Sequence[Sequence[int]], start: int
) -> torch.Tensor:
    """Logits [rows, vocabulary] of the second step, which is the first to read the whole cache."""
    decoder.encode(sources)
    decoder.decode([start] * len(sources))
    return decoder.decode([start] * len(sources))


def _joined(parts: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states and masks of several passes as those of one, padded to the widest."""
    if len(parts) == 1:
        return parts[0]
    width = max(mask.shape[1] for _, mask in parts)
    pad = torch.nn.functional.pad
    return (
        torch.cat([pad(hidden, (0, 0, 0, width - hidden.shape[1])) for hidden, _ in parts]),
        torch.cat([pad(mask, (0, width - mask.shape[1])) for _, mask in parts]),
    )


def _bytes_per_position(cache: Any) -> int:
    """Of one row, over all layers."""
    tensors = [t for layer in cache.layers for t in (layer.keys, layer.values)]
    return sum(t.shape[1] * t.shape[3] * t.element_size() for t in tensors)
