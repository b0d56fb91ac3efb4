"""Labels are found by rank 0 alone, and once for all attempts on the same file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from shared.messages import Done, Failed
from tests.training.cases import entity_rows
from tests.training.harness import Gang, make_assignment, write_rows

OPTIONS: dict[str, Any] = {"ranks": 2, "batch_size": 16, "max_steps": 2}


def labels(gang: Gang) -> list[str]:
    assert gang.of(Done), gang.of(Failed)
    config = json.loads((gang.model / "config.json").read_text())
    return [config["id2label"][str(index)] for index in range(len(config["id2label"]))]


def test_only_rank_0_reads_the_file(tmp_path: Path, bert: Path, train_file: Path) -> None:
    gang = Gang(
        make_assignment(tmp_path, bert, train_file, cache=tmp_path / "cache", **OPTIONS),
        differing={1: {"train_path": str(tmp_path / "not-here.jsonl")}},
    ).run()
    assert len(gang.of(Done)) == 2, gang.log.read_text()
    assert labels(gang) == ["animal", "food", "place"]


@pytest.mark.parametrize("task", ["text-classification", "token-classification"])
def test_they_are_kept_by_content_and_by_how_it_is_read(
    tmp_path: Path, bert: Path, train_file: Path, task: str
) -> None:
    rows = entity_rows(60, seed=1)
    file = train_file if task == "text-classification" else write_rows(tmp_path / "t.jsonl", rows)

    def run(work: str, **options: Any) -> list[str]:
        cache = tmp_path / "cache"
        options = {**OPTIONS, **options}
        return labels(
            Gang(
                make_assignment(tmp_path / work, bert, file, task=task, cache=cache, **options)
            ).run()
        )

    found = run("1")
    (kept,) = (tmp_path / "cache" / "labels").iterdir()
    assert sorted(json.loads(kept.read_text())) == sorted(found)
    kept.write_text(json.dumps([*json.loads(kept.read_text()), "zebra"]))
    assert "zebra" in run("2"), "they were found in the cache"
    for damaged in ('["a', "[]", "{}"):
        kept.write_text(damaged)
        assert run(f"3{damaged[0]}{len(damaged)}") == found
        assert sorted(json.loads(kept.read_text())) == sorted(found), "made anew"


def test_another_column_has_other_labels(tmp_path: Path, bert: Path) -> None:
    rows = [{"text": "the old town", "label": "ab"[i % 2], "mood": "xyz"[i % 3]} for i in range(30)]
    file = write_rows(tmp_path / "t.jsonl", rows)
    for column, expected in (("label", ["a", "b"]), ("mood", ["x", "y", "z"])):
        assignment = make_assignment(
            tmp_path / column, bert, file, cache=tmp_path / "cache", columns={"label": column}, **OPTIONS
        )  # fmt: skip
        assert labels(Gang(assignment).run()) == expected


def test_where_nothing_can_be_kept_it_goes_on(tmp_path: Path, bert: Path, train_file: Path) -> None:
    (tmp_path / "cache").write_text("no folder")
    gang = Gang(
        make_assignment(tmp_path / "work", bert, train_file, cache=tmp_path / "cache", **OPTIONS)
    ).run()
    assert labels(gang) == ["animal", "food", "place"]
