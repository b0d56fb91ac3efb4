"""text-generation: causal language models on plain text, on prompts with completions, and on chats."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from shared.examples import Chat, Completion, Passage, Placed
from shared.formats import DataFile
from shared.lifecycle import FailureClass
from shared.records import BadRow
from shared.specs import PACKED_LENGTH, TrainSpec
from workers.ranks.loading import LoadError, load_causal_lm, load_tokenizer
from workers.ranks.spans import Encoded, encode_chat, encode_spans, runs
from workers.ranks.train.device import Compute
from workers.ranks.train.examples import IGNORED, Batch, Examples, pad_tokens
from workers.ranks.train.failures import DataProblem, TrainingFailed
from workers.ranks.train.order import Indices
from workers.ranks.train.rows import Collector, read_chunks
from workers.ranks.train.tasks.base import Loaded
from workers.ranks.train.tasks.model import text_limit
from workers.ranks.train.tasks.prediction import TokenPrediction
from workers.ranks.train.tasks.samples import continuations


class TextGeneration(TokenPrediction):
    """Predicts each token from those before it.

    Of a passage all tokens are learned; of a completion its own and the end of text behind it; of a
    chat the assistant's turns. An example that is too long is cut at its end.

    Columns: ``tokens``, and ``learned``, the runs of learned tokens (``spans.runs``). The weight of an
    example is its learned tokens without the first of all, which nothing predicts.

    With ``packing`` passages stand one after another, the end of text between them, in blocks that are
    all full but the last. Attention reaches from one text of a block into those before it, as it does
    in the pretraining of GPT-3 (Brown et al. 2020, appendix B): texts that have nothing to do with
    each other are told apart by the end of text alone.
    """

    # What is generated later is not kept from here: memory for nothing.
    call: ClassVar[dict[str, Any]] = {"use_cache": False}
    last_turn_only: ClassVar[bool] = False
    """Of a chat, only the assistant's last turn is learned."""

    @classmethod
    def open(cls, spec: TrainSpec, model_path: Path, labels: Sequence[str]) -> Self:  # noqa: ARG003
        options = spec.hyperparameters
        model = load_causal_lm(model_path, torch.float32, dropout=options.dropout)
        tokenizer = load_tokenizer(model_path)
        limit = text_limit(model, tokenizer, options)
        head = "its own language-model head"
        if options.packing:
            _require_separator(tokenizer, model_path)
            limit = min(limit, options.max_length or PACKED_LENGTH)
            head += f", texts packed into blocks of {limit} tokens"
        return cls(Loaded(model, tokenizer, limit, head), spec)

    def read(self, file: DataFile) -> Examples:
        collected = Collector()
        if self.spec.hyperparameters.packing:
            for block in self._blocks(file):
                _add(collected, Encoded(block, np.ones(len(block), np.bool_)), len(block))
        else:
            for chunk in read_chunks(file, self.spec):
                for encoded in self.encode(chunk, file):
                    _add(collected, encoded, self.loaded.max_length)
        examples = collected.done()
        if not examples.weights.any():
            raise DataProblem(
                "nothing_to_learn",
                f"no row has anything to learn within {self.loaded.max_length} tokens",
                name=file.name,
                hint="Give a larger hyperparameters.max_length, or longer texts.",
            )
        return examples

    def batch(self, examples: Examples, indices: Indices | Sequence[int], seed: int) -> Batch:  # noqa: ARG002
        inputs, tokens = pad_tokens(examples.ragged["tokens"], indices, self.pad)
        learned = [examples.ragged["learned"][int(index)] for index in indices]
        return Batch(inputs, {"labels": next_tokens(inputs["input_ids"], learned)}, tokens)

    def samples(self, examples: Examples, compute: Compute) -> list[dict[str, Any]]:
        return continuations(
            self.loaded.model,
            self.loaded.tokenizer,
            examples,
            limit=self.loaded.max_length,
            seed=self.spec.hyperparameters.seed,
            compute=compute,
        )

    def encode(self, chunk: Sequence[Placed], file: DataFile) -> Iterator[Encoded]:
        """The examples of a chunk, in their order, not cut. All but chats are tokenised together."""
        texts: dict[int, str] = {}
        spans: dict[int, list[tuple[int, int]]] = {}
        for number, placed in enumerate(chunk):
            example = placed.example
            if isinstance(example, Completion):
                texts[number] = example.prompt + example.completion
                spans[number] = [(len(example.prompt), len(texts[number]))]
        plain = [number for number, p in enumerate(chunk) if isinstance(p.example, Passage)]
        done = dict(zip(plain, self._passages([chunk[n].example for n in plain]), strict=True))
        tokenizer = self.loaded.tokenizer
        whole = encode_spans(tokenizer, list(texts.values()), list(spans.values()), special=True)
        done |= zip(texts, map(self._closed, whole), strict=True)
        for number, placed in enumerate(chunk):
            if isinstance(placed.example, Chat):
                yield self._chat(placed.example, file, placed.line)
            else:
                yield done[number]

    def _passages(self, passages: Sequence[Any]) -> list[Encoded]:
        texts = [passage.text for passage in passages]
        if not texts:
            return []
        ids = self.loaded.tokenizer(texts, truncation=False, verbose=False)["input_ids"]
        return [self._closed(Encoded(list(i), np.ones(len(i), np.bool_))) for i in ids]

    def _closed(self, encoded: Encoded) -> Encoded:
        """With the end of text, learned, where the tokenizer has one."""
        eos = self.loaded.tokenizer.eos_token_id
        tokens, learned = encoded.tokens, encoded.learned
        if eos is not None:
            if tokens and tokens[-1] == eos:  # some tokenizers add it themselves
                tokens, learned = tokens[:-1], learned[:-1]
            return Encoded([*tokens, int(eos)], np.append(learned, True))
        # A model takes no text of no tokens.
        return encoded if tokens else Encoded([self.pad], np.zeros(1, np.bool_))

    def _chat(self, chat: Chat, file: DataFile, line: int) -> Encoded:
        tokenizer = self.loaded.tokenizer
        if not tokenizer.chat_template:
            raise TrainingFailed(
                FailureClass.USER_ERROR,
                "no_chat_template",
                f"{file.name}, {file.place(line)} is a chat, and the model's tokenizer has no chat template",
                "Choose a chat model, set tokenizer.chat_template and save it beside the model, or "
                f"give columns '{self.spec.data.columns.prompt}' and "
                f"'{self.spec.data.columns.completion}'.",
            )
        try:
            return encode_chat(tokenizer, chat, last_only=self.last_turn_only)
        except BadRow as problem:
            raise DataProblem(
                problem.code,
                problem.message,
                name=file.name,
                place=file.place(line),
                hint=problem.hint,
            ) from None

    def _blocks(self, file: DataFile) -> Iterator[list[int]]:
        """The passages of a file one after another, in their order, cut into blocks. What is left at
        the end is a shorter block, if it has a token to predict."""
        size, stream = self.loaded.max_length, list[int]()
        for chunk in read_chunks(file, self.spec):
            for encoded in self._passages([placed.example for placed in chunk]):
                stream += encoded.tokens
            whole = len(stream) // size * size
            yield from (stream[start : start + size] for start in range(0, whole, size))
            stream = stream[whole:]
        if len(stream) > 1:
            yield stream


