"""Preference optimisation: the loss of the paper, a reference that is computed once, and its data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import log_softmax, logsigmoid
from transformers import AutoModelForCausalLM, AutoTokenizer

from scheduler.footprint import ModelShape, training_bytes
from shared.errors import InvalidSpec
from shared.examples import parse_example, read_examples
from shared.footprint import configuration
from shared.formats import DataFile
from shared.messages import Metric
from shared.records import BadRow
from shared.specs import TrainSpec, parse_spec
from tests.training.cases import preference_rows, preferred_chat_rows
from tests.training.harness import Gang, make_assignment, write_rows
from tests.training.models import make_gpt2, make_llama
from workers.ranks.train.device import Compute
from workers.ranks.train.examples import Examples
from workers.ranks.train.tasks import open_task
from workers.ranks.train.tasks.preferences import REFERENCE, Preferences

CPU = Compute(device=torch.device("cpu"), backend="gloo", half=None)
BASE = {"kind": "train", "task": "text-generation", "model": "m", "data": {"train": "x"}}


def spec(**preference: Any) -> TrainSpec:
    parsed = parse_spec(BASE | {"preference": preference})
    assert isinstance(parsed, TrainSpec)
    return parsed


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_gpt2(tmp_path_factory.mktemp("models") / "gpt2")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    return write_rows(folder / "train.jsonl", preference_rows(90, seed=3))


def opened(model: Path, file: Path, **preference: Any) -> tuple[Preferences, Examples]:
    task = open_task(spec(**preference), model, DataFile(file))
    assert isinstance(task, Preferences)
    return task, task.read(DataFile(file))


def likelihood(model: Any, tokenizer: Any, prompt: str, answer: str) -> torch.Tensor:
    """Of the answer and the end of text behind it, token by token."""
    asked, given = (tokenizer(text)["input_ids"] for text in (prompt, answer))
    ids = torch.tensor([[*asked, *given, tokenizer.eos_token_id]])
    scores = log_softmax(model(input_ids=ids).logits[0, :-1], dim=-1)
    each = scores[torch.arange(len(scores)), ids[0, 1:]]
    return each[len(asked) - 1 :].sum()


def test_the_loss_is_what_the_paper_says(gpt2: Path, pairs: Path) -> None:
    task, examples = opened(gpt2, pairs, beta=0.3, label_smoothing=0.2)
    reference = AutoModelForCausalLM.from_pretrained(gpt2).eval()
    policy = task.loaded.model.eval()
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(torch.linspace(-0.1, 0.1, parameter.numel()).view_as(parameter))
    rows, tokenizer = preference_rows(90, seed=3), AutoTokenizer.from_pretrained(gpt2)

    def rewards(row: dict[str, str]) -> list[torch.Tensor]:
        return [
            0.3 * (likelihood(policy, tokenizer, row["prompt"], row[name])
                   - likelihood(reference, tokenizer, row["prompt"], row[name]))
            for name in ("chosen", "rejected")
        ]  # fmt: skip

    chosen = [5, 17, 60]
    margins = torch.stack([a - b for a, b in (rewards(rows[i]) for i in chosen)])
    expected = -(0.8 * logsigmoid(margins) + 0.2 * logsigmoid(-margins)).sum()
    with torch.no_grad():
        at_start = [
            [float(likelihood(reference, tokenizer, row["prompt"], row[name])) for row in rows]
            for name in ("chosen", "rejected")
        ]
    known = examples.beside(dict(zip(REFERENCE, np.array(at_start), strict=True)))
    batch = task.batch(known, chosen, seed=0)
    loss = task.loss(policy, batch, CPU)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    with torch.inference_mode():
        values = task.conclude(task.measure(policy, batch)).values
    assert values["reward_margin"] == pytest.approx(margins.mean().item(), rel=1e-3)
    assert values["reward_accuracy"] == pytest.approx((margins > 0).float().mean().item())
    assert values["reward_margin"] == pytest.approx(
        values["reward_chosen"] - values["reward_rejected"]
    )


def test_of_a_chat_only_the_answers_count(tmp_path: Path) -> None:
    rows = preferred_chat_rows(6, seed=4)
    task, examples = opened(make_llama(tmp_path / "llama"), write_rows(tmp_path / "t.jsonl", rows))
    tokenizer = task.loaded.tokenizer
    for index, row in enumerate(rows):
        for before, name in (("", "chosen"), ("other_", "rejected")):
            begin, end = examples.ragged[f"{before}learned"][index].tolist()
            learned = tokenizer.decode(examples.ragged[f"{before}tokens"][index][begin:end])
            assert learned.split() == [*row[name].split(), "</s>"]


def test_pairs_that_lose_an_answer_to_the_limit_weigh_nothing(tmp_path: Path, gpt2: Path) -> None:
    long = " ".join(["the"] * 70) + " "
    rows = [
        {"prompt": "the old ", "chosen": "dog", "rejected": "cat"},
        {"prompt": long, "chosen": "dog", "rejected": "cat"},
    ]
    task, examples = opened(gpt2, write_rows(tmp_path / "t.jsonl", rows))
    assert examples.weights.tolist() == [1, 0]
    assert examples.cut.tolist() == [False, True]
    numbers = dict.fromkeys(REFERENCE, np.zeros(2))
    batch = task.batch(examples.beside(numbers), [0, 1], seed=0)
    alone = task.batch(examples.beside(numbers), [0], seed=0)
    model = task.loaded.model.eval()
    assert task.loss(model, batch, CPU).item() == pytest.approx(task.loss(model, alone, CPU).item())
    gang = Gang(
        make_assignment(
            tmp_path / "work", gpt2, write_rows(tmp_path / "none.jsonl", rows[1:]),
            task="text-generation", spec_fields={"preference": {}},
        )
    ).run()  # fmt: skip
    assert gang.failed.code == "nothing_to_learn"


def trained(work: Path, gpt2: Path, pairs: Path, cache: Path | None, ranks: int) -> Gang:
    return Gang(
        make_assignment(
            work, gpt2, pairs, ranks=ranks, cache=cache, validation=pairs, task="text-generation",
            spec_fields={"preference": {}}, batch_size=16, epochs=1, learning_rate=1e-3, dropout=0.0,
        )
    ).run()  # fmt: skip


def kept(cache: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (cache / "reference").iterdir()}


def test_the_reference_is_computed_once_and_by_any_number_of_ranks_the_same(
    tmp_path: Path, gpt2: Path, pairs: Path
) -> None:
    first = trained(tmp_path / "1", gpt2, pairs, tmp_path / "cache", ranks=2)
    assert "reference of 90 training pairs computed" in first.log.read_text()
    again = trained(tmp_path / "2", gpt2, pairs, tmp_path / "cache", ranks=2)
    assert "reference of 90 training pairs from the cache" in again.log.read_text()
    assert again.weights == first.weights
    for ranks, name in ((1, "alone"), (4, "four")):
        trained(tmp_path / name, gpt2, pairs, tmp_path / f"cache-{name}", ranks)
        assert kept(tmp_path / f"cache-{name}") == kept(tmp_path / "cache")
    for path in (tmp_path / "cache" / "reference").iterdir():
        path.write_bytes(path.read_bytes()[:100])
    damaged = trained(tmp_path / "3", gpt2, pairs, tmp_path / "cache", ranks=2)
    assert "pairs computed" in damaged.log.read_text()
    without = trained(tmp_path / "4", gpt2, pairs, None, ranks=2)
    assert damaged.weights == without.weights == first.weights


def test_ranks_that_see_other_pairs_do_not_wait_for_one_another(
    tmp_path: Path, gpt2: Path, pairs: Path
) -> None:
    other = write_rows(tmp_path / "other.jsonl", preference_rows(70, seed=4))
    assignment = make_assignment(
        tmp_path / "work", gpt2, pairs, ranks=2, batch_size=16, max_steps=1, task="text-generation",
        spec_fields={"preference": {}},
    )  # fmt: skip
    gang = Gang(assignment, differing={1: {"train_path": str(other)}}).run()
    assert gang.failed.code == "ranks_disagree"
    assert "do not see the same training" in gang.failed.message


def test_a_model_that_changed_has_another_reference(
    tmp_path: Path, gpt2: Path, pairs: Path
) -> None:
    """What comes out of one such training begins the next with rewards of its own."""
    first = trained(tmp_path / "1", gpt2, pairs, tmp_path / "cache", ranks=1)
    before = kept(tmp_path / "cache")
    second = trained(tmp_path / "2", first.model, pairs, tmp_path / "cache", ranks=1)
    assert len(kept(tmp_path / "cache")) == len(before) + 1
    first_margin, second_margin = (gang.of(Metric)[0].values["loss"] for gang in (first, second))
    # Rewards begin at nothing: ln 2, however well the model tells the answers apart already.
    assert first_margin == pytest.approx(0.6931, abs=1e-3)
    assert second_margin == pytest.approx(0.6931, abs=1e-3)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"task": "fill-mask", "preference": {}}, "preference is for task 'text-generation'"),
        (
            {"preference": {}, "method": "distillation", "teacher": "t"},
            "preference goes with method 'full' or 'lora', not 'distillation'",
        ),
        ({"preference": {}, "hyperparameters": {"packing": True}}, "packing joins plain texts"),
        (
            {"preference": {}, "hyperparameters": {"label_smoothing": 0.1}},
            "set preference.label_smoothing",
        ),
        ({"preference": {"beta": 0}}, "preference.beta must be above 0, not 0"),
        ({"preference": {"label_smoothing": 0.5}}, "preference.label_smoothing must be below 0.5"),
        (
            {"data": {"train": "x", "columns": {"chosen": "good"}}},
            "data.columns.chosen does not apply to task 'text-generation'",
        ),
        (
            {"preference": {}, "data": {"train": "x", "columns": {"completion": "good"}}},
            "does not apply to task 'text-generation' with preference, which reads messages, prompt",
        ),
        (
            {"preference": {}, "data": {"train": "x", "format": "text"}},
            "data.format 'text' does not apply to task 'text-generation' with preference",
        ),
    ],
)
def test_contradictions_are_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidSpec) as refused:
        parse_spec(BASE | changes)
    assert says in refused.value.message


@pytest.mark.parametrize(
    ("row", "code", "says"),
    [
        ({"prompt": "a", "chosen": "b"}, "missing_column", "no column 'rejected'"),
        ({"chosen": "b", "rejected": "c"}, "missing_column", "no column 'prompt'"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "invalid_preference", "are the same"),
        ({"prompt": "a", "chosen": " ", "rejected": "b"}, "invalid_text", "'chosen' is empty"),
        ({"prompt": "a", "chosen": ["b"], "rejected": "c"}, "invalid_text", "must be a string"),
        (
            {"messages": [{"role": "assistant", "content": "a"}], "chosen": "b", "rejected": "c"},
            "invalid_messages",
            "ends with a turn of the assistant",
        ),
    ],
)
def test_rows_that_prefer_nothing_are_refused(row: dict[str, Any], code: str, says: str) -> None:
    with pytest.raises(BadRow) as refused:
        parse_example(row, spec())
    assert refused.value.code == code
    assert says in refused.value.message


def test_pairs_of_csv(tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    chat = '"[{""role"": ""user"", ""content"": ""x""}]"'
    path.write_text(f"messages,prompt,chosen,rejected\n,a ,b,c\n{chat},,b,c\n,,b,c\n")
    sizes = [placed.example.size for placed in read_examples(DataFile(path, "csv"), spec())]
    assert sizes == [3, 1 + 16 + 1 + 16, 1]


def test_the_footprint_counts_both_answers_and_no_second_model() -> None:
    shape = ModelShape(
        tensors=(("w", 10_000_000),), weight_bytes=40_000_000, model_type="gpt2", hidden=256,
        layers=6, heads=8, kv_heads=8, head_dim=32, intermediate=1024, vocabulary=8000, positions=512,
    )  # fmt: skip

    def needs(batch: int, **fields: Any) -> int:
        parsed = parse_spec(BASE | {"hyperparameters": {"batch_size": batch}, **fields})
        assert isinstance(parsed, TrainSpec)
        asked = configuration(parsed, None, None, labels=0, length=200, device="cpu")
        return training_bytes(shape, asked)

    assert needs(8, preference={}) == needs(16)
