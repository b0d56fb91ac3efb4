"""Each optimizer learns, does what torch's does, and goes on bitwise after a SIGKILL."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from shared.errors import InvalidSpec
from shared.messages import Metric
from shared.specs import Hyperparameters, parse_spec
from tests.training.harness import Gang, make_assignment, make_rows, write_rows
from tests.training.test_resume import Uninterrupted, killed
from workers.ranks.checkpoint import read_tensors
from workers.ranks.train.optimizer import add_l1, make_optimizer, regularised

# An Adafactor step is relative to the weights, and SGD's to the gradients.
RATES = {"adamw": 5e-3, "adam": 5e-3, "sgd": 0.1, "adafactor": 0.02}
STATE = {
    "adamw": {"step", "exp_avg", "exp_avg_sq"},
    "adam": {"step", "exp_avg", "exp_avg_sq"},
    "sgd": {"momentum_buffer"},
    "adafactor": {"step", "row_var", "col_var", "variance"},
}


def options(optimizer: str, **more: Any) -> dict[str, Any]:
    return {"optimizer": optimizer, "learning_rate": RATES[optimizer], "batch_size": 16, **more}


@pytest.fixture(scope="module")
def uninterrupted(
    tmp_path_factory: pytest.TempPathFactory, bert: Path, train_file: Path
) -> Uninterrupted:
    return Uninterrupted(tmp_path_factory.mktemp("uninterrupted"), bert, train_file)


@pytest.fixture(scope="module")
def pretrained(
    tmp_path_factory: pytest.TempPathFactory, bert: Path, train_file: Path
) -> tuple[Path, Path, Path]:
    """A model that knows the words, and data by whose labels all of its answers are wrong: (model,
    train, validation). From nothing, plain SGD gets no transformer going."""
    folder = tmp_path_factory.mktemp("pretrained")
    chosen = options("adamw", epochs=6, warmup_ratio=0.1, dropout=0.0)
    model = Gang(make_assignment(folder, bert, train_file, **chosen)).run().model

    # Backwards the labels sort in another order, and no class keeps its place in the head.
    def renamed(name: str, rows: list[dict[str, Any]]) -> Path:
        return write_rows(folder / name, ({**row, "label": row["label"][::-1]} for row in rows))

    return (
        model,
        renamed("train.jsonl", make_rows(250, seed=1)),
        renamed("validation.jsonl", make_rows(70, seed=2)),
    )


@pytest.mark.parametrize("optimizer", RATES)
def test_it_learns(optimizer: str, tmp_path: Path, pretrained: tuple[Path, Path, Path]) -> None:
    model, train, validation = pretrained
    chosen = options(optimizer, epochs=3, warmup_ratio=0.1, dropout=0.0)
    gang = Gang(make_assignment(tmp_path, model, train, validation=validation, **chosen)).run()
    assert gang.done.summary["metrics"]["accuracy"] > 0.9


@pytest.mark.parametrize(
    "chosen",
    [
        *(pytest.param(options(name, epochs=2), id=name) for name in RATES),
        pytest.param(options("sgd", epochs=2, momentum=0.0), id="sgd without state"),
        pytest.param(
            options("adamw", epochs=2, l1=1e-4, micro_batch_size=2, freeze=("bert.embeddings.*",)),
            id="l1",
        ),
    ],
)
def test_resume_is_bitwise_exact(
    chosen: dict[str, Any], tmp_path: Path, bert: Path, train_file: Path, uninterrupted: Any
) -> None:
    first = killed(tmp_path / "1", bert, train_file, ranks=2, rank=1, after=10, **chosen)
    newest = first.checkpoints[0]
    names = {name.split(".")[0] for name in read_tensors(newest)}
    kept = STATE[chosen["optimizer"]] if chosen.get("momentum") != 0.0 else set()
    assert names == {"parameter", *kept}
    second = Gang(
        make_assignment(
            tmp_path / "2", bert, train_file, ranks=2, resume_from=first.checkpoints, **chosen
        )
    ).run()
    assert second.done.summary["resumed_from"]["step"] == newest.step
    assert second.weights == uninterrupted.weights(2, chosen)


class Small(nn.Module):
    """A matrix, a bias, a norm, and a frozen matrix."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(4, 3)
        self.norm = nn.LayerNorm(3)
        self.frozen = nn.Linear(3, 3, bias=False)
        self.frozen.weight.requires_grad_(False)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.frozen(self.norm(self.linear(inputs)))  # type: ignore[no-any-return]


def trained(make: Callable[[Small], torch.optim.Optimizer], l1: float = 0.0) -> Small:
    model = Small()
    optimizer = make(model)
    inputs = torch.linspace(-1, 1, 20).reshape(5, 4)
    for _ in range(5):
        model(inputs).square().sum().backward()
        if l1:
            add_l1(regularised(model), l1)
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.mark.parametrize("optimizer", RATES)
def test_only_matrices_decay(optimizer: str) -> None:
    model = Small()
    chosen = Hyperparameters(optimizer=optimizer, weight_decay=0.1)  # type: ignore[arg-type]
    decays = {
        id(p): g["weight_decay"]
        for g in make_optimizer(model, chosen).param_groups
        for p in g["params"]
    }
    named = {name: decays.get(id(p)) for name, p in model.named_parameters()}
    assert named == {
        "linear.weight": 0.1,
        "linear.bias": 0.0,
        "norm.weight": 0.0,
        "norm.bias": 0.0,
        "frozen.weight": None,
    }
    assert [id(p) for p in regularised(model)] == [id(model.linear.weight)]


