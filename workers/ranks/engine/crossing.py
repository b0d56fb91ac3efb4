"""Encoder-decoders over slots: a source is read once, and its row decodes among rows at other places.

The keys and values that a decoder's cross-attention makes of a source are computed when it is read and lie in
its row's slot, beside those of what the row has written. So a decoding pass needs nothing of the encoder,
and rows may come and go between any two passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from workers.ranks.engine.dense import DenseStates
from workers.ranks.engine.lockstep import CacheCost, decoder_start
from workers.ranks.engine.padding import close, pad_rows, pad_token, sample_rows
from workers.ranks.engine.positions import Positions

_CROSS_ATTENTION = frozenset({"EncDecAttention", "encoder_attn"})
"""What T5 and kin, and BART and kin, call a decoder layer's attention to the source."""
_PROBED_TOKENS = 4


class WrittenCache(DynamicCache):
    """What the rows have written, as the decoder's self-attention knows it."""

    def __init__(self, states: DenseStates) -> None:
        super().__init__()
        self._states = states
        self._positions = torch.zeros(0, dtype=torch.long)
        self._visible = 0

    def begin(self, positions: torch.Tensor, visible: int) -> None:
        """The next pass computes one token for the slots from 0 on, row ``i`` at ``positions[i]``;
        ``visible`` is the largest position plus one."""
        self._positions, self._visible = positions, visible

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: Any,  # noqa: ARG002  (the signature of Transformers' caches)
        **kwargs: Any,  # noqa: ARG002
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store new keys and values [rows, heads, 1, size]; return all visible ones."""
        self._states.put(layer_idx, self._positions, key_states, value_states)
        return self._states.view(layer_idx, len(self._positions), self._visible)

    def get_seq_length(self, layer_idx: int = 0) -> int:  # noqa: ARG002
        """Always 0: positions are given with every pass."""
        return 0


class CrossRunner:
    """Passes over rows in slots ``0 .. n-1`` of one encoder-decoder.

    Raises:
        ValueError: the model is of a family whose parts are not known here.
    """

    def __init__(self, model: PreTrainedModel, pad: int, target_positions: int) -> None:
        self._model = model
        self._pad = pad
        self._encoder: Any = model.get_encoder()
        decoder: Any = model.get_decoder()  # type: ignore[no-untyped-call]
        self._crossing: list[Any] = [
            module
            for name, module in decoder.named_modules()
            if name.rpartition(".")[2] in _CROSS_ATTENTION
        ]
        if not self._crossing:
            raise ValueError("the decoder's attention to the source is not known")
        self._size = int(model.config.get_text_config().hidden_size)
        self._positions = Positions(decoder, self._begin_decoding, target_positions)
        self.reset()

    def reset(self) -> None:
        """Forget all rows and give their memory back."""
        self._read, self._written = DenseStates(), DenseStates()
        self._lengths: list[int] = []
        """Tokens of the source in each slot."""
        self._own = WrittenCache(self._written)
        self._cross = DynamicCache()
        self._cache = EncoderDecoderCache(self._own, self._cross)
        self._cache.is_updated = dict.fromkeys(range(len(self._crossing)), True)

    @property
    def slots(self) -> int:
        """How many rows there is room for now."""
        return self._read.slots

    @property
    def bytes_per_source_token(self) -> int:
        """Of one row, once a source was read."""
        return self._read.bytes_per_position

    @property
    def bytes_per_written_token(self) -> int:
        """Of one row, once something was written."""
        return self._written.bytes_per_position

    @property
    def capacity(self) -> tuple[int, int]:
        """Tokens of a source, and written ones, that each slot has room for."""
        return self._read.capacity, self._written.capacity

    @property
    def bytes(self) -> int:
        """Memory that the slots take."""
        return self._read.bytes + self._written.bytes

    def resize(self, slots: int, source: int, written: int) -> None:
        """Have room for just so many rows with so many tokens. What was there beyond is gone."""
        self._read.resize(slots, source)
        self._written.resize(slots, written)

    def encode(self, first: int, sources: Sequence[Sequence[int]], slots: int = 0) -> None:
        """Read sources into the slots from ``first`` on; may run out of memory.

        Args:
            slots: make room for so many rows, if they have to be more than there are.
        """
        ids, mask = pad_rows(sources, self._pad, self._device)
        alike = len({len(source) for source in sources}) == 1
        states = self._encoder(input_ids=ids, attention_mask=None if alike else mask)
        hidden = states.last_hidden_state
        self._read.reserve(max(slots, first + len(sources)), ids.shape[1])
        for layer, attention in enumerate(self._crossing):
            self._read.write(layer, first, *_keys_and_values(attention, hidden))
        self._lengths[first:] = [len(source) for source in sources]

    def decode(self, tokens: Sequence[int], positions: Sequence[int]) -> torch.Tensor:
        """One token for each of the slots from 0 on, row ``i`` at ``positions[i]``; logits [rows,
        vocabulary]."""
        rows, written, read = len(tokens), max(positions) + 1, max(self._lengths)
        self._written.reserve(self.slots, written)
        at = torch.tensor(positions, device=self._device)
        lengths = torch.tensor(self._lengths, device=self._device)
        self._own.begin(at, written)
        views = (self._read.view(layer, rows, read) for layer in range(len(self._crossing)))
        # All that is asked of a layer that says it is up to date.
        layers: list[Any] = [SimpleNamespace(keys=keys, values=values) for keys, values in views]
        self._cross.layers = layers
        with self._positions.at(at):
            output: Any = self._model(
                encoder_outputs=self._no_source(rows),
                attention_mask=self._mask(lengths, read),
                decoder_input_ids=torch.tensor(tokens, device=self._device)[:, None],
                decoder_attention_mask=self._mask(at + 1, written),
                past_key_values=self._cache,
                use_cache=True,
            )
        logits: torch.Tensor = output.logits
        return logits[:, -1]

    def move(self, source: int, target: int, written: int) -> None:
        """Put the row of the last slot, ``source``, into slot ``target``; it has written so many tokens."""
        self._read.move(source, target, self._lengths[source])
        self._written.move(source, target, written)
        self._lengths[target] = self._lengths[source]

    def drop_last(self) -> None:
        """The row of the last slot is over."""
        self._lengths.pop()

    @property
    def _device(self) -> torch.device:
        return self._model.device

    def _mask(self, lengths: torch.Tensor, width: int) -> torch.Tensor:
        """What is added to attention, [rows, 1, 1, width], so that each row sees its first ``lengths``."""
        unseen = torch.arange(width, device=self._device) >= lengths[:, None]
        mask = torch.zeros(unseen.shape, dtype=self._model.dtype, device=self._device)
        return mask.masked_fill_(unseen, torch.finfo(mask.dtype).min)[:, None, None]

    def _no_source(self, rows: int) -> BaseModelOutput:
        """In place of the encoder's output, which is not looked at any more."""
        nothing = torch.zeros(1, 1, 1, dtype=self._model.dtype, device=self._device)
        return BaseModelOutput(last_hidden_state=nothing.expand(rows, 1, self._size))

    def _begin_decoding(self, tokens: int) -> None:
        # Not of padding: some families give that no position.
        token = 1 if self._pad != 1 else 2
        ids = torch.full((1, tokens), token, device=self._device)
        self._model(encoder_outputs=self._no_source(1), decoder_input_ids=ids, use_cache=False)


