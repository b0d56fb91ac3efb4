"""One small training for each task and kind of data: what ``test_tasks.py`` puts through its paces.

A case learns something that an untrained model cannot know, in a few seconds on one core.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.training.harness import FILLER, TOPICS, make_bart, make_bert, make_rows, make_t5
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
    spec_fields: dict[str, Any] = field(default_factory=dict)
    """Further fields of the spec: method, lora."""


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


PARTS = {
    **dict.fromkeys(("the", "a"), "DET"),
    **dict.fromkeys(("of", "with", "in"), "ADP"),
    **dict.fromkeys(("very", "old", "new", "small", "large"), "ADJ"),
    "and": "CCONJ",
    "is": "VERB",
}


def entity_rows(count: int, seed: int) -> list[dict[str, Any]]:
    """Topics are entities of one to three words; some of their words begin one, others go on."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        words: list[str] = []
        tags: list[str] = []
        for _ in range(draw.randint(1, 4)):
            topic = draw.choice(sorted(TOPICS))
            begin, go_on = TOPICS[topic][:3], TOPICS[topic][3:]
            outside = draw.choices(FILLER, k=draw.randint(1, 4))
            entity = [draw.choice(begin), *draw.choices(go_on, k=draw.randint(0, 2))]
            words += outside + entity
            tags += ["O"] * len(outside)
            tags += [f"B-{topic.upper()}"] + [f"I-{topic.upper()}"] * (len(entity) - 1)
        rows.append({"tokens": words, "tags": tags})
    return rows


def part_of_speech_rows(count: int, seed: int) -> list[dict[str, Any]]:
    """A tag a word, with no prefix; topics are nouns."""
    rows = []
    for row in make_rows(count, seed):
        words = row["text"].split()
        rows.append({"tokens": words, "tags": [PARTS.get(word, "NOUN") for word in words]})
    return rows


def answer_rows(count: int, seed: int) -> list[dict[str, Any]]:
    """Among other words one is of a topic: to be written in capitals, and the topic behind it."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        topic = draw.choice(sorted(TOPICS))
        word = draw.choice(TOPICS[topic])
        words = [word, *draw.choices(FILLER, k=draw.randint(0, 3))]
        draw.shuffle(words)
        rows.append({"text": " ".join(words), "target": f"{word.upper()} is {topic}"})
    return rows


def summary_rows(count: int, seed: int) -> list[dict[str, Any]]:
    """Texts of some words about one topic, to be summed up in four."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        topic = draw.choice(sorted(TOPICS))
        words = draw.choices(TOPICS[topic], k=3) + draw.choices(FILLER, k=draw.randint(0, 3))
        draw.shuffle(words)
        rows.append({"text": " ".join(words), "target": f"is in the {topic}"})
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


def preference_rows(count: int, seed: int) -> list[dict[str, Any]]:
    """Whatever is asked, the answer about animals is preferred."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        answers = {
            name: " ".join(draw.choices(FILLER, k=draw.randint(0, 3)) + draw.choices(words, k=2))
            for name, words in (("chosen", TOPICS["animal"]), ("rejected", TOPICS["place"]))
        }
        rows.append(
            {"prompt": " ".join(draw.choices(WORDS, k=draw.randint(1, 6))) + " ", **answers}
        )
    return rows


def preferred_chat_rows(count: int, seed: int) -> list[dict[str, Any]]:
    """The same at the end of a chat in which the assistant has spoken before."""
    rows = []
    for row, chat in zip(preference_rows(count, seed), chat_rows(count, seed), strict=True):
        asked = {"role": "user", "content": row["prompt"].strip()}
        answers = {"chosen": row["chosen"], "rejected": row["rejected"]}
        rows.append({"messages": [*chat["messages"][:3], asked], **answers})
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
        name="lora",
        task="text-classification",
        model=make_bert,
        rows=make_rows,
        metric="accuracy",
        learned=0.9,
        loads_as="AutoModelForSequenceClassification",
        hyperparameters={"learning_rate": 3e-3, "dropout": 0.0, "epochs": 12},
        # The base is random here, so its embeddings have to be adapted as well.
        spec_fields={
            "method": "lora",
            "lora": {
                "r": 16,
                "alpha": 32,
                "dropout": 0.1,
                "targets": ["query", "key", "value", "dense", "word_embeddings"],
            },
        },
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
        hyperparameters={"epochs": 7},
        loads_as="AutoModelForSequenceClassification",
    ),
    Case(
        name="entities",
        task="token-classification",
        model=make_bert,
        rows=entity_rows,
        metric="f1",
        learned=0.95,
        loads_as="AutoModelForTokenClassification",
    ),
    Case(
        name="parts-of-speech",
        task="token-classification",
        model=make_bert,
        rows=part_of_speech_rows,
        metric="macro_f1",
        learned=0.95,
        loads_as="AutoModelForTokenClassification",
    ),
    Case(
        name="text2text",
        task="text2text",
        model=make_t5,
        rows=answer_rows,
        metric="rougeL",
        learned=0.9,
        hyperparameters={"epochs": 10, "eval_every_steps": 50},
        loads_as="AutoModelForSeq2SeqLM",
    ),
    Case(
        name="summarization",
        task="summarization",
        model=make_bart,
        rows=summary_rows,
        metric="exact_match",
        learned=0.9,
        hyperparameters={"epochs": 7, "eval_every_steps": 50},
        loads_as="AutoModelForSeq2SeqLM",
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
        name="preference",
        task="text-generation",
        model=make_gpt2,
        rows=preference_rows,
        metric="reward_accuracy",
        learned=0.9,
        hyperparameters={"dropout": 0.1},
        spec_fields={"preference": {"label_smoothing": 0.05}},
        loads_as="AutoModelForCausalLM",
    ),
    Case(
        name="preference-lora",
        task="text-generation",
        model=make_llama,
        rows=preferred_chat_rows,
        metric="reward_accuracy",
        learned=0.9,
        hyperparameters={"micro_batch_size": 4},
        spec_fields={
            "method": "lora",
            "preference": {"beta": 0.5},
            "lora": {
                "r": 16,
                "dropout": 0.1,
                "targets": ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "embed_tokens"],
            },
        },
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
