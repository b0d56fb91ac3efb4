"""How a checkpoint is divided among ranks: the shares, who writes, the copy, and what comes of damage."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from shared.messages import CheckpointRef, CheckpointWritten, Notice
from tests.training.harness import Gang, make_assignment
from workers.ranks.checkpoint import (
    CheckpointDamaged,
    begin,
    finish,
    part_name,
    read_state,
    read_tensors,
    write_part,
)
from workers.ranks.train.device import Compute
from workers.ranks.train.shares import HostCopy, divide

CPU = Compute(device=torch.device("cpu"), backend="gloo", half=None)
OPTIONS: dict[str, Any] = {"epochs": 2, "batch_size": 16, "learning_rate": 3e-3}
EVERY_5: dict[str, Any] = {"every_steps": 5, "every_seconds": None}


def test_shares_are_nearly_equal_and_everything_is_in_one_of_them() -> None:
    draw = random.Random(3)
    sizes = {f"t{n}": draw.randint(0, 1000) for n in range(200)}
    for parts in (1, 2, 3, 8):
        shares = divide(sizes, parts)
        assert sorted(name for share in shares for name in share) == sorted(sizes)
        loads = [sum(sizes[name] for name in share) for share in shares]
        assert max(loads) - min(loads) <= 20, "they differ by no more than one of the smallest"


def test_shares_depend_on_names_and_sizes_alone() -> None:
    sizes = {f"t{n}": n % 7 for n in range(50)}
    turned = dict(reversed(sizes.items()))
    assert divide(sizes, 3, {"t4"}) == divide(turned, 3, {"t4"})


def test_what_only_the_first_may_save_is_in_its_share() -> None:
    sizes = {"a": 5, "b": 100, "c": 5, "buffer.d": 50, "buffer.e": 1}
    first, second = divide(sizes, 2, {"buffer.d", "buffer.e"})
    assert {"buffer.d", "buffer.e"} <= set(first)
    assert second == ["b"]


def test_a_share_may_be_empty() -> None:
    assert divide({"a": 1}, 3) == [["a"], [], []]


def test_a_copy_is_one_and_its_memory_is_used_again() -> None:
    tensors = {
        "matrix": torch.randn(7, 3).t(),
        "step": torch.tensor(5.0),
        "mask": torch.tensor([True, False, True]),
        "half": torch.randn(5).bfloat16(),
        "none": torch.empty(0, 4),
    }
    copy = HostCopy(CPU)
    first = copy.take(tensors)
    assert all(torch.equal(first[name], tensors[name]) for name in tensors)
    where = {name: tensor.data_ptr() for name, tensor in first.items()}
    tensors["matrix"].fill_(1)
    assert not torch.equal(first["matrix"], tensors["matrix"])
    second = copy.take(tensors)
    assert torch.equal(second["matrix"], tensors["matrix"])
    assert {name: tensor.data_ptr() for name, tensor in second.items()} == where
    # Another layout gets other memory.
    assert torch.equal(copy.take({"step": torch.tensor([1, 2])})["step"], torch.tensor([1, 2]))


def write_divided(folder: Path) -> tuple[CheckpointRef, dict[str, torch.Tensor]]:
    tensors = HostCopy(CPU).take({"a": torch.randn(3, 4), "b": torch.randn(5), "c": torch.ones(2)})
    aside = begin(folder, 7)
    parts = {
        part_name(n, 3): write_part(aside, n, 3, {name: tensors[name] for name in share})
        for n, share in enumerate((["a"], ["b", "c"], []))
    }
    written = finish(aside, 7, parts, {"format": 0})
    assert sorted(file.name for file in folder.iterdir()) == ["step-00000007"]
    return CheckpointRef(id="x", step=7, path=str(written.path), manifest=written.manifest), tensors


def test_parts_are_read_as_one(tmp_path: Path) -> None:
    checkpoint, tensors = write_divided(tmp_path)
    assert read_state(checkpoint) == {"format": 0}
    read = read_tensors(checkpoint)
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)


def test_a_checkpoint_without_one_of_its_parts_is_none(tmp_path: Path) -> None:
    checkpoint, _ = write_divided(tmp_path)
    fewer = {n: entry for n, entry in checkpoint.manifest.items() if n != part_name(1, 3)}
    with pytest.raises(CheckpointDamaged, match="does not list every part"):
        read_tensors(checkpoint.model_copy(update={"manifest": fewer}))
    (Path(checkpoint.path) / part_name(1, 3)).unlink()
    with pytest.raises(CheckpointDamaged, match=f"{part_name(1, 3)} cannot be read: No such file"):
        read_state(checkpoint)


def test_what_is_not_there_is_not_put_in_place(tmp_path: Path) -> None:
    """As when a rank wrote into a folder of the same name on another disk."""
    aside = begin(tmp_path, 3)
    entry = write_part(aside, 0, 2, {"a": torch.ones(3)})
    with pytest.raises(OSError, match=part_name(1, 2)):
        finish(aside, 3, {part_name(0, 2): entry, part_name(1, 2): entry}, {})
    (aside / part_name(0, 2)).write_bytes(b"half")
    with pytest.raises(OSError, match="has 4 bytes where"):
        finish(aside, 3, {part_name(0, 2): entry}, {})
    assert not (tmp_path / "step-00000003").exists()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, bert: Path, train_file: Path) -> Gang:
    """By two ranks, with checkpoints of both."""
    work = tmp_path_factory.mktemp("trained")
    return Gang(
        make_assignment(work, bert, train_file, ranks=2, checkpoint=EVERY_5, **OPTIONS)
    ).run()


def test_both_ranks_write_about_half(trained: Gang) -> None:
    for checkpoint in trained.checkpoints:
        assert set(checkpoint.manifest) == {part_name(0, 2), part_name(1, 2), "state.json"}
        sizes = [checkpoint.manifest[part_name(number, 2)].size for number in (0, 1)]
        assert max(sizes) < 1.2 * min(sizes)
    folder = Path(trained.assignment.work_dir) / "checkpoints"
    steps = sorted(report.step for report in trained.of(CheckpointWritten))
    assert [file.name for file in sorted(folder.iterdir())] == [f"step-{n:08d}" for n in steps]
    assert "by 2 ranks" in trained.log.read_text()


@pytest.mark.parametrize("part", [0, 1])
def test_a_damaged_part_is_told_and_the_one_before_is_as_good(
    tmp_path: Path, bert: Path, train_file: Path, trained: Gang, part: int
) -> None:
    newest, older = trained.checkpoints[:2]
    file = Path(newest.path) / part_name(part, 2)
    content = file.read_bytes()
    try:
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        given = {"resume_from": (newest, older), "ranks": 2, **OPTIONS}
        second = Gang(make_assignment(tmp_path, bert, train_file, **given)).run()
    finally:
        file.write_bytes(content)
    [notice] = second.of(Notice)
    assert notice.code == "checkpoint_damaged"
    assert f"{file.name} has another SHA-256" in notice.message
    assert second.done.summary["resumed_from"]["step"] == older.step
    assert second.weights == trained.weights


def test_a_rank_that_does_not_see_the_folder_leaves_its_share_to_rank_0(
    tmp_path: Path, bert: Path, train_file: Path, trained: Gang
) -> None:
    work, elsewhere = tmp_path / "work", tmp_path / "elsewhere"
    gang = Gang(
        make_assignment(work, bert, train_file, ranks=2, checkpoint=EVERY_5, **OPTIONS),
        differing={1: {"work_dir": str(elsewhere)}},
    ).run()
    assert gang.weights == trained.weights
    assert list((elsewhere / "checkpoints").iterdir()) == []
    newest = gang.checkpoints[0]
    assert set(newest.manifest) == {part_name(0, 1), "state.json"}
    whole, divided = read_tensors(newest), read_tensors(trained.checkpoints[0])
    assert whole.keys() == divided.keys()
    assert all(torch.equal(whole[name], divided[name]) for name in whole)


def test_a_checkpoint_of_an_older_format_is_refused(
    tmp_path: Path, bert: Path, train_file: Path, trained: Gang
) -> None:
    state = json.loads((Path(trained.checkpoints[0].path) / "state.json").read_text())
    written = finish(begin(tmp_path, 5), 5, {}, {**state, "format": state["format"] - 1})
    old = CheckpointRef(id="old", step=5, path=str(written.path), manifest=written.manifest)
    short = {**OPTIONS, "max_steps": 2, "resume_from": (old,)}
    gang = Gang(make_assignment(tmp_path / "work", bert, train_file, **short)).run()
    [notice] = gang.of(Notice)
    assert f"it is of format {state['format'] - 1}, not {state['format']}" in notice.message
    assert gang.done.summary["resumed_from"] is None
