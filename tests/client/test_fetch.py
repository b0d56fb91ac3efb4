"""Fetching a published model: the folder is whole, and of use without gpuyard."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gpuyard import Client
from gpuyard.errors import CorruptDownload
from shared.errors import Conflict, NotFound
from tests.api.fake_worker import FakeFleet
from tests.client.conftest import Said
from tests.training.harness import make_bert

Cli = Callable[..., Said]
Spec = Callable[..., dict[str, Any]]

OUTSIDE = """
import importlib.util, json, sys
sys.path.append(sys.argv[2])  # installed packages, without what .pth files of a checkout add
assert all(importlib.util.find_spec(name) is None for name in ("gpuyard", "shared", "workers"))
from transformers import AutoModel, AutoTokenizer
model, info = AutoModel.from_pretrained(sys.argv[1], output_loading_info=True)
inputs = AutoTokenizer.from_pretrained(sys.argv[1])("the old town", return_tensors="pt")
inputs.pop("token_type_ids", None)
shape = list(model(**inputs).last_hidden_state.shape)
print(json.dumps({"shape": shape, "missing": sorted(info["missing_keys"])}))
"""


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bert(tmp_path_factory.mktemp("models") / "bert")


@pytest.fixture
def topics(
    sdk: Client, fleet: FakeFleet, train_spec: Spec, bert: Path, tmp_data: Path
) -> dict[str, bytes]:
    """The files of topics@1, by their names in its folder."""
    job = sdk.submit(train_spec()).id
    (holder,) = fleet.start(job)
    files = {f.relative_to(bert).as_posix(): f.read_bytes() for f in bert.iterdir()}
    files["1_Pooling/config.json"] = b"{}"
    for name, content in files.items():
        fleet.publish(holder, tmp_data, f"model/{name}", content)
    fleet.publish(holder, tmp_data, "report.html", b"no part of the model")
    fleet.finish(holder, {"metrics": {"accuracy": 0.9}})
    sdk.publish(job, "topics")
    return files


def held(folder: Path) -> dict[str, bytes]:
    return {
        f.relative_to(folder).as_posix(): f.read_bytes() for f in folder.rglob("*") if f.is_file()
    }


def test_plain_transformers_loads_what_was_fetched(
    cli: Cli, topics: dict[str, bytes], tmp_path: Path
) -> None:
    said = cli("models", "fetch", "topics", str(tmp_path / "topics"))
    assert (said.code, said.out) == (0, f"{tmp_path}/topics\n")
    assert held(tmp_path / "topics") == topics
    done = subprocess.run(
        [
            sys.executable, "-I", "-S", "-c", OUTSIDE,
            str(tmp_path / "topics"), sysconfig.get_path("purelib"),
        ],
        cwd=tmp_path, capture_output=True, text=True, timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["shape"] == [1, 5, 32]
    assert json.loads(done.stdout)["missing"] == []


def test_a_fetch_that_broke_off_goes_on_and_a_repeated_one_changes_nothing(
    sdk: Client, topics: dict[str, bytes], tmp_path: Path
) -> None:
    target, size = tmp_path / "here", sum(map(len, topics.values()))
    moved: list[tuple[int, int]] = []

    def stop(done: int, total: int) -> None:
        moved.append((done, total))
        if done > size // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sdk.fetch_model("topics@1", target, on_bytes=stop)
    assert not target.exists(), "half a model is none"
    (aside,) = tmp_path.glob(".here.*")
    whole = {name for name in held(aside) if name in topics}
    (aside / "stray").mkdir()
    (aside / "stray" / "file").write_text("does not belong there")
    fetched: list[int] = []
    path = sdk.fetch_model("topics@1", target, on_bytes=lambda done, _: fetched.append(done))
    assert path == target and held(target) == topics and list(tmp_path.glob(".*")) == []
    assert {total for _, total in moved} == {size}
    assert fetched == sorted(fetched) and fetched[-1] <= size
    assert fetched[0] >= sum(len(topics[name]) for name in whole) or not whole
    again: list[int] = []
    sdk.fetch_model("topics@1", target, on_bytes=lambda done, _: again.append(done))
    assert again == [], "it is there already"


def test_what_is_there_already_is_left_alone(
    cli: Cli, sdk: Client, topics: dict[str, bytes], tmp_path: Path
) -> None:
    own = tmp_path / "own"
    own.mkdir()
    sdk.fetch_model("topics", own)  # an empty folder is nothing to lose
    (own / "config.json").write_text("changed")
    with pytest.raises(Conflict):
        sdk.fetch_model("topics@1", own)
    assert (own / "config.json").read_text() == "changed"
    said = cli("models", "fetch", "topics", str(own))
    assert said.code == 5 and "is there already and is not this model" in said.err
    with pytest.raises(NotFound):
        sdk.fetch_model("topics@7", tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_file_that_was_changed_on_the_service_is_refused(
    sdk: Client, topics: dict[str, bytes], tmp_path: Path, tmp_data: Path
) -> None:
    (stored,) = tmp_data.glob("jobs/*/*/artifacts/model/config.json")
    stored.write_bytes(bytes(len(topics["config.json"])))
    with pytest.raises(CorruptDownload):
        sdk.fetch_model("topics", tmp_path / "here")
    assert not (tmp_path / "here").exists()
