"""Classes and probabilities are those of plain forward passes, in the order of the input."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

from workers.ranks.engine.batching import plan_batches
from workers.ranks.engine.classification import Classification
from workers.ranks.engine.models import ModelCache
from workers.ranks.engine.prompts import Prompt

from .conftest import LABELS, make_llama, text_of

TEXTS = [text_of(1 + (13 * i) % 31, i) for i in range(60)]


def plain(model_path, text):
    model = AutoModelForSequenceClassification.from_pretrained(model_path).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    with torch.inference_mode():
        return [
            model(tokenizer(t, return_tensors="pt").input_ids).logits[0].softmax(-1).tolist()
            for t in text
        ]


def test_probabilities_equal_plain_forward_passes(engine, bert):
    rows = [{"text": t, "id": i} for i, t in enumerate(TEXTS)]
    outcome = engine.run(
        bert, rows, task="text-classification", shard_rows=13, top_k_labels=3, batch_size=8
    )
    expected = plain(bert, TEXTS)
    assert [r["id"] for r in outcome.results] == list(range(60))
    for row, scores in zip(outcome.results, expected, strict=True):
        best = sorted(range(4), key=lambda i: -scores[i])[:3]
        labels = row["output"]["labels"]
        assert [entry["label"] for entry in labels] == [LABELS[i] for i in best]
        assert [entry["score"] for entry in labels] == pytest.approx(
            [scores[i] for i in best], abs=1e-5
        )
        assert row["output"]["label"] == labels[0]["label"]
        assert row["output"]["score"] == labels[0]["score"]
    # The scores depend on the text: rows in another order would show.
    assert len({round(row["output"]["score"], 4) for row in outcome.results}) > 40
    tokenizer = AutoTokenizer.from_pretrained(bert)
    tokens = [len(tokenizer(t).input_ids) for t in TEXTS]
    assert [r["usage"]["input_tokens"] for r in outcome.results] == tokens
    assert outcome.done.summary["input_tokens"] == sum(tokens)


def test_long_texts_are_an_error_or_cut_with_the_closing_token_kept(engine, bert):
    rows = [{"body": text_of(100)}, {"body": "the cat"}, {"text": "the cat"}]
    fields = {"task": "text-classification", "text_column": "body", "top_k_labels": 99}
    refused = engine.run(bert, rows, **fields)
    assert refused.codes == ["too_long", None, "missing_column"]
    assert "the model takes 128" in refused.results[0]["error"]["message"]
    cut = engine.run(bert, rows, too_long="truncate", **fields)
    assert cut.codes == [None, None, "missing_column"]
    assert cut.results[0]["usage"]["input_tokens"] == 128
    tokenizer = AutoTokenizer.from_pretrained(bert)
    ids = tokenizer(text_of(100), truncation=True, max_length=128, return_tensors="pt").input_ids
    assert ids[0, -1] == tokenizer.convert_tokens_to_ids("[SEP]")
    model = AutoModelForSequenceClassification.from_pretrained(bert).eval()
    expected = model(ids).logits[0].softmax(-1).max().item()
    assert cut.results[0]["output"]["score"] == pytest.approx(expected, abs=1e-5)
    assert len(cut.results[0]["output"]["labels"]) == len(LABELS)


@pytest.mark.parametrize(
    ("labels", "problem"),
    [
        (1, None),
        (1, "regression"),
        (1, "multi_label_classification"),
        (3, None),
        (3, "multi_label_classification"),
        (3, "regression"),
    ],
)
def test_scores_mean_what_they_mean_in_a_pipeline(engine, bert, models_dir, labels, problem):
    folder = models_dir / f"head-{labels}-{problem}"
    model = AutoModelForSequenceClassification.from_pretrained(
        bert, num_labels=labels, problem_type=problem, ignore_mismatched_sizes=True
    )
    torch.manual_seed(2)
    torch.nn.init.normal_(model.classifier.weight, std=0.5)
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(bert)
    tokenizer.save_pretrained(folder)
    outcome = engine.run(
        folder, [{"text": t} for t in TEXTS[:12]], task="text-classification", top_k_labels=3
    )
    theirs = pipeline("text-classification", model=str(folder), top_k=None)(TEXTS[:12])
    for row, expected in zip(outcome.results, theirs, strict=True):
        told = row["output"]["labels"]
        assert [entry["label"] for entry in told] == [entry["label"] for entry in expected]
        assert [entry["score"] for entry in told] == pytest.approx(
            [entry["score"] for entry in expected], abs=1e-6
        )
    # One label is not always certain.
    assert len({round(row["output"]["score"], 5) for row in outcome.results}) > 6


@pytest.mark.parametrize("task", ["text-classification", "text-generation"])
def test_a_model_made_for_something_else_is_refused(engine, bert, models_dir, task):
    model = bert
    if task == "text-classification":
        model = make_llama(models_dir / "headless-llama")
    outcome = engine.run(model, [{"text": "a", "prompt": "a"}], task=task)
    assert outcome.failed.code == "unsupported_model"
    assert outcome.failed.failure_class == "user_error"
    assert model.name in outcome.failed.message and outcome.failed.hint
    # And the engine goes on.
    assert engine.run(bert, [{"text": "a"}], task="text-classification").failed is None


def test_out_of_memory_halves_the_batch(bert, monkeypatch):
    loaded, _ = ModelCache().get(
        "text-classification", str(bert), torch.float32, torch.device("cpu")
    )
    sizes = [3, 9, 4, 40, 5, 6, 7, 8]
    prompts = [Prompt(i, None, (7,) * n) for i, n in enumerate(sizes)]
    forward = loaded.model.forward

    def scarce(input_ids, **kwargs):
        if input_ids.numel() > 30:
            raise torch.OutOfMemoryError("no room")
        return forward(input_ids=input_ids, **kwargs)

    monkeypatch.setattr(loaded.model, "forward", scarce)
    computation = Classification(loaded, top_k=1)
    computation.join("", 8)
    computation.add(prompts)
    results = []
    while computation.busy:
        results += [answered.result for answered in computation.step().results]
    assert sorted(r["row"] for r in results) == list(range(8))
    errors = {r["row"]: r["error"]["code"] for r in results if r["error"]}
    assert errors == {3: "out_of_memory"}


@given(
    lengths=st.lists(st.integers(1, 300), max_size=80),
    max_rows=st.integers(1, 20),
    max_tokens=st.integers(1, 1500),
)
def test_a_plan_has_every_row_once_and_keeps_its_budget(lengths, max_rows, max_tokens):
    plan = plan_batches(lengths, max_rows=max_rows, max_tokens=max_tokens)
    assert sorted(i for batch in plan for i in batch) == list(range(len(lengths)))
    for batch in plan:
        width = max(lengths[i] for i in batch)
        assert len(batch) <= max_rows
        assert len(batch) == 1 or len(batch) * width <= max_tokens
    flat = [lengths[i] for batch in plan for i in batch]
    assert flat == sorted(lengths, reverse=True)
    # No batch could have taken the next row as well.
    for batch, following in itertools.pairwise(plan):
        width = lengths[batch[0]]
        assert len(batch) == max_rows or (len(batch) + 1) * width > max_tokens, following
