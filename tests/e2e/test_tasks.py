"""Every task through the whole service: trained on two devices, published, then used by a batch job.

Models are made from scratch by jobs of their own, on glosses of WordNet: the classic recipe of
pretraining, then fine-tuning, in linked jobs.
"""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest

from gpuyard import Client
from shared.views import JobDetail
from tests.e2e.inputs import LABELS, labelled_rows, write_jsonl
from tests.e2e.stack_process import StackProcess

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

DATA = Path(__file__).resolve().parents[2] / "examples" / "data"
SMALL = {"hidden": 64, "layers": 2, "heads": 2, "positions": 64, "vocabulary": 2000}


def glosses(name: str, count: int) -> list[dict[str, Any]]:
    lines = (DATA / f"glosses-{name}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines[:count]]


def train(client: Client, folder: Path, **spec: Any) -> JobDetail:
    """Submit a training whose data are rows, and wait for its end."""
    data = {}
    for part in ("train", "validation"):
        data[part] = str(write_jsonl(folder / f"{part}.jsonl", spec.pop(part)))
    hyperparameters = {"batch_size": 32, "learning_rate": 2e-3, "warmup_ratio": 0.1}
    job = client.submit(
        {
            "kind": "train",
            "data": data,
            "resources": {"devices": 2},
            **spec,
            "hyperparameters": {**hyperparameters, **spec.get("hyperparameters", {})},
        },
        upload=True,
    )
    return client.wait(job.id, timeout=240)


def infer(client: Client, task: str, model: str, rows: list[dict[str, Any]], **more: Any) -> Any:
    job = client.submit({"kind": "infer", "task": task, "model": model, "rows": rows, **more})
    client.wait(job.id, timeout=120)
    found = list(client.rows(job.id))
    assert [row["row"] for row in found] == list(range(len(rows)))
    assert all(row["error"] is None for row in found), found
    return [row["output"] for row in found]


def metrics(job: JobDetail) -> dict[str, float]:
    assert job.summary is not None
    return dict(job.summary["metrics"])


@pytest.fixture(scope="module")
def pretrained(stack: StackProcess, tmp_path_factory: pytest.TempPathFactory) -> JobDetail:
    """A BERT from scratch, on masked glosses, published as ``glossbert``."""
    return train(
        stack.client,
        tmp_path_factory.mktemp("mlm"),
        task="fill-mask",
        method="pretrain",
        architecture={"type": "bert", **SMALL},
        train=[{"text": row["text"]} for row in glosses("train", 2000)],
        validation=[{"text": row["text"]} for row in glosses("validation", 200)],
        hyperparameters={"epochs": 4},
        publish="glossbert",
    )


def test_masked_language_modelling(stack: StackProcess, pretrained: JobDetail) -> None:
    loss = metrics(pretrained)["loss"]
    assert loss < 0.9 * math.log(SMALL["vocabulary"]), "no better than chance over the vocabulary"
    (said,) = infer(
        stack.client, "fill-mask", "glossbert@latest", [{"text": "a person who [MASK] the house"}],
        top_k_labels=3,
    )  # fmt: skip
    (mask,) = said["masks"]
    assert len(mask["tokens"]) == 3
    assert mask["tokens"][0]["score"] >= mask["tokens"][1]["score"]


def test_words_are_tagged_by_what_was_pretrained(
    stack: StackProcess, pretrained: JobDetail, tmp_path: Path
) -> None:
    """Entities are what stands behind an article; the tags are made by that rule."""

    def tagged(row: dict[str, Any]) -> dict[str, Any]:
        words = row["text"].split()[:30]
        tags = ["O"] * len(words)
        for i in range(1, len(words)):
            if words[i - 1] in ("a", "an", "the"):
                tags[i] = "B-NOUN"
        return {"tokens": words, "tags": tags}

    job = train(
        stack.client,
        tmp_path,
        task="token-classification",
        model=f"job:{pretrained.id}",
        train=[tagged(row) for row in glosses("train", 2000)],
        validation=[tagged(row) for row in glosses("validation", 100)],
        hyperparameters={"epochs": 8, "batch_size": 16},
    )
    assert metrics(job)["f1"] > 0.8
    words = ["the", "river", "runs", "to", "a", "lake"]
    (said,) = infer(stack.client, "token-classification", f"job:{job.id}", [{"tokens": words}])
    assert len(said["tags"]) == len(words)
    assert said["tags"][1] == "B-NOUN" and said["tags"][2] == "O"


def test_a_student_is_taught(stack: StackProcess, pretrained: JobDetail, tmp_path: Path) -> None:
    """LoRA on what was pretrained makes a teacher, and a smaller model learns from that."""
    rows = {"train": glosses("train", 2000), "validation": glosses("validation", 200)}
    (tmp_path / "teacher").mkdir()
    teacher = train(
        stack.client, tmp_path / "teacher", task="text-classification", model="glossbert@1",
        method="full", hyperparameters={"epochs": 16, "batch_size": 16, "learning_rate": 1e-3}, **rows,
    )  # fmt: skip
    assert metrics(teacher)["accuracy"] > 0.25  # ten classes: chance is 0.1
    student = train(
        stack.client, tmp_path, task="text-classification", model="tinybert",
        method="distillation", teacher=f"job:{teacher.id}", hyperparameters={"epochs": 2}, **rows,
    )  # fmt: skip
    outputs = infer(
        stack.client, "text-classification", f"job:{student.id}", [{"text": "a large feline"}]
    )
    assert outputs[0]["label"] in {row["label"] for row in rows["train"]}


def test_an_adapter_is_trained_and_merged(stack: StackProcess, tmp_path: Path) -> None:
    rows = labelled_rows(600, 4)
    job = train(
        stack.client, tmp_path, task="text-classification", model="tinybert", method="lora",
        # The base is random, so its embeddings have to be adapted as well.
        lora={"r": 16, "alpha": 32, "targets": ["query", "value", "dense", "word_embeddings"]},
        train=rows[:480], validation=rows[480:],
        hyperparameters={"epochs": 12, "learning_rate": 5e-3},
    )  # fmt: skip
    assert metrics(job)["accuracy"] > 0.5  # the majority class has about 0.37
    names = {artifact.name for artifact in stack.client.artifacts(job.id)}
    assert {"adapter/adapter_model.safetensors", "model/model.safetensors"} <= names
    text = rows[-1]["text"]
    (said,) = infer(stack.client, "text-classification", f"job:{job.id}", [{"text": text}])
    assert said["label"] in LABELS


def test_texts_are_embedded(stack: StackProcess, pretrained: JobDetail, tmp_path: Path) -> None:
    """The two halves of a gloss belong together."""

    def halves(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        cut = [(row["text"].split(), len(row["text"].split()) // 2) for row in rows]
        return [
            {"text": " ".join(words[:half]), "positive": " ".join(words[half:])}
            for words, half in cut
            if half >= 3
        ]

    job = train(
        stack.client, tmp_path, task="embeddings", model="glossbert@1",
        train=halves(glosses("train", 2000)), validation=halves(glosses("validation", 200)),
        hyperparameters={"epochs": 4},
    )  # fmt: skip
    assert metrics(job)["recall_at_10"] > 0.12  # of 100 and more: chance is below 0.1
    one, two = infer(
        stack.client, "embeddings", f"job:{job.id}", [{"text": "a fish"}, {"text": "a fish"}]
    )
    assert one["dimensions"] == SMALL["hidden"] == len(one["embedding"])
    assert sum(a * b for a, b in zip(one["embedding"], two["embedding"], strict=True)) == (
        pytest.approx(1.0, abs=1e-4)
    )


def test_text_is_generated(stack: StackProcess, tmp_path: Path) -> None:
    """A Llama from scratch, then fine-tuned to complete, with early stopping."""
    base = train(
        stack.client, tmp_path, task="text-generation", method="pretrain",
        architecture={"type": "llama", **SMALL, "positions": 160}, publish="glossllama",
        train=[{"text": row["text"]} for row in glosses("train", 2000)],
        validation=[{"text": row["text"]} for row in glosses("validation", 200)],
        hyperparameters={"epochs": 3, "packing": True, "max_length": 64},
    )  # fmt: skip
    assert metrics(base)["loss"] < 0.9 * math.log(SMALL["vocabulary"])
    (tmp_path / "fine").mkdir()
    # The space stands before the word, where tokenizers want it, also when the model is asked.
    asked = [
        {"prompt": f"{r['text']} is a", "completion": f" {r['label']}"}
        for r in glosses("train", 800)
    ]
    tuned = train(
        stack.client, tmp_path / "fine", task="text-generation", model="glossllama@latest",
        train=asked[:700], validation=asked[700:], early_stopping={"patience": 1},
        hyperparameters={"epochs": 8, "learning_rate": 2e-3},
    )  # fmt: skip
    assert tuned.summary is not None
    assert tuned.summary["best"]["metric"] == "loss"
    assert metrics(tuned)["accuracy"] > 0.3
    outputs = infer(
        stack.client, "text-generation", f"job:{tuned.id}",
        [{"prompt": row["prompt"]} for row in asked[700:720]], generation={"max_new_tokens": 8},
    )  # fmt: skip
    labels = {row["completion"].strip() for row in asked}
    assert sum(o["text"].strip() in labels for o in outputs) >= 10


def test_answers_are_preferred(stack: StackProcess, tmp_path: Path) -> None:
    """Of two answers the one of low numbers; what was learned shows in what is generated."""
    chance = random.Random(7)

    def words(first: int, count: int) -> str:
        return " ".join(f"w{first + chance.randrange(100)}" for _ in range(count))

    pairs = [
        {"prompt": f"{words(100, 3)} ", "chosen": words(0, 3), "rejected": words(200, 3)}
        for _ in range(400)
    ]
    job = train(
        stack.client, tmp_path, task="text-generation", model="tinyllama", preference={"beta": 0.1},
        train=pairs[:340], validation=pairs[340:], hyperparameters={"epochs": 8},
    )  # fmt: skip
    assert metrics(job)["reward_accuracy"] > 0.9
    outputs = infer(
        stack.client, "text-generation", f"job:{job.id}",
        [{"prompt": row["prompt"]} for row in pairs[340:]], generation={"max_new_tokens": 3},
    )  # fmt: skip
    said = [
        int(word[1:]) for output in outputs for word in output["text"].split() if word[0] == "w"
    ]
    assert said and sum(number < 100 for number in said) > 0.8 * len(said)


def test_one_text_is_written_for_another(stack: StackProcess, tmp_path: Path) -> None:
    """A T5 from scratch learns which topic a gloss is of, by writing its name."""
    rows = [{"text": row["text"], "target": row["label"]} for row in glosses("train", 1500)]
    held = [{"text": row["text"], "target": row["label"]} for row in glosses("validation", 100)]
    job = train(
        stack.client, tmp_path, task="summarization", method="pretrain",
        architecture={"type": "t5", **SMALL}, train=rows, validation=held,
        hyperparameters={"epochs": 6, "eval_every_steps": 200, "learning_rate": 5e-3},
    )  # fmt: skip
    assert metrics(job)["exact_match"] > 0.15  # chance is 0.1, and an untrained one writes none
    outputs = infer(
        stack.client, "summarization", f"job:{job.id}",
        [{"text": row["text"]} for row in held[:20]], generation={"max_new_tokens": 8},
    )  # fmt: skip
    labels = {row["target"] for row in rows}
    assert sum(o["text"].strip() in labels for o in outputs) >= 15
