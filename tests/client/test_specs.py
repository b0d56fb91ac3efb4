"""Spec files and flags to specs, and the parser of server-sent events: the parts without I/O."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuyard.cli.render import needs
from gpuyard.cli.specs import build_spec, likely, parse_devices, read_spec
from gpuyard.sse import Message, parse
from shared.errors import InvalidSpec


def read(tmp_path: Path, text: str) -> dict[str, Any]:
    path = tmp_path / "spec.yaml"
    path.write_text(text)
    return read_spec(str(path))


def test_scalars_are_those_of_yaml_1_2(tmp_path: Path) -> None:
    text = "a: 3e-4\nb: no\nc: 2026-01-01\nd: 010\ne: true\nf: ~\ng: 1.5\nh: -3\ni: on\nj:\nk: 1:30"
    assert read(tmp_path, text) == {
        "a": 3e-4, "b": "no", "c": "2026-01-01", "d": 10, "e": True, "f": None, "g": 1.5, "h": -3,
        "i": "on", "j": None, "k": "1:30",
    }  # fmt: skip


def test_json_and_anchors_are_read(tmp_path: Path) -> None:
    assert read(tmp_path, '{"a":\t[1, 2.5]}') == {"a": [1, 2.5]}
    assert read(tmp_path, "x: &x {a: 1}\ny: {<<: *x, b: 2}")["y"] == {"a": 1, "b": 2}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [1", "line 1, column 6"),
        ("a: 1\nb: 2\na: 3", "line 3, column 1: the key 'a' stands twice"),
        ("- a", "but a list"),
        ("", "but empty"),
        ("just words", "but text"),
        ("a: !!python/object:os.system x", "could not determine a constructor"),
    ],
)
def test_what_cannot_be_read_is_placed(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(InvalidSpec) as caught:
        read(tmp_path, text)
    assert said in caught.value.message
    assert "spec.yaml" in caught.value.message


def test_flags_go_over_the_file_and_settings_over_flags() -> None:
    base = {"kind": "train", "hyperparameters": {"epochs": 1, "seed": 2}}
    flags = {"hyperparameters.epochs": 5, "data.train": "x", "model": None}
    spec = build_spec(base, flags, ["hyperparameters.epochs=7", "resources.features=[bf16]"])
    assert spec == {
        "kind": "train",
        "task": "text-classification",
        "hyperparameters": {"epochs": 7, "seed": 2},
        "data": {"train": "x"},
        "resources": {"features": ["bf16"]},
    }
    assert base == {"kind": "train", "hyperparameters": {"epochs": 1, "seed": 2}}


def test_the_kind_is_seen_from_the_data() -> None:
    assert build_spec({}, {"data.train": "x"}, [])["kind"] == "train"
    assert build_spec({}, {"input": "x"}, [])["kind"] == "infer"
    assert "kind" not in build_spec({}, {"model": "x"}, [])


def test_likely_spellings() -> None:
    assert likely("train", "hyperparameters.learnin_rate") == (
        "Did you mean hyperparameters.learning_rate?"
    )
    assert likely("infer", "generation.max_tokens") == "Did you mean generation.max_new_tokens?"
    assert likely("infer", "priorty") == "Did you mean priority?"
    assert "data.columns.text" in (likely("train", "data.columns.zzz") or "")
    assert likely(None, "x") is None
    assert likely("train", "model.x.y") is None


def test_sse_messages() -> None:
    lines = [
        "event: event",
        "id: 3",
        'data: {"a":',
        "data: 1}",
        "",
        ": ping",
        "",
        "data:x",
        "",
        "data: cut",
    ]
    assert list(parse(lines)) == [Message("event", '{"a":\n1}', "3"), Message("message", "x", "3")]


@given(
    st.lists(
        st.text(st.characters(exclude_characters="\r\n", exclude_categories=["Cs"]), min_size=1)
    )
)
def test_sse_data_arrives_as_it_was(texts: list[str]) -> None:
    lines = [line for text in texts for line in (f"data: {text}", "")]
    assert [message.data for message in parse(lines)] == texts


def test_devices_are_a_number_or_a_range() -> None:
    assert [parse_devices(text) for text in (None, "3", "2-8")] == [None, 3, {"min": 2, "max": 8}]
    for text in ("", "2-", "-2", "2-4-8", "all", "2.5"):
        with pytest.raises(InvalidSpec, match="is no number of devices"):
            parse_devices(text)
    by_setting = build_spec({}, {}, ["resources.devices={min: 2, max: 8}"])
    assert by_setting["resources"]["devices"] == {"min": 2, "max": 8}
    assert needs({"devices": 1}) == "1 device"
    assert needs({"devices": 2, "world_sizes": []}) == "2 devices"
    assert needs({"devices": 2, "world_sizes": [2, 4, 8]}) == "2 to 8 devices"
    assert needs({"devices": 1, "world_sizes": [], "most": 4}) == "1 to 4 devices"
