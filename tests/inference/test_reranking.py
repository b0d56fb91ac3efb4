"""Scores of pairs are those of plain forward passes; a row is answered once all its pairs are."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
)

from workers.ranks.engine.models import ModelCache
from workers.ranks.engine.prompts import Prompt
from workers.ranks.engine.reranking import Reranking

from .tiny import VOCABULARY, finish, sentence, widen, wordpiece

TASK = {"task": "reranking"}


def make_reranker(folder: Path, labels: int = 1, **config: Any) -> Path:
    torch.manual_seed(3)
    wordpiece(folder)
    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=len(VOCABULARY), hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
            intermediate_size=64, max_position_embeddings=64, num_labels=labels, **config,
        )
    )  # fmt: skip
    widen(model)
    with torch.no_grad():  # which text a token is of matters
        model.bert.embeddings.token_type_embeddings.weight[-1] += 0.5
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def reranker(models_dir: Path) -> Path:
    return make_reranker(models_dir / "reranker")


def plain(model_path: Path, query: str, texts: list[str], **options: Any) -> torch.Tensor:
    """Logits [texts, labels], one by one."""
    model = AutoModelForSequenceClassification.from_pretrained(model_path).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    with torch.inference_mode():
        return torch.cat(
            [model(**tokenizer(query, t, return_tensors="pt", **options)).logits for t in texts]
        )


def rows_of(count: int) -> list[dict[str, Any]]:
    return [
        {
            "id": f"q{i}",
            "query": sentence(1 + i % 6, i),
            "documents": [sentence(1 + (i + 7 * k) % 23, i + k) for k in range(1 + (5 * i) % 17)],
        }
        for i in range(count)
    ]


def test_scores_and_rankings_equal_plain_forward_passes(engine, reranker):
    rows = rows_of(20)
    rows[4]["documents"] = [sentence(1 + k % 20, k) for k in range(150)]  # over many passes
    outcome = engine.run(reranker, rows, shard_rows=6, batch_size=7, **TASK)
    tokenizer = AutoTokenizer.from_pretrained(reranker)
    for row, asked in zip(outcome.results, rows, strict=True):
        expected = plain(reranker, asked["query"], asked["documents"])[:, 0].sigmoid().tolist()
        output = row["output"]
        assert row["id"] == asked["id"] and output.keys() == {"scores", "ranking"}
        assert output["scores"] == pytest.approx(expected, abs=1e-4)
        assert sorted(output["ranking"]) == list(range(len(expected)))
        ranked = [output["scores"][k] for k in output["ranking"]]
        assert ranked == sorted(ranked, reverse=True)
        tokens = sum(len(tokenizer(asked["query"], d).input_ids) for d in asked["documents"])
        assert row["usage"]["input_tokens"] == tokens
    assert len({round(s, 3) for row in outcome.results for s in row["output"]["scores"]}) > 50
    best = engine.run(reranker, rows, top_n=2, **TASK)
    for short, whole in zip(best.results, outcome.results, strict=True):
        assert short["output"]["ranking"] == whole["output"]["ranking"][:2]
        assert len(short["output"]["scores"]) == len(whole["output"]["scores"])


def test_one_text_has_one_score(engine, reranker):
    rows = [{"query": sentence(3, i), "text": sentence(2 + i, i)} for i in range(9)]
    outcome = engine.run(reranker, rows, **TASK)
    for row, asked in zip(outcome.results, rows, strict=True):
        expected = plain(reranker, asked["query"], [asked["text"]])[0, 0].sigmoid().item()
        assert row["output"] == {"score": pytest.approx(expected, abs=1e-4)}
    renamed = [{"query": r["query"], "passage": r["text"]} for r in rows]
    again = engine.run(reranker, renamed, text_column="passage", **TASK)
    assert [r["output"] for r in again.results] == [r["output"] for r in outcome.results]


def test_what_a_number_means_is_the_models_to_say(engine, models_dir):
    query, texts = "the cat", [sentence(n, n) for n in range(1, 7)]
    row = [{"query": query, "documents": texts}]
    identity = {"activation_fn": "torch.nn.modules.linear.Identity"}
    raw = {
        "named": make_reranker(models_dir / "raw", sentence_transformers=identity),
        "regression": make_reranker(models_dir / "number", problem_type="regression"),
    }
    for model in raw.values():
        expected = plain(model, query, texts)[:, 0].tolist()
        assert any(abs(score - 1 / (1 + math.exp(-score))) > 0.05 for score in expected)
        scores = engine.run(model, row, **TASK).results[0]["output"]["scores"]
        assert scores == pytest.approx(expected, abs=1e-4)
    two = make_reranker(models_dir / "two", labels=2)
    expected = plain(two, query, texts).softmax(-1)[:, 1].tolist()
    scores = engine.run(two, row, **TASK).results[0]["output"]["scores"]
    assert scores == pytest.approx(expected, abs=1e-4)
    three = engine.run(make_reranker(models_dir / "three", labels=3), row, **TASK)
    assert three.failed.code == "unsupported_model" and "cross-encoder" in three.failed.hint
    assert "3 labels" in three.failed.message


def test_long_pairs_are_refused_or_cut(engine, reranker):
    rows = [
        {"query": "the cat", "documents": ["a mat", sentence(90)]},
        {"query": sentence(90), "text": sentence(70)},
        {"query": "the cat", "documents": ["a mat"]},
    ]
    refused = engine.run(reranker, rows, **TASK)
    assert refused.codes == ["too_long", "too_long", None]
    assert "document 1" in refused.results[0]["error"]["message"]
    assert "document" not in refused.results[1]["error"]["message"]
    cut = engine.run(reranker, rows, too_long="truncate", **TASK)
    options = {"truncation": "longest_first", "max_length": 64}
    expected = plain(reranker, "the cat", rows[0]["documents"], **options)[:, 0].sigmoid()
    assert cut.results[0]["output"]["scores"] == pytest.approx(expected.tolist(), abs=1e-4)
    expected = plain(reranker, rows[1]["query"], [rows[1]["text"]], **options)[:, 0].sigmoid()
    assert cut.results[1]["output"]["score"] == pytest.approx(expected.item(), abs=1e-4)


def test_bad_rows_say_what_a_row_needs(engine, reranker):
    rows = [
        {"documents": ["a"]},
        {"query": "the"},
        {"query": "the", "documents": "a mat"},
        {"query": "the", "documents": []},
        {"query": "the", "documents": ["a", 5]},
        {"query": "the", "documents": ["a", " "]},
        {"query": "the", "documents": ["a"], "text": "b"},
        {"query": " ", "text": "b"},
        {"query": "the", "documents": ["\ud83d"]},
        {"query": "the", "documents": ["a"]},
    ]
    outcome = engine.run(reranker, rows, **TASK)
    assert outcome.codes == [
        "missing_column", "missing_column", "invalid_documents", "invalid_documents",
        "invalid_documents", "empty_text", "invalid_row", "empty_text", "invalid_utf8", None,
    ]  # fmt: skip
    messages = [row["error"]["message"] for row in outcome.results[:-1]]
    assert "'query'" in messages[0] and "'documents'" in messages[1] and "'text'" in messages[1]
    assert "'documents'[1]" in messages[4]


def test_a_pair_that_goes_wrong_is_its_rows_error_once(reranker, monkeypatch):
    loaded, _ = ModelCache().get("reranking", str(reranker), torch.float32, torch.device("cpu"))
    forward = loaded.model.forward

    def scarce(input_ids: torch.Tensor, **kwargs: Any) -> Any:
        if input_ids.numel() > 40:
            raise torch.OutOfMemoryError("no room")
        return forward(input_ids=input_ids, **kwargs)

    monkeypatch.setattr(loaded.model, "forward", scarce)
    lengths = {0: (3, 9, 50, 4), 1: (5, 6, 7), 2: (60,)}
    computation = Reranking(loaded, top_n=None)
    computation.join("a", 8)
    for row, sizes in lengths.items():
        computation.add(
            [
                Prompt(row, None, (7,) * n, types=(0,) * n, part=k, parts=len(sizes), owner="a")
                for k, n in enumerate(sizes)
            ]
        )
    results = finish(computation)
    assert results.keys() == {0, 1, 2}
    assert [bool(results[row]["error"]) for row in range(3)] == [True, False, True]
    assert len(results[1]["output"]["scores"]) == 3  # type: ignore[index,call-overload]


def test_types_of_a_pair_go_only_to_models_that_take_them(engine, models_dir):
    """A tokenizer gives types of 0 and 1; this model knows type 0 alone, as RoBERTa does."""
    model = make_reranker(models_dir / "untyped", type_vocab_size=1)
    row = {"query": "the cat", "documents": ["a mat", "old town"]}
    scores = engine.run(model, [row], **TASK).results[0]["output"]["scores"]
    expected = plain(model, "the cat", row["documents"], return_token_type_ids=False)
    assert scores == pytest.approx(expected[:, 0].sigmoid().tolist(), abs=1e-4)