@pytest.mark.parametrize(("optimizer", "decay"), [("adamw", 0.01), ("adam", 0.0), ("sgd", 0.0)])
def test_decay_that_is_not_given_is_that_of_torch(optimizer: str, decay: float) -> None:
    chosen = Hyperparameters(optimizer=optimizer)  # type: ignore[arg-type]
    assert make_optimizer(Small(), chosen).param_groups[0]["weight_decay"] == decay
    theirs = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "sgd": torch.optim.SGD}
    assert theirs[optimizer](Small().parameters()).defaults["weight_decay"] == decay


def test_adam_decays_in_the_gradient_and_adamw_beside_it_as_torch_does() -> None:
    def ours(optimizer: str) -> torch.Tensor:
        chosen = {"optimizer": optimizer, "weight_decay": 0.5, "learning_rate": 0.01}
        model = trained(lambda m: make_optimizer(m, Hyperparameters.model_validate(chosen)))
        return model.linear.weight.detach()

    def theirs(kind: Any, **more: Any) -> torch.Tensor:
        def make(model: Small) -> torch.optim.Optimizer:
            rest = [model.linear.bias, *model.norm.parameters()]
            groups = [{"params": [model.linear.weight], "weight_decay": 0.5}, {"params": rest}]
            optimizer: torch.optim.Optimizer = kind(groups, lr=0.01, weight_decay=0.0, **more)
            return optimizer

        return trained(make).linear.weight.detach()

    torch.testing.assert_close(ours("adamw"), theirs(torch.optim.AdamW))
    torch.testing.assert_close(ours("adam"), theirs(torch.optim.Adam))
    torch.testing.assert_close(ours("sgd"), theirs(torch.optim.SGD, momentum=0.9))
    torch.testing.assert_close(ours("adafactor"), theirs(torch.optim.Adafactor))
    assert (ours("adam") - ours("adamw")).abs().max() > 1e-3


def test_l1_is_the_gradient_of_the_sum_of_sizes() -> None:
    model = Small()
    with torch.no_grad():
        model.linear.weight[0, 0] = 0.0
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    weight = model.linear.weight.detach().clone().requires_grad_()
    (0.3 * weight.abs().sum()).backward()
    add_l1(regularised(model), 0.3)
    assert weight.grad is not None and model.linear.weight.grad is not None
    assert torch.equal(model.linear.weight.grad, weight.grad)
    rest = [model.linear.bias, *model.norm.parameters(), model.frozen.weight]
    assert all(p.grad is not None and not p.grad.any() for p in rest)


def test_l1_makes_weights_small_and_stays_out_of_the_loss(
    tmp_path: Path, bert: Path, train_file: Path
) -> None:
    def run(name: str, steps: int, l1: float) -> Gang:
        chosen = options("adamw", max_steps=steps, epochs=10, weight_decay=0.0, dropout=0.0, l1=l1)
        return Gang(make_assignment(tmp_path / name, bert, train_file, ranks=2, **chosen)).run()

    def near_zero(gang: Gang) -> float:
        weights = load_file(gang.model / "model.safetensors")
        matrices = torch.cat([w.flatten() for w in weights.values() if w.ndim == 2])
        return float((matrices.abs() < 1e-3).float().mean())

    def first_loss(gang: Gang) -> float:
        return next(m.values["loss"] for m in gang.of(Metric) if m.split == "train")

    without, with_l1 = run("without", 60, 0.0), run("with", 60, 1e-2)
    assert near_zero(with_l1) > 3 * near_zero(without)
    # The first loss is that of the weights before any update.
    assert first_loss(with_l1) == first_loss(without)


@pytest.mark.parametrize(
    ("hyperparameters", "says"),
    [
        (
            {"momentum": 0.5},
            "hyperparameters.momentum does not apply to optimizer 'adamw': it belongs to sgd",
        ),
        (
            {"optimizer": "sgd", "betas": [0.8, 0.9]},
            "hyperparameters.betas does not apply to optimizer 'sgd': it belongs to adamw and adam",
        ),
        (
            {"optimizer": "adafactor", "eps": 1e-6},
            "hyperparameters.eps does not apply to optimizer 'adafactor': it belongs to adamw and "
            "adam",
        ),
        ({"optimizer": "lion"}, "hyperparameters.optimizer must be 'adamw', "),
    ],
)
def test_an_option_of_another_optimizer_is_refused(
    hyperparameters: dict[str, Any], says: str
) -> None:
    spec = {
        "kind": "train",
        "task": "text-classification",
        "model": "m",
        "data": {"train": "x"},
    }
    with pytest.raises(InvalidSpec) as caught:
        parse_spec({**spec, "hyperparameters": hyperparameters})
    assert caught.value.message.startswith(says)
    # One that was stored, with every field set, is taken again.
    stored = parse_spec({**spec, "hyperparameters": {"optimizer": "sgd", "momentum": 0.5}})
    assert parse_spec(stored.model_dump(mode="json")) == stored
