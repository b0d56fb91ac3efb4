"""A few validation examples with what the finished model makes of them, for the report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from workers.ranks.train.device import Compute
from workers.ranks.train.examples import IGNORED, Examples
from workers.ranks.train.tasks.text2text import choose, greedy

SAMPLES = 6
_LOOKED_THROUGH = 512
"""Examples among which mistakes are looked for, at most."""
_CONTINUED = 64
"""Tokens that a model writes behind a prompt, at most."""

Sample = dict[str, Any]


def continuations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Examples,
    *,
    limit: int,
    seed: int,
    compute: Compute,
) -> list[Sample]:
    """What a causal model writes where an example has its last learned run: ``prompt``, ``reference`` and
    ``generated``. Of an example that is learned whole the first half is the prompt."""
    generating: Any = model
    found: list[Sample] = []
    for index in choose(len(examples), SAMPLES, seed).tolist():
        tokens = examples.ragged["tokens"][index]
        runs = examples.ragged["learned"][index].reshape(-1, 2)
        begin, end = runs[-1].tolist() if len(runs) else (0, 0)
        if begin == 0:
            begin, end = len(tokens) // 2, len(tokens)
        room = min(_CONTINUED, limit - begin, end - begin + 16)
        if begin < 1 or room < 1:
            continue
        ids = torch.tensor(tokens[None, :begin].astype(np.int64), device=compute.device)
        settings = greedy(room)
        if tokenizer.eos_token_id is not None:
            settings.pad_token_id = tokenizer.pad_token_id or tokenizer.eos_token_id
        written = generating.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings
        )
        found.append(
            {
                "prompt": _text(tokenizer, tokens[:begin], special=True),
                "reference": _text(tokenizer, tokens[begin:end]),
                "generated": _text(tokenizer, written[0, begin:].cpu().numpy()),
            }
        )
    return found


def mistakes(
    probabilities: NDArray[np.float64],
    truth: NDArray[np.int64],
    texts: Sequence[str],
    labels: Sequence[str],
) -> list[Sample]:
    """Of classified texts those that are wrong, the surest first: ``text``, ``reference``, ``predicted``.

    Args:
        probabilities: [texts, labels]
        truth: [texts]
    """
    guess = probabilities.argmax(axis=1)
    sureness = probabilities.max(axis=1)
    wrong = [int(i) for i in np.argsort(-sureness, kind="stable") if guess[i] != truth[i]]
    return [
        {
            "text": texts[i],
            "reference": labels[truth[i]],
            "predicted": f"{labels[guess[i]]} ({100 * sureness[i]:.0f} %)",
        }
        for i in wrong[:SAMPLES]
    ]


def looked_through(examples: Examples, seed: int) -> NDArray[np.int64]:
    """The examples among which mistakes are looked for."""
    return choose(len(examples), _LOOKED_THROUGH, seed)


def tagged(
    tokenizer: PreTrainedTokenizerBase,
    tokens: NDArray[np.int32],
    truth: NDArray[np.int32],
    guess: NDArray[np.int64],
    labels: Sequence[str],
) -> Sample:
    """A text by words with their ``tags`` and the ``predicted`` ones. A word begins at a token with a tag;
    all arguments are by token."""
    special = set(tokenizer.all_special_ids)
    begins = np.flatnonzero(truth != IGNORED)
    ends = [*begins[1:].tolist(), len(tokens)]
    words = []
    for begin, end in zip(begins.tolist(), ends, strict=True):
        own = [t for t in tokens[begin:end].tolist() if t not in special or t == tokens[begin]]
        words.append(_text(tokenizer, np.array(own), special=True))
    return {
        "words": words,
        "tags": [labels[i] for i in truth[begins]],
        "predicted": [labels[i] for i in guess[begins]],
    }


def _text(
    tokenizer: PreTrainedTokenizerBase, tokens: NDArray[Any], *, special: bool = False
) -> str:
    return str(tokenizer.decode(tokens.tolist(), skip_special_tokens=not special)).strip()
