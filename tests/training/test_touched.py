"""Gradients of embeddings by the rows that a batch touches: the same training, resumed as exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, BertConfig, BertForMaskedLM, BertModel

from shared.messages import Metric
from tests.training.harness import Gang, make_assignment, make_bert
from tests.training.test_resume import EVERY_5, killed
from workers.ranks.train.gang import Gang as Ranks
from workers.ranks.train.touched import TouchedRows

ALONE = Ranks(0, 1, torch.device("cpu"))
WIDE = 40_000
"""Tokens that the model knows: many more than the texts have."""
OPTIONS: dict[str, Any] = {
    "max_steps": 20, "batch_size": 12, "micro_batch_size": 2, "learning_rate": 3e-3,
    "weight_decay": 0.1, "max_grad_norm": 0.5,
}  # fmt: skip


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_bert(tmp_path_factory.mktemp("wide"))
    config = AutoConfig.from_pretrained(folder)
    config.vocab_size = WIDE
    torch.manual_seed(0)
    BertModel(config).save_pretrained(folder)
    return folder


def rows_of(model: nn.Module) -> TouchedRows:
    return TouchedRows(model, 100.0, ALONE)


def test_the_gradient_is_that_of_autograd() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(WIDE, 32, padding_idx=0), nn.Linear(32, 1))
    weight = model[0].weight
    tokens = torch.tensor([[5, 0, 39_999, 5], [7, 5, 0, 0]])

    def passes() -> None:
        """Two micro-batches, one of which looks up twice."""
        (model(tokens).square().sum() + 2 * model(tokens[:1]).sum()).backward()
        model(tokens[1:]).exp().sum().backward()

    passes()
    assert weight.grad is not None
    wanted = weight.grad.clone()
    model.zero_grad()
    rows = rows_of(model)
    for _ in range(2):  # what a step leaves is gone in the next
        passes()
        assert weight.grad is None
        (gradient,) = rows.exchange()
        assert gradient.shape == (3, 32)
        rows.put()
        assert (weight.grad - wanted).abs().max() < 1e-6
        rows.clear()
        assert weight.grad is None
    model(tokens[1:, :1]).sum().backward()
    rows.exchange()
    rows.put()
    assert weight.grad[:, 0].nonzero().tolist() == [[7]]


def test_a_rank_that_touched_nothing_has_no_rows() -> None:
    rows = rows_of(nn.Sequential(nn.Embedding(WIDE, 32), nn.Linear(32, 1)))
    (gradient,) = rows.exchange()
    assert gradient.shape == (0, 32)


def test_evaluation_leaves_no_trace() -> None:
    model = nn.Sequential(nn.Embedding(WIDE, 32), nn.Linear(32, 1))
    rows = rows_of(model)
    with torch.inference_mode():
        model(torch.tensor([3]))
    assert rows.exchange()[0].shape == (0, 32)


def test_what_is_small_frozen_or_shared_is_left_alone() -> None:
    config = BertConfig(vocab_size=WIDE, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    assert rows_of(BertForMaskedLM(config)).names == []  # the head has it too
    assert rows_of(BertModel(config)).names == ["embeddings.word_embeddings.weight"]
    frozen = BertModel(config).requires_grad_(False)
    assert rows_of(frozen).names == []
    only = BertModel(config).requires_grad_(False)
    only.embeddings.word_embeddings.requires_grad_(True)
    assert rows_of(only).names == []  # DDP would have nothing to exchange
    # Most rows would be touched.
    assert TouchedRows(BertModel(config), WIDE + 1.0, ALONE).names == []


def test_a_weight_that_is_used_without_its_module_is_left_alone() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.last = nn.Embedding(WIDE, 32), nn.Linear(32, 32)

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(self.last(self.words(tokens)), self.words.weight)

    model, tokens = Tied(), torch.tensor([3, 5])
    model(tokens).square().sum().backward()
    wanted = model.words.weight.grad
    assert wanted is not None
    model.zero_grad()
    rows = rows_of(model)
    assert rows.names == ["words.weight"]
    rows.try_out(lambda: model(tokens).sum().backward())
    assert rows.names == []
    model.zero_grad()
    model(tokens).square().sum().backward()
    assert model.words.weight.grad is not None
    assert torch.equal(model.words.weight.grad, wanted)


def test_what_only_looks_up_stays_and_nothing_is_left_of_the_trial() -> None:
    model = nn.Sequential(nn.Embedding(WIDE, 32), nn.Linear(32, 1))
    rows = rows_of(model)
    rows.try_out(lambda: model(torch.tensor([3])).sum().backward())
    assert rows.names == ["0.weight"]
    assert rows.exchange()[0].shape == (0, 32)


def test_two_ranks_train_as_one_does(tmp_path: Path, wide: Path, train_file: Path) -> None:
    """One rank exchanges nothing and leaves the gradient to autograd."""
    told = []
    for ranks in (1, 2):
        assignment = make_assignment(
            tmp_path / str(ranks), wide, train_file, ranks=ranks, dropout=0.0, **OPTIONS
        )
        metrics = Gang(assignment).run().of(Metric)
        told.append([(m.values["loss"], m.values["grad_norm"]) for m in metrics])
    assert len(told[0]) == len(told[1]) == OPTIONS["max_steps"]
    assert any(norm > OPTIONS["max_grad_norm"] for _, norm in told[0]), "nothing was clipped"
    for one, two in zip(*told, strict=True):
        assert two == pytest.approx(one, rel=2e-3)
    assert told[0][0] == pytest.approx(told[1][0], rel=1e-5)


@pytest.mark.parametrize("ranks", [2, 3])
def test_killed_and_resumed_it_ends_bitwise_the_same(
    tmp_path: Path, wide: Path, train_file: Path, ranks: int
) -> None:
    whole = Gang(make_assignment(tmp_path / "w", wide, train_file, ranks=ranks, **OPTIONS)).run()
    first = killed(tmp_path / "k", wide, train_file, ranks=ranks, rank=1, after=10, **OPTIONS)
    second = make_assignment(
        tmp_path / "r",
        wide,
        train_file,
        ranks=ranks,
        checkpoint=EVERY_5,
        resume_from=first.checkpoints,
        **OPTIONS,
    )
    assert Gang(second).run().weights == whole.weights
