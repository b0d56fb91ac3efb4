"""Compiled layers: the training of before but for rounding, and exact where it is killed and goes on."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from shared.messages import CheckpointWritten, Metric, Notice, Report
from tests.training.cases import CASES, Case
from tests.training.harness import Gang, make_assignment, write_rows
from workers.ranks.train.columns import Collector
from workers.ranks.train.compile_cache import KEPT_SECONDS, open_cache
from workers.ranks.train.compiling import warm_up_indices
from workers.ranks.train.order import plan_batches

DEADLINE = 1500.0
"""Seconds. Compiling two small layers takes half a minute of an idle core."""
pytestmark = pytest.mark.timeout(2 * DEADLINE)
OPTIONS: dict[str, Any] = {"batch_size": 16, "max_steps": 12, "learning_rate": 5e-3, "dropout": 0.2}
EVERY_4 = {"every_steps": 4, "every_seconds": None}


def cases() -> Iterator[Case]:
    for case in CASES:
        if case.name == "single-label":
            yield case
        elif case.name == "chat":
            lora = {"r": 4, "dropout": 0.1, "targets": ["q_proj", "v_proj", "up_proj"]}
            fields = {"method": "lora", "lora": lora}
            yield Case(**{**vars(case), "name": "chat-lora", "spec_fields": fields})


@dataclass
class Material:
    """A case on disk, its training without compiled layers and with them, on two ranks."""

    case: Case
    folder: Path
    plain: Gang = field(init=False)
    compiled: Gang = field(init=False)

    def __post_init__(self) -> None:
        self.model = self.case.model(self.folder / "model")
        self.train = write_rows(self.folder / "train.jsonl", self.case.rows(120, 1))
        self.validation = write_rows(self.folder / "validation.jsonl", self.case.rows(20, 2))
        self.plain = self.gang("plain").run()
        self.compiled = self.gang("compiled", compile=True).run()

    def gang(self, work: str, cache: str = "cache", **options: Any) -> Gang:
        (self.folder / cache).mkdir(exist_ok=True)
        assignment = make_assignment(
            self.folder / work,
            self.model,
            self.train,
            ranks=2,
            task=self.case.task,
            validation=self.validation,
            spec_fields=self.case.spec_fields,
            cache=self.folder / cache,
            **{**self.case.hyperparameters, **OPTIONS, **options},
        )
        return Gang(assignment, deadline=DEADLINE)


@pytest.fixture(scope="module", params=list(cases()), ids=lambda case: case.name)
def material(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Material:
    return Material(request.param, tmp_path_factory.mktemp(request.param.name))


def losses(gang: Gang) -> list[float]:
    return [m.values["loss"] for m in gang.of(Metric) if m.split == "train"]


def codes(gang: Gang) -> set[str]:
    return {notice.code for notice in gang.of(Notice)}


def test_the_result_is_that_without_but_for_rounding(material: Material) -> None:
    plain, compiled = material.plain, material.compiled
    assert "2 layers compiled" in compiled.log.read_text()
    assert not codes(compiled), "every batch is of a kind that is compiled"
    # Dropout is on: it has drawn the same numbers.
    assert losses(compiled) == pytest.approx(losses(plain), rel=1e-5)
    assert plain.weights != compiled.weights, "nothing was computed in another way"
    ours, theirs = (load_file(g.model / "model.safetensors") for g in (compiled, plain))
    assert list(ours) == list(theirs)
    for name, tensor in ours.items():
        np.testing.assert_allclose(tensor, theirs[name], atol=2e-3, err_msg=name)
    names = {p.relative_to(plain.model.parent) for p in plain.model.parent.rglob("*.json")}
    assert names == {
        p.relative_to(compiled.model.parent) for p in compiled.model.parent.rglob("*.json")
    }
    assert "Warning" not in compiled.log.read_text()


def test_killed_and_resumed_it_ends_bitwise_the_same(material: Material) -> None:
    first = material.gang("killed", compile=True, checkpoint=EVERY_4)

    def strike(_rank: int, report: Report) -> None:
        if isinstance(report, CheckpointWritten):
            first.kill(1)

    first.run(on_report=strike)
    assert first.exit_code(1) == -9, "the fault did not strike"
    # On another host, as it were: what was compiled before is not there, and the first batch is another.
    fresh = "other-cache" if material.case.name == "single-label" else "cache"
    second = material.gang(
        "resumed", compile=True, resume_from=first.checkpoints, cache=fresh
    ).run()
    assert second.done.summary["resumed_from"]["step"] >= 4
    assert second.weights == material.compiled.weights
    assert second.done.summary["metrics"] == material.compiled.done.summary["metrics"]
    assert not codes(second)


@pytest.mark.parametrize("parallelism", ["ddp", "fsdp"])
def test_without_a_compiler_it_trains_all_the_same_and_says_so(
    tmp_path: Path, bert: Path, train_file: Path, parallelism: Any
) -> None:
    tools = tmp_path / "no-tools"
    tools.mkdir()

    def gang(work: str, **options: Any) -> Gang:
        assignment = make_assignment(
            tmp_path / work, bert, train_file, ranks=2, parallelism=parallelism,
            **{**OPTIONS, **options},
        )  # fmt: skip
        environment = {"PATH": str(tools), "CXX": "", "CC": ""}
        return Gang(assignment, environment=environment, deadline=DEADLINE).run()

    plain, compiled = gang("plain"), gang("compiled", compile=True)
    (notice,) = compiled.of(Notice)
    assert notice.code == "compile_unavailable"
    assert "rank 0 cannot" in notice.message and "install a C++ compiler" in notice.message
    assert compiled.weights == plain.weights
    assert "Traceback" not in compiled.log.read_text()


def test_one_rank_that_cannot_is_enough(tmp_path: Path, bert: Path, train_file: Path) -> None:
    # Where rank 1 would make a folder for what it compiles there is something else.
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "compiled-1").touch()
    assignment = make_assignment(
        tmp_path / "work", bert, train_file, ranks=2, compile=True, **OPTIONS
    )
    gang = Gang(assignment, deadline=DEADLINE).run()
    (notice,) = gang.of(Notice)
    assert notice.code == "compile_unavailable" and notice.data["rank"] == 1
    assert gang.done.summary["steps"] == OPTIONS["max_steps"]


def test_code_is_kept_where_nobody_else_can_write(tmp_path: Path, bert: Path) -> None:
    cache, file = tmp_path / "cache", write_rows(tmp_path / "rows.jsonl", [])
    cache.mkdir()
    assignment = make_assignment(tmp_path / "work", bert, file, cache=cache)
    first = open_cache(assignment, "cpu", [[8, 20]])
    assert not first.private and first.folder.is_relative_to(cache)
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(first.folder)
    mine = first.folder.parent
    assert mine.stat().st_mode & 0o777 == 0o700
    # What is tuned to other batches is not taken for it.
    assert open_cache(assignment, "cpu", [[8, 20]]).folder == first.folder
    assert open_cache(assignment, "cpu", [[8, 21]]).folder != first.folder
    old = time.time() - KEPT_SECONDS - 60
    os.utime(first.folder, (old, old))
    other = open_cache(assignment, "cpu", [[8, 21]])
    assert other.folder.exists() and not first.folder.exists()
    mine.chmod(0o777)
    elsewhere = open_cache(assignment, "cpu", [[8, 20]])
    assert elsewhere.private and elsewhere.folder.parent == tmp_path / "work"


@pytest.fixture(autouse=True)
def _cache_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")


@pytest.mark.parametrize(
    ("lengths", "batch", "micro", "kinds"),
    [
        ([5, 9, 9, 7, 6, 3, 4, 8], 4, 2, ["padded", "alike"]),
        ([9] * 8, 4, 2, ["alike"]),
        ([5, 9, 9, 7, 6, 3, 4, 8], 4, 1, ["single"]),
        # The last batch of five has one example: a rank computes it, the other one for nothing.
        ([5, 9, 9, 7, 6], 4, 2, ["padded", "alike", "single"]),
    ],
)
def test_it_is_compiled_for_each_kind_of_batch(
    lengths: list[int], batch: int, micro: int, kinds: list[str]
) -> None:
    plan = plan_batches(
        examples=len(lengths), ranks=2, global_batch=batch, micro_batch=micro, epochs=1,
        max_steps=None,
    )  # fmt: skip
    collected = Collector()
    for length in lengths:
        collected.add({"tokens": [1] * length}, length=length)
    found = []
    for rows in warm_up_indices(collected.done(), plan):
        its = {lengths[row] for row in rows}
        found.append("single" if len(rows) == 1 else "padded" if len(its) > 1 else "alike")
        assert len(rows) in (1, micro)
    assert found == kinds
