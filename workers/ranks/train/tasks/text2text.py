"""text2text and summarization: an encoder-decoder learns to write one text for another (T5, BART).

Trained with the right words so far in front of it (teacher forcing). Judged by the loss that way, and
by what it writes on its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from shared.examples import Pair
from shared.formats import DataFile
from shared.specs import TrainSpec
from workers.ranks.loading import LoadError, load_seq2seq
from workers.ranks.train.device import Compute
from workers.ranks.train.examples import IGNORED, Batch, Examples, pad_tokens
from workers.ranks.train.gang import Gang
from workers.ranks.train.order import Indices, derive
from workers.ranks.train.rows import Collector, read_chunks, tokenise
from workers.ranks.train.tasks.base import Evaluation, Loaded
from workers.ranks.train.tasks.model import text_limit, tokenizer_with_pad
from workers.ranks.train.tasks.prediction import TokenPrediction
from workers.ranks.train.tasks.rouge import rouge

GENERATED = 200
"""Validation examples that the model writes a text for: at most so many, as generation is slow."""
LONGEST = 256
"""Tokens that it may write for one."""
_SPARE = 8
"""Tokens beyond the longest reference of a batch, so that a text that does not end shows."""
_SAMPLES = 5


class Text2Text(TokenPrediction):
    """Cross entropy over the target's tokens; ROUGE and exact match of what is generated."""

    best = "rougeL"
    better = "higher"
    call: ClassVar[dict[str, Any]] = {"use_cache": False}

    def __init__(self, loaded: Loaded, spec: TrainSpec) -> None:
        super().__init__(loaded, spec)
        # LED and kin read far more than they write.
        limit = getattr(loaded.model.config, "max_decoder_position_embeddings", None)
        self._target_limit = min(loaded.max_length, limit or loaded.max_length)

    @classmethod
    def open(cls, spec: TrainSpec, model_path: Path, labels: Sequence[str]) -> Self:  # noqa: ARG003
        options = spec.hyperparameters
        model = load_seq2seq(model_path, dtype=torch.float32, dropout=options.dropout)
        _require_start(model, model_path)
        _keep_every_layer(model)
        tokenizer = tokenizer_with_pad(model_path)
        loaded = Loaded(
            model=model,
            tokenizer=tokenizer,
            max_length=text_limit(model, tokenizer, options),
            head="its own language-model head",
        )
        return cls(loaded, spec)

    def read(self, file: DataFile) -> Examples:
        tokenizer, limit = self.loaded.tokenizer, self.loaded.max_length
        collected = Collector()
        for chunk in read_chunks(file, self.spec):
            pairs: list[Pair] = [placed.example for placed in chunk]  # type: ignore[misc]
            sources, source_cut = tokenise(tokenizer, [pair.text for pair in pairs], limit)
            targets, target_cut = tokenise(
                tokenizer, [pair.other for pair in pairs], self._target_limit, target=True
            )
            for source, target, *cut in zip(sources, targets, source_cut, target_cut, strict=True):
                collected.add(
                    {"tokens": source, "target_tokens": target},
                    length=len(source) + len(target),
                    weight=len(target),
                    cut=any(cut),
                )
        return collected.done()

    def cache_key(self) -> dict[str, Any]:
        return {**super().cache_key(), "target_limit": self._target_limit}

    def batch(self, examples: Examples, indices: Indices | Sequence[int], seed: int) -> Batch:  # noqa: ARG002
        inputs, read = pad_tokens(examples.ragged["tokens"], indices, self.pad)
        targets = examples.ragged["target_tokens"]
        labels = torch.from_numpy(targets.padded(indices, IGNORED))
        inputs["decoder_input_ids"] = shift_right(self.loaded.model, labels)
        written = int((labels != IGNORED).sum())
        return Batch(inputs, {"labels": labels}, read + written)

    def evaluate(
        self,
        model: nn.Module,
        examples: Examples,
        *,
        batch_size: int,
        compute: Compute,
        gang: Gang,
    ) -> Evaluation:
        """With the right words in front of it, and on its own for ``GENERATED`` of the examples.

        ``details`` hold samples on rank 0, which writes them; all else is every rank's.
        """
        forced = super().evaluate(
            model, examples, batch_size=batch_size, compute=compute, gang=gang
        )
        chosen = choose(len(examples), GENERATED, self.spec.hyperparameters.seed)
        dealt = gang.deal(chosen.tolist())
        share = np.array([index for index, _ in dealt], np.int64)
        model.eval()
        with torch.inference_mode(), compute.autocast():
            pairs = self._write(examples, share, batch_size, compute, gang)
        model.train()
        pairs = [pair for pair, (_, counts) in zip(pairs, dealt, strict=True) if counts]
        sums = np.zeros(4, np.float64)
        for reference, text in pairs:
            found = rouge(reference, text)
            sums += (reference == text, found.one, found.two, found.longest)
        names = ("exact_match", "rouge1", "rouge2", "rougeL")
        means = [total / len(chosen) for total in gang.sum(sums.tolist())]
        values = {**forced.values, **dict(zip(names, means, strict=True))}
        values["generated_examples"] = len(chosen)
        samples = [
            {"source": self._text(examples[int(index)]["tokens"]), "reference": r, "generated": g}
            for index, (r, g) in list(zip(share, pairs, strict=False))[:_SAMPLES]
        ]
        return Evaluation(values, {**forced.details, "samples": samples if gang.rank == 0 else []})

    def _write(
        self, examples: Examples, share: Indices, batch_size: int, compute: Compute, gang: Gang
    ) -> list[tuple[str, str]]:
        """(reference, generated) of each example of ``share``, in its order."""
        # Not what the trainer calls, which is DDP's: this one passes gradients to nobody.
        model: Any = self.loaded.model
        targets = examples.ragged["target_tokens"]
        pairs: dict[int, tuple[str, str]] = {}
        by_length = share[np.argsort(-examples.lengths[share], kind="stable")]
        for start in range(0, len(by_length), batch_size):
            indices = by_length[start : start + batch_size]
            inputs, _ = pad_tokens(examples.ragged["tokens"], indices, self.pad)
            longest = max(len(targets[int(index)]) for index in indices)
            limit = min(longest + _SPARE, LONGEST, self._target_limit)
            written = model.generate(
                **{name: tensor.to(compute.device) for name, tensor in inputs.items()},
                generation_config=greedy(limit),
                synced_gpus=gang.sharded,
            )
            for index, tokens in zip(indices.tolist(), written.cpu().numpy(), strict=True):
                pairs[index] = (self._text(targets[index]), self._text(tokens))
        return [pairs[index] for index in share.tolist()]

    def _text(self, tokens: NDArray[Any]) -> str:
        text = self.loaded.tokenizer.decode(tokens.tolist(), skip_special_tokens=True)
        return str(text).strip()