def next_tokens(ids: torch.Tensor, learned: Sequence[NDArray[np.int32]]) -> torch.Tensor:
    """What the logits at each place are to predict: the token after it where that is learned, else
    ``IGNORED``. [texts, tokens], as ``ids``; ``learned`` are the runs of each text."""
    labels = torch.full_like(ids, IGNORED)
    for row, runs_of_row in enumerate(learned):
        for begin, end in runs_of_row.reshape(-1, 2).tolist():
            first = max(1, begin)
            labels[row, first - 1 : end - 1] = ids[row, first:end]
    return labels


def _add(collected: Collector, encoded: Encoded, limit: int) -> None:
    tokens, learned = encoded.tokens[:limit], encoded.learned[:limit]
    collected.add(
        {"tokens": tokens, "learned": runs(learned)},
        length=len(tokens),
        weight=int(learned[1:].sum()),
        cut=len(encoded.tokens) > limit,
    )


def _require_separator(tokenizer: PreTrainedTokenizerBase, model_path: Path) -> None:
    if tokenizer.eos_token_id is None:
        raise LoadError(
            "model_unsuitable",
            f"the tokenizer of '{model_path.name}' has no end-of-text token to put between texts",
            "Leave hyperparameters.packing out, or set tokenizer.eos_token and save it beside the "
            "model.",
        )
