"""Embeddings: which pairs are told apart, how a search is scored, and what is delivered."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModel, AutoTokenizer

from shared.formats import DataFile
from shared.messages import Metric
from shared.specs import TrainSpec
from tests.training.cases import pair_rows
from tests.training.harness import Gang, make_assignment, write_rows
from workers.ranks.loading import LoadError
from workers.ranks.train.device import Compute
from workers.ranks.train.examples import Batch
from workers.ranks.train.failures import DataProblem
from workers.ranks.train.gang import Gang as Ranks
from workers.ranks.train.tasks import Task, embeddings, open_task
from workers.ranks.train.tasks.retrieval import contrastive_loss, retrieval_scores, same_pairs

CPU = Compute(torch.device("cpu"), "gloo", None)


def opened(bert: Path, file: Path, **hyperparameters: Any) -> Task:
    options = {"dropout": 0.0, **hyperparameters}
    fields = {"task": "embeddings", "model": "m", "data": {"train": "x"}}
    return open_task(
        TrainSpec.model_validate({**fields, "hyperparameters": options}), bert, DataFile(file)
    )


def pairs(*rows: tuple[str, str]) -> list[dict[str, str]]:
    return [{"text": text, "positive": other} for text, other in rows]


@pytest.fixture(scope="module", params=[1, 2], ids=["one-rank", "two-ranks"])
def trained(
    request: pytest.FixtureRequest, bert: Path, tmp_path_factory: pytest.TempPathFactory
) -> Gang:
    folder = tmp_path_factory.mktemp("embeddings")
    assignment = make_assignment(
        folder / "w",
        bert,
        write_rows(folder / "train.jsonl", pair_rows(150, 1)),
        ranks=request.param,
        task="embeddings",
        validation=write_rows(folder / "validation.jsonl", pair_rows(70, 2)),
        epochs=3,
        batch_size=16,
        learning_rate=5e-3,
        dropout=0.0,
        max_length=32,
    )
    return Gang(assignment).run()


def test_a_texts_other_is_found_and_was_not_before(trained: Gang, bert: Path) -> None:
    values = trained.done.summary["metrics"]
    assert set(values) == {"loss", "recall_at_1", "recall_at_5", "recall_at_10", "mrr"}
    assert values["recall_at_1"] > 0.8
    assert values["recall_at_1"] <= values["mrr"] <= values["recall_at_10"] <= 1
    file = Path(trained.assignment.validation_path or "")
    task = opened(bert, file)
    before = task.evaluate(
        task.loaded.model,
        task.read(DataFile(file)),
        batch_size=16,
        compute=CPU,
        gang=Ranks(0, 1, torch.device("cpu")),
    )
    assert before.values["recall_at_1"] < 0.1
    assert before.details == {"searched_pairs": 70}
    metrics = json.loads((trained.model.parent / "metrics.json").read_text())
    reached = [m.values["recall_at_1"] for m in trained.of(Metric) if m.split == "validation"]
    assert metrics["best"]["recall_at_1"] == max(reached)


def test_the_delivered_folder_says_how_it_is_pooled(trained: Gang) -> None:
    """Reads the folder as Sentence Transformers does: modules.json, then each module's own files."""
    folder = trained.model
    modules = json.loads((folder / "modules.json").read_text())
    assert [(m["path"], m["type"].rpartition(".")[2]) for m in modules] == [
        ("", "Transformer"),
        ("1_Pooling", "Pooling"),
    ]
    pooling = json.loads((folder / "1_Pooling" / "config.json").read_text())
    assert [name for name, value in pooling.items() if value is True] == [
        "pooling_mode_mean_tokens"
    ]
    model, tokenizer = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert pooling["word_embedding_dimension"] == model.config.hidden_size
    limit = json.loads((folder / "sentence_bert_config.json").read_text())
    assert limit["max_seq_length"] == 32

    def vectors(texts: list[str]) -> torch.Tensor:
        inputs = tokenizer(texts, padding=True, return_tensors="pt")
        inputs.pop("token_type_ids", None)
        with torch.inference_mode():
            hidden = model(**inputs).last_hidden_state
        mask = inputs["attention_mask"].unsqueeze(-1)
        pooled = (hidden * mask).sum(1) / mask.sum(1)
        return torch.nn.functional.normalize(pooled, dim=-1)

    rows = pair_rows(70, 2)
    first, second = (vectors([row[side] for row in rows]) for side in ("text", "positive"))
    similarity = (first @ second.T).double().numpy()
    same = same_pairs(*([row[side].encode() for row in rows] for side in ("text", "positive")))
    again = retrieval_scores(similarity, same)
    assert math.isclose(
        again["recall_at_1"], trained.done.summary["metrics"]["recall_at_1"], abs_tol=0.02
    )


