"""Models in shards (FSDP2): the training of DDP, with a part of it on each rank."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from shared.messages import CheckpointRef, CheckpointWritten, Done, Metric, Notice, Progress, Report
from tests.training.cases import CASES, Case
from tests.training.harness import Gang, in_another_process, make_assignment, make_bert, write_rows
from tests.training.held import bytes_held
from workers.ranks.checkpoint import CheckpointDamaged
from workers.ranks.train.pieces import Pieces
from workers.ranks.train.sharding import span

OPTIONS: dict[str, Any] = {
    "batch_size": 12,
    "micro_batch_size": None,
    "max_steps": 18,
    "learning_rate": 5e-3,
    "dropout": 0.0,
}
EVERY_5 = {"every_steps": 5, "every_seconds": None}
KINDS = (
    "single-label", "regression", "lora", "text2text", "summarization", "completion", "embeddings",
    "preference", "preference-lora",
)  # fmt: skip


class Material:
    def __init__(self, case: Case, folder: Path) -> None:
        self.case, self.folder = case, folder
        self.model = case.model(folder / "model")
        self.train = write_rows(folder / "train.jsonl", case.rows(100, 1))
        # An odd number of batches: ranks have unequal shares of an evaluation.
        self.validation = write_rows(folder / "validation.jsonl", case.rows(33, 2))

    def gang(self, work: str, **options: Any) -> Gang:
        fields = {
            "ranks": 2,
            "parallelism": "fsdp",
            "validation": self.validation,
            "spec_fields": self.case.spec_fields,
            **self.case.hyperparameters,
            **OPTIONS,
            **options,
        }
        assignment = make_assignment(
            self.folder / work,
            self.model,
            self.train,
            task=self.case.task,
            problem=self.case.problem,
            **fields,
        )
        return Gang(assignment)


@pytest.fixture(params=[c for c in CASES if c.name in KINDS], ids=lambda case: case.name)
def material(request: pytest.FixtureRequest, tmp_path: Path) -> Material:
    return Material(request.param, tmp_path)


@pytest.fixture
def topics(tmp_path: Path) -> Material:
    return Material(CASES[0], tmp_path)


def losses(gang: Gang, split: str = "train") -> list[float]:
    return [m.values["loss"] for m in gang.of(Metric) if m.split == split]


def test_it_is_the_training_of_ddp_and_delivers_a_plain_model(material: Material) -> None:
    sharded = material.gang("sharded").run()
    whole = material.gang("whole", parallelism="ddp").run()
    assert "the model in shards (FSDP)" in sharded.log.read_text()
    assert "report_failed" not in [notice.code for notice in sharded.of(Notice)]
    assert losses(sharded) == pytest.approx(losses(whole), rel=2e-3)
    assert losses(sharded, "validation") == pytest.approx(losses(whole, "validation"), rel=2e-3)

    auto = getattr(transformers, material.case.loads_as)
    _, info = auto.from_pretrained(sharded.model, output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"] and not info["unexpected_keys"]
    assert (sharded.model / "config.json").read_text() == (whole.model / "config.json").read_text()
    theirs = load_file(whole.model / "model.safetensors")
    ours = load_file(sharded.model / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.allclose(ours[name], tensor, atol=5e-3), name
    assert not [n for n in sharded.of(Notice) if n.code == "report_failed"]
    pages = [(gang.model.parent / "report.html").read_text() for gang in (sharded, whole)]
    for said in ("<dl>", " parameters", "Evaluations"):
        assert (said in pages[0]) == (said in pages[1]), said


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"micro_batch_size": 2, "dropout": 0.2}, id="accumulation"),
        pytest.param({"gradient_checkpointing": True, "dropout": 0.2}, id="recomputed"),
        pytest.param({"precision": "bf16"}, id="bf16"),
        pytest.param({"precision": "fp16", "freeze": ["bert.embeddings.*"]}, id="fp16, frozen"),
        pytest.param({"optimizer": "sgd", "l1": 1e-4}, id="sgd"),
    ],
)
def test_killed_and_resumed_it_ends_bitwise_the_same(
    topics: Material, options: dict[str, Any]
) -> None:
    whole = topics.gang("whole", **options).run()
    assert losses(whole)[-1] < losses(whole)[0]
    first = killed(topics, "killed", ranks=2, rank=1, **options)
    second = topics.gang("resumed", resume_from=first.checkpoints, **options).run()
    newest = first.checkpoints[0]
    assert second.done.summary["resumed_from"] == {"checkpoint": newest.id, "step": newest.step}
    assert min(report.step for report in second.of(Progress)) > newest.step
    assert second.weights == whole.weights
    assert second.done.summary["metrics"] == whole.done.summary["metrics"]


@pytest.mark.parametrize("name", ["preference", "preference-lora"])
def test_preferences_go_on_bitwise_with_the_reference_that_they_began_with(
    tmp_path: Path, name: str
) -> None:
    pairs = Material(next(case for case in CASES if case.name == name), tmp_path)
    whole = pairs.gang("whole").run()
    first = killed(pairs, "killed", ranks=2, rank=1, cache=tmp_path / "cache")
    # With a reference from the cache, with one that is computed anew, and by more ranks.
    for work, options, how in (
        ("cached", {"cache": tmp_path / "cache"}, "from the cache"),
        ("anew", {}, "computed"),
        ("three", {"cache": tmp_path / "cache", "ranks": 3}, "computed"),
    ):
        gang = pairs.gang(work, resume_from=first.checkpoints, **options).run()
        assert f"training pairs {how}" in gang.log.read_text()
        if work == "three":
            assert losses(gang)[-1] == pytest.approx(losses(whole)[-1], rel=1e-2)
        else:
            assert gang.weights == whole.weights
    kept = [each.read_bytes() for each in (tmp_path / "cache" / "reference").iterdir()]
    assert len(kept) == 4
    assert len(set(kept)) == 2, "two and three ranks found other references"


def killed(material: Material, work: str, *, ranks: int, rank: int, **options: Any) -> Gang:
    """SIGKILL strikes ``rank`` somewhere behind the first checkpoint."""
    gang = material.gang(work, ranks=ranks, checkpoint=EVERY_5, **options)

    def strike(_rank: int, report: Report) -> None:
        if isinstance(report, CheckpointWritten):
            gang.kill(rank)

    gang.run(on_report=strike)
    assert gang.exit_code(rank) == -9 and not gang.of(Done), "the fault did not strike"
    return gang


def test_each_rank_writes_its_part_and_any_number_of_ranks_can_go_on(topics: Material) -> None:
    rules = {"every_steps": 4, "every_seconds": None}
    two = topics.gang("two", max_steps=18, checkpoint=rules, ranks=2).run()
    made = two.checkpoints[-1]
    files = {file.name for file in Path(made.path).iterdir()}
    parts = {f"state-0000{rank}-of-00002.safetensors" for rank in range(2)}
    assert files == parts | {"state.json", "manifest.json"}
    assert set(made.manifest) == parts | {"state.json"}
    sizes = [made.manifest[part].size for part in sorted(parts)]
    assert sizes[1] > 0.8 * sizes[0]
    assert json.loads((Path(made.path) / "state.json").read_text())["world_size"] == 2
    held = tensors(made)
    assert {n.partition(".")[0] for n in held} == {"parameter", "exp_avg", "exp_avg_sq", "step"}

    # 2 -> 1 -> 3
    last = made
    for ranks in (1, 3):
        gang = topics.gang(
            f"with-{ranks}", ranks=ranks, max_steps=18, checkpoint=rules, resume_from=[last]
        ).run()
        assert [n.code for n in gang.of(Notice)] == ["world_size_changed"]
        assert losses(gang) == pytest.approx(losses(two)[last.step :], rel=1e-3)
        last = gang.checkpoints[-1]
        assert len(list(Path(last.path).glob("*.safetensors"))) == ranks


def test_any_number_of_ranks_reads_what_was_written(topics: Material) -> None:
    [made, *_] = topics.gang("two", max_steps=7, checkpoint={"every_steps": 6}).run().checkpoints
    held, pieces = tensors(made), Pieces(made)
    for name, tensor in held.items():
        if tensor.ndim == 0:
            read = torch.zeros_like(tensor)
            pieces.copy_to(name, read)
            assert torch.equal(read, tensor)
            continue
        for ranks in (1, 3, 5):
            for first, behind in (span(len(tensor), ranks, rank) for rank in range(ranks)):
                read = torch.full_like(tensor[first:behind], torch.nan)
                pieces.copy_to(name, read, first)
                assert torch.equal(read, tensor[first:behind]), (name, first)
    with pytest.raises(CheckpointDamaged, match=r"rows of parameter.classifier.bias are missing"):
        pieces.copy_to("parameter.classifier.bias", torch.zeros(4))
    with pytest.raises(CheckpointDamaged, match="is not in it"):
        pieces.copy_to("parameter.pooler", torch.zeros(4))


def test_a_damaged_part_of_another_rank_is_noticed(topics: Material) -> None:
    rules = {"every_steps": 6, "every_seconds": None}
    newest, older = topics.gang("two", checkpoint=rules).run().checkpoints
    part = Path(newest.path) / "state-00001-of-00002.safetensors"
    part.write_bytes(part.read_bytes()[:-4])
    gang = topics.gang("resumed", resume_from=[newest, older]).run()
    assert [notice.code for notice in gang.of(Notice)] == ["checkpoint_damaged"]
    assert gang.done.summary["resumed_from"]["step"] == older.step


def test_early_stopping_goes_back_to_the_best_model(topics: Material) -> None:
    rule = {"patience": 2, "min_delta": 0.5, "metric": "loss"}
    options = {
        "early_stopping": rule,
        "eval_every_steps": 2,
        "learning_rate": 0.05,
        "max_steps": 30,
    }
    gang = topics.gang("early", **options).run()
    assert gang.done.summary["stopped_early"]
    best = gang.done.summary["best"]
    assert best["step"] < gang.done.summary["steps"], (
        "the best model is the last: nothing to restore"
    )
    assert gang.done.summary["metrics"]["loss"] == pytest.approx(best["value"], rel=1e-5)


def test_a_rank_holds_its_part_and_a_layer_of_the_model(tmp_path: Path) -> None:
    folder = make_bert(tmp_path / "bert")
    config = transformers.BertConfig.from_pretrained(
        folder, num_hidden_layers=8, hidden_size=128, intermediate_size=512
    )
    model = transformers.BertForSequenceClassification(config)
    model.save_pretrained(folder)
    size = sum(parameter.nbytes for parameter in model.parameters())

    def held(ranks: int, sharded: bool) -> tuple[int, int]:
        """Of rank 1."""
        store = tmp_path / f"store-{ranks}-{sharded}"
        with ThreadPoolExecutor(ranks) as pool:
            calls = [
                pool.submit(in_another_process, bytes_held, folder, store, rank, ranks, sharded)
                for rank in range(ranks)
            ]
        return calls[1].result()

    # Weights and two moments, and behind a backward pass gradients.
    assert held(2, sharded=False) == pytest.approx((4 * size, 3 * size), rel=0.05)
    assert held(2, sharded=True) == pytest.approx((4 * size / 2, 3 * size / 2), rel=0.1)
    assert held(4, sharded=True) == pytest.approx((4 * size / 4, 3 * size / 4), rel=0.1)


def test_the_process_of_a_rank_is_smaller_than_with_the_whole_model(topics: Material) -> None:
    """What is freed is given back, and not kept in holes between layers that come and go."""
    config = transformers.BertConfig.from_pretrained(
        topics.model, num_hidden_layers=12, hidden_size=384, intermediate_size=1536
    )
    model = transformers.BertModel(config)
    model.save_pretrained(topics.model)
    size = sum(parameter.nbytes for parameter in model.parameters())
    del model
    peaks = {
        how: max(
            done.summary["peak_memory_bytes"]
            for done in topics.gang(how, parallelism=how, max_steps=3, validation=None)
            .run()
            .of(Done)
        )
        for how in ("ddp", "fsdp")
    }
    # Of weights, gradients and two moments half; and layers that are gathered.
    assert peaks["fsdp"] < peaks["ddp"] - size


@pytest.mark.parametrize(
    ("rows", "ranks", "spans"),
    [
        (10, 3, [(0, 4), (4, 8), (8, 10)]),
        (3, 4, [(0, 1), (1, 2), (2, 3), (3, 3)]),
        (1, 2, [(0, 1), (1, 1)]),
        (4, 1, [(0, 4)]),
    ],
)
def test_rows_are_cut_as_fsdp_cuts_them(
    rows: int, ranks: int, spans: list[tuple[int, int]]
) -> None:
    assert [span(rows, ranks, rank) for rank in range(ranks)] == spans
    chunks = torch.arange(rows).chunk(ranks)
    assert [len(chunk) for chunk in chunks] == [b - a for a, b in spans if b > a]


def tensors(checkpoint: CheckpointRef) -> dict[str, torch.Tensor]:
    """Those of a checkpoint, put together again."""
    pieces: dict[str, list[tuple[int, torch.Tensor]]] = {}
    for file in sorted(Path(checkpoint.path).glob("*.safetensors")):
        for key, tensor in load_file(file).items():
            name, _, first = key.partition("@")
            pieces.setdefault(name, []).append((int(first or 0), tensor))
    put = {name: sorted(found, key=lambda each: each[0]) for name, found in pieces.items()}
    return {n: f[0][1] if len(f) == 1 else torch.cat([t for _, t in f]) for n, f in put.items()}