def _keys_and_values(attention: Any, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each [rows, heads, width, size], of what the encoder made [rows, width, hidden]."""
    if hasattr(attention, "k_proj"):
        keys, values, size = attention.k_proj, attention.v_proj, attention.head_dim
    else:
        keys, values, size = attention.k, attention.v, attention.key_value_proj_dim
    rows, width, _ = hidden.shape
    shape = (rows, width, -1, size)
    return (
        keys(hidden).view(shape).transpose(1, 2),
        values(hidden).view(shape).transpose(1, 2),
    )


def target_positions(model: PreTrainedModel) -> int | None:
    """Tokens that the decoder can write; more is cut there, as if it had been asked for. None: no limit."""
    config = model.config.get_text_config()
    for name in ("max_decoder_position_embeddings", "max_position_embeddings"):
        if isinstance(positions := getattr(config, name, None), int):
            return positions
    return None


@torch.inference_mode()
def measure_crossing(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> CacheCost | None:
    """What rows in slots will take, if the model can decode over slots; None if it cannot.

    Two sources of different length are read together, one in two slots, and decoded from different steps on,
    with a row that is moved on the way; any difference from plain passes over each alone rules slots out.
    """
    sources = sample_rows(tokenizer)
    if sources is None:
        return None
    start = decoder_start(model)
    written = [[start, *range(4 + i, 4 + i + _PROBED_TOKENS)] for i in range(2)]
    try:
        runner = CrossRunner(model, pad_token(model, tokenizer), target_positions(model) or 1)
        ours = _probe(runner, sources, written)
        plain: list[torch.Tensor] = [
            model(
                input_ids=torch.tensor([source], device=model.device),
                decoder_input_ids=torch.tensor([tokens], device=model.device),
                use_cache=False,
            ).logits[0]
            for source, tokens in zip(sources, written, strict=True)
        ]
    except torch.OutOfMemoryError:
        raise
    except Exception:  # whatever a model of any architecture does with what it does not expect
        return None
    pairs = [
        (ours[row][step], plain[row][step]) for row in range(2) for step in range(len(ours[row]))
    ]
    if not all(close(one, other, model.dtype) for one, other in pairs):
        return None
    return CacheCost(
        runner.bytes_per_source_token, runner.bytes_per_written_token, batches=True, slots=True
    )


def _probe(
    runner: CrossRunner, sources: Sequence[Sequence[int]], written: Sequence[Sequence[int]]
) -> list[list[torch.Tensor]]:
    """Logits of each step of two rows, of which the second begins two steps after the first."""
    first, second = written
    found: list[list[torch.Tensor]] = [[], []]
    # The first row begins in slot 1, behind one that is gone when it has written two tokens.
    runner.encode(0, [sources[1], sources[0]])
    for step in range(2):
        found[0].append(runner.decode([second[step], first[step]], [step, step])[1])
    runner.move(1, 0, 2)
    runner.drop_last()
    runner.encode(1, [sources[1]])
    for step in range(2, len(first)):
        both = runner.decode([first[step], second[step - 2]], [step, step - 2])
        found[0].append(both[0])
        found[1].append(both[1])
    return found