def test_a_pair_is_no_negative_of_one_that_shares_a_text(bert: Path, tmp_path: Path) -> None:
    rows = pairs(("fish", "dog"), ("cat", "dog"), ("fish", "bird"), ("bread", "fish"), ("a", "of"))
    file = write_rows(tmp_path / "rows.jsonl", rows)
    task = opened(bert, file, contrastive_temperature=0.1)
    examples = task.read(DataFile(file))
    batch = task.batch(examples, range(5), seed=0)
    assert batch.inputs["input_ids"].shape == (10, 3)
    same = batch.targets["same"]
    assert [[j for j in range(5) if same[i, j]] for i in range(5)] == [
        [0, 1, 2, 3],
        [0, 1],
        [0, 2, 3],
        [3],
        [4],
    ]
    # By hand, from the vectors: only what is not the same is told apart.
    with torch.no_grad():
        hidden = task.loaded.model(**batch.inputs).last_hidden_state
    mask = batch.inputs["attention_mask"]
    first, second = embeddings.mean_vectors(hidden, mask).chunk(2)
    expected = 0.0
    for i in range(5):
        others = [j for j in range(5) if j == i or not same[i, j]]
        logits = torch.stack([first[i] @ second[j] for j in others]) / 0.1
        expected -= float(torch.log_softmax(logits, 0)[others.index(i)])
    assert math.isclose(
        float(task.loss(task.loaded.model, batch, CPU).detach()), expected, rel_tol=1e-5
    )


def test_a_pair_alone_teaches_nothing_and_breaks_nothing(bert: Path, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.jsonl", pairs(("fish", "dog"), ("fish", "dog")))
    task = opened(bert, file)
    examples = task.read(DataFile(file))
    for indices in ([0], [0, 1]):
        task.loaded.model.zero_grad()
        loss = task.loss(task.loaded.model, task.batch(examples, indices, seed=0), CPU)
        loss.backward()  # type: ignore[no-untyped-call]
        assert float(loss.detach()) == 0
        gradients = [p.grad for p in task.loaded.model.parameters() if p.grad is not None]
        assert gradients and all(float(gradient.abs().max()) == 0 for gradient in gradients)


def test_the_model_is_called_once_a_batch(bert: Path, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.jsonl", pairs(("fish", "dog"), ("a", "of")))
    task = opened(bert, file)
    calls: list[int] = []
    task.loaded.model.register_forward_hook(lambda *_: calls.append(1))
    batch: Batch = task.batch(task.read(DataFile(file)), [0, 1], seed=0)
    task.loss(task.loaded.model, batch, CPU)
    assert calls == [1]


def test_data_and_models_that_cannot_be_used(bert: Path, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.jsonl", pairs(("fish", "dog")))
    with pytest.raises(DataProblem, match=r"rows\.jsonl: the file has one pair") as caught:
        opened(bert, file).read(DataFile(file))
    assert caught.value.code == "too_few_rows"
    file = write_rows(tmp_path / "rows.jsonl", [{"text": "a", "positive": " "}])
    with pytest.raises(DataProblem, match="line 1: column 'positive' is empty"):
        opened(bert, file).read(DataFile(file))
    (tmp_path / "none").mkdir()
    with pytest.raises(LoadError):
        opened(tmp_path / "none", file)


def test_a_large_pool_is_cut_and_always_to_the_same(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embeddings, "POOL", 9)
    file = write_rows(tmp_path / "rows.jsonl", pair_rows(30, 4))
    task = opened(bert, file)
    alone = Ranks(0, 1, torch.device("cpu"))
    found = [
        task.evaluate(
            task.loaded.model, task.read(DataFile(file)), batch_size=4, compute=CPU, gang=alone
        )
        for _ in range(2)
    ]
    assert found[0] == found[1]
    assert found[0].details == {"searched_pairs": 9}
    assert task.loaded.model.training


# --- scores -------------------------------------------------------------------------------------


def test_scores_of_a_search_worked_by_hand() -> None:
    similarity = np.array([[0.9, 0.1, 0.2], [0.8, 0.5, 0.6], [0.3, 0.3, 0.3]])
    same = np.eye(3, dtype=bool)
    # Ranks 1, 3, and 3: of equals the own one comes last.
    assert retrieval_scores(similarity, same) == {
        "recall_at_1": 1 / 3,
        "recall_at_5": 1.0,
        "recall_at_10": 1.0,
        "mrr": (1 + 1 / 3 + 1 / 3) / 3,
    }
    same[1, 0] = same[2, 1] = True
    assert retrieval_scores(similarity, same)["mrr"] == (1 + 1 / 2 + 1 / 2) / 3
    loss = contrastive_loss(np.array([[1.0, 0.0], [0.0, 1.0]]), np.eye(2, dtype=bool), 0.5)
    assert math.isclose(loss, math.log(1 + math.exp(-2)))


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("abcde")), min_size=1))
def test_who_is_the_same(texts: list[tuple[str, str]]) -> None:
    first = [a.encode() for a, _ in texts]
    second = [b.encode() for _, b in texts]
    same = same_pairs(first, second)
    for i, j in np.ndindex(same.shape):
        shares = first[i] == first[j] or second[i] == second[j] or second[j] == first[i]
        assert same[i, j] == shares
    if same.all():
        similarity = np.random.default_rng(0).random(same.shape)
        assert retrieval_scores(similarity, same)["recall_at_1"] == 1.0
        assert contrastive_loss(similarity, same, 0.05) == 0.0
