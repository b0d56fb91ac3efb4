"""Batch jobs on a worker with the real engine: what is stored is what Transformers gives, row by row."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from shared.resolved import ResolvedInput
from tests.inference.conftest import make_bert, text_of
from tests.inference.tiny import make_bart, make_t5, sentence
from tests.workers.fleet import Fleet

pytestmark = pytest.mark.slow
TEXTS = [text_of(1 + (13 * i) % 31, i) for i in range(60)]
SOURCES = [sentence(1 + (7 * i) % 23, i) for i in range(60)]


@pytest.fixture
def real(new_fleet: Callable[..., Fleet], database: str, valkey_url: str) -> Fleet:
    fleet = new_fleet(database, valkey_url, lease_ttl="20", claim_timeout="60")
    fleet.start_scheduler()
    fleet.start_host("one", "--devices=cpu:1", real=True, devices=1)
    return fleet


def infer(fleet: Fleet, model: Path, texts: list[str], **spec: Any) -> list[dict[str, Any]]:
    rows = fleet.data / f"rows-{model.name}-{spec['task']}.jsonl"
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    job_id = fleet.submit(
        {"kind": "infer", "input": "x", "shard_rows": 16, **spec},
        {"input": ResolvedInput(path=str(rows), size=rows.stat().st_size)},
        rows,
        model=str(model),
    )
    fleet.wait(job_id, "succeeded", within=200)
    found = fleet.results(job_id)
    assert [row["row"] for row in found] == list(range(len(texts)))
    assert all(row["error"] is None for row in found), found
    return [row["output"] for row in found]


def test_text_for_text(real: Fleet) -> None:
    bart = make_bart(real.data / "bart", eos_token_id=[2, 279, 286], no_repeat_ngram_size=2)
    for folder in (make_t5(real.data / "t5"), bart):
        outputs = infer(
            real, folder, SOURCES, task="summarization", batch_size=7,
            generation={"max_new_tokens": 14},
        )  # fmt: skip
        model = AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        for output, source in zip(outputs, SOURCES, strict=True):
            ids = torch.tensor([tokenizer(source).input_ids])
            [whole] = model.generate(ids, max_new_tokens=14, do_sample=False, num_beams=1).tolist()
            new = whole[1:]
            ended = new[-1] in model.generation_config.eos_token_id
            text = tokenizer.decode(new[:-1] if ended else new, skip_special_tokens=True)
            assert output["text"] == text.rstrip("\ufffd")
        assert len({output["text"] for output in outputs}) > 10


def test_one_folder_for_labels_and_vectors(real: Fleet) -> None:
    """One label: its score is not always 1.0."""
    folder = make_bert(real.data / "bert")
    classifier = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=1, problem_type=None, ignore_mismatched_sizes=True
    )
    torch.nn.init.normal_(classifier.classifier.weight, std=0.5)
    classifier.save_pretrained(folder)
    labelled = infer(real, folder, TEXTS, task="text-classification")
    embedded = infer(real, folder, TEXTS, task="embeddings", embedding={"normalize": False})
    tokenizer = AutoTokenizer.from_pretrained(folder)
    classifier = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    encoder = AutoModel.from_pretrained(folder).eval()
    for label, vector, text in zip(labelled, embedded, TEXTS, strict=True):
        ids = tokenizer(text, return_tensors="pt").input_ids
        with torch.inference_mode():
            score = classifier(ids).logits[0].sigmoid().item()
            mean = encoder(ids).last_hidden_state[0].mean(dim=0).tolist()
        assert label["score"] == pytest.approx(score, abs=1e-5)
        assert vector["embedding"] == pytest.approx(mean, abs=1e-4)
    assert len({round(label["score"], 4) for label in labelled}) > 30