def choose(examples: int, most: int, seed: int) -> Indices:
    """Some examples by chance, the same at every evaluation."""
    generator = np.random.Generator(np.random.Philox(key=derive(seed, "generated")))
    return generator.permutation(examples)[:most].astype(np.int64)


def greedy(tokens: int) -> GenerationConfig:
    """The likeliest token at each step, whatever beams, penalties and lengths a model asks for. Its
    special tokens stay its own."""
    return GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=tokens,
        min_length=0,
        do_sample=False,
        num_beams=1,
        early_stopping=False,
        length_penalty=1.0,
        no_repeat_ngram_size=0,
        repetition_penalty=1.0,
    )


def shift_right(model: PreTrainedModel, labels: torch.Tensor) -> torch.Tensor:
    """What the decoder has in front of it as it writes each label: [examples, tokens]."""
    own = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if own is not None:
        shifted: torch.Tensor = own(labels)
        return shifted
    before = labels.new_full(labels.shape, model.config.decoder_start_token_id)
    before[:, 1:] = labels[:, :-1]
    return before.masked_fill(before == IGNORED, model.config.pad_token_id)


def _require_start(model: PreTrainedModel, path: Path) -> None:
    for name in ("decoder_start_token_id", "pad_token_id"):
        if getattr(model.config, name, None) is None:
            raise LoadError(
                "model_unsuitable",
                f"config.json of '{path.name}' does not say its {name}",
                f"Set it (model.config.{name} = …) and save the model again.",
            )


def _keep_every_layer(model: nn.Module) -> None:
    """No LayerDrop: the ranks of a gang would skip different layers, and wait for one another's
    gradients. The config that is delivered still has it."""
    for module in model.modules():
        if hasattr(module, "layerdrop"):
            module.layerdrop = 0.0  # type: ignore[assignment]
