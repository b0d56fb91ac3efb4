"""One small training for each task and kind of data: what ``test_tasks.py`` puts through its paces.

A case learns something that an untrained model cannot know, in a few seconds on one core.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.training.harness import FILLER, TOPICS, make_bert, make_rows
from tests.training.models import WORDS, make_gpt2, make_llama, make_masked_bert

Rows = Callable[[int, int], list[dict[str, Any]]]
"""(how many, seed) -> rows."""


@dataclass(frozen=True)
class Case:
    name: str
    task: str
    model: Callable[[Path], Path]
    """Makes the model folder and returns it."""
    rows: Rows
    metric: str
    learned: float
    """What ``metric`` comes to at least after training, or at most where lower is better."""
    loads_as: str
    """The Auto class of Transformers that opens the delivered model."""
    problem: str = "single-label"
    lower_is_better: bool = False
    hyperparameters: dict[str, Any] = field(default_factory=dict)


def multi_label_rows(count: int, seed: int) -> list[dict[str, Any]]:
    """Texts about none to all of the topics; the labels are the topics."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        labels = [topic for topic in sorted(TOPICS) if draw.random() < 0.4]
        words = draw.choices(FILLER, k=draw.randint(2, 12))
        for topic in labels:
            words += draw.choices(TOPICS[topic], k=3)
        draw.shuffle(words)
        rows.append({"text": " ".join(words), "label": labels})
    return rows


def scored_rows(count: int, seed: int) -> list[dict[str, Any]]:
    """Texts whose score is the share of animals among their words, times ten."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        animals, others = draw.randint(0, 6), draw.randint(4, 12)
        words = draw.choices(TOPICS["animal"], k=animals) + draw.choices(FILLER, k=others)
        draw.shuffle(words)
        rows.append({"text": " ".join(words), "label": round(10 * animals / len(words), 3)})
    return rows


def following(start: int, count: int) -> str:
    """Words of a ring: each is always followed by the same one."""
    return " ".join(WORDS[(start + 4 * i) % len(WORDS)] for i in range(count))


def passage_rows(count: int, seed: int) -> list[dict[str, Any]]:
    draw = random.Random(seed)
    return [{"text": following(draw.randrange(99), draw.randint(6, 14))} for _ in range(count)]


def completion_rows(count: int, seed: int) -> list[dict[str, Any]]:
    """The prompt's last word says what follows; the words before it are chance."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        start, length = draw.randrange(99), draw.randint(2, 6)
        prompt = " ".join(draw.choices(WORDS, k=length)) + " " + following(start, 1) + " "
        rows.append({"prompt": prompt, "completion": following(start + 4, 3)})
    return rows


def chat_rows(count: int, seed: int) -> list[dict[str, Any]]:
    """Two questions, each answered by the words that follow its last one."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        messages = [{"role": "system", "content": "the very old"}]
        for _ in range(2):
            start = draw.randrange(99)
            asked = " ".join(draw.choices(WORDS, k=2)) + " " + following(start, 1)
            messages.append({"role": "user", "content": asked})
            messages.append({"role": "assistant", "content": following(start + 4, 2)})
        rows.append({"messages": messages})
    return rows


def topic_rows(count: int, seed: int) -> list[dict[str, Any]]:
    """Each text is made of the words of one topic: a word says which others may be there."""
    draw = random.Random(seed)
    topics = [draw.choice(sorted(TOPICS)) for _ in range(count)]
    return [{"text": " ".join(draw.choices(TOPICS[t], k=draw.randint(6, 14)))} for t in topics]


def pair_rows(count: int, seed: int) -> list[dict[str, Any]]:
    """The second text has another word for each of the first one's, in another order."""
    draw = random.Random(seed)
    half = len(WORDS) // 2
    rows = []
    for _ in range(count):
        chosen = draw.sample(range(half), k=draw.randint(3, 5))
        text = " ".join(WORDS[i] for i in chosen)
        draw.shuffle(chosen)
        rows.append({"text": text, "positive": " ".join(WORDS[half + i] for i in chosen)})
    return rows


_FAST = {"epochs": 8, "learning_rate": 1e-2, "dropout": 0.0}

CASES = (
    Case(
        name="single-label",
        task="text-classification",
        model=make_bert,
        rows=make_rows,
        metric="accuracy",
        learned=0.9,
        loads_as="AutoModelForSequenceClassification",
    ),
    Case(
        name="multi-label",
        task="text-classification",
        problem="multi-label",
        model=make_bert,
        rows=multi_label_rows,
        metric="micro_f1",
        learned=0.8,
        hyperparameters={"epochs": 20, "learning_rate": 2e-3, "dropout": 0.0},
        loads_as="AutoModelForSequenceClassification",
    ),
    Case(
        name="regression",
        task="text-classification",
        problem="regression",
        model=make_bert,
        rows=scored_rows,
        metric="pearson",
        learned=0.85,
        loads_as="AutoModelForSequenceClassification",
    ),
    Case(
        name="plain-text",
        task="text-generation",
        model=make_gpt2,
        rows=passage_rows,
        metric="loss",
        learned=0.7,
        lower_is_better=True,
        hyperparameters=_FAST,
        loads_as="AutoModelForCausalLM",
    ),
    Case(
        name="packed-text",
        task="text-generation",
        model=make_gpt2,
        rows=passage_rows,
        metric="loss",
        learned=1.2,
        lower_is_better=True,
        hyperparameters={**_FAST, "packing": True, "max_length": 32, "batch_size": 8},
        loads_as="AutoModelForCausalLM",
    ),
    Case(
        name="completion",
        task="text-generation",
        model=make_gpt2,
        rows=completion_rows,
        metric="loss",
        learned=0.9,
        lower_is_better=True,
        hyperparameters=_FAST,
        loads_as="AutoModelForCausalLM",
    ),
    Case(
        name="chat",
        task="text-generation",
        model=make_llama,
        rows=chat_rows,
        metric="loss",
        learned=0.5,
        lower_is_better=True,
        hyperparameters=_FAST,
        loads_as="AutoModelForCausalLM",
    ),
    Case(
        name="fill-mask",
        task="fill-mask",
        model=make_masked_bert,
        rows=topic_rows,
        metric="loss",
        learned=1.8,
        lower_is_better=True,
        hyperparameters={**_FAST, "mask_probability": 0.2},
        loads_as="AutoModelForMaskedLM",
    ),
    Case(
        name="embeddings",
        task="embeddings",
        model=make_bert,
        rows=pair_rows,
        metric="recall_at_1",
        learned=0.7,
        hyperparameters={"dropout": 0.0},
        loads_as="AutoModel",
    ),
)
