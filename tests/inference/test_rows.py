"""A bad row costs that row: every kind of error, in the process that users meet."""

from __future__ import annotations

import json
import sys

import pytest

from shared.rows import MAX_LINE_BYTES
from shared.specs import InferSpec
from workers.ranks.engine.inputs import RowProblem, read_request

from .conftest import make_llama

GOOD = {"prompt": "the cat sat", "id": 5}
USER = {"role": "user", "content": "the cat"}

BAD_ROWS: list[tuple[object, str]] = [
    (b'{"prompt": "the cat"', "invalid_json"),
    (b"the cat", "invalid_json"),
    (b'{"prompt": "a", "x": NaN}', "invalid_json"),
    (b'{"prompt": ' + b"[" * 100_000, "invalid_json"),
    (b'{"prompt": "a", "x": ' + b"9" * 5000 + b"}", "invalid_json"),
    (b'["the cat"]', "invalid_row"),
    (b'"the cat"', "invalid_row"),
    (b"null", "invalid_row"),
    (b'{"prompt": "caf\xe9"}', "invalid_utf8"),
    (b'{"prompt": "half \\ud83d"}', "invalid_utf8"),
    (b'{"prompt": "a", "id": "\\ud83d"}', "invalid_utf8"),
    ({"text": "the cat"}, "missing_column"),
    ({"prompt": 5}, "missing_column"),
    ({"prompt": None}, "missing_column"),
    ({"prompt": ""}, "empty_text"),
    ({"prompt": " \n"}, "empty_text"),
    ({"prompt": "a", "messages": [USER]}, "invalid_row"),
    ({"messages": []}, "invalid_messages"),
    ({"messages": "the cat"}, "invalid_messages"),
    ({"messages": ["the cat"]}, "invalid_messages"),
    ({"messages": [{"role": "user"}]}, "invalid_messages"),
    ({"messages": [{"role": 1, "content": "a"}]}, "invalid_messages"),
    ({"messages": [{"role": "user", "content": ""}]}, "empty_text"),
    ({"messages": [{"role": "narrator", "content": "a"}]}, "invalid_messages"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, "invalid_utf8"),
]


def test_every_kind_of_bad_row_among_good_ones(engine, llama):
    rows: list[object] = []
    for bad, _ in BAD_ROWS:
        rows += [GOOD, bad]
    outcome = engine.run(llama, rows, shard_rows=7, generation={"max_new_tokens": 3})
    assert outcome.failed is None
    assert outcome.codes == [code for _, bad in BAD_ROWS for code in (None, bad)]
    assert len({row["output"]["text"] for row in outcome.results[::2]}) == 1
    assert {row["id"] for row in outcome.results[::2]} == {5}
    assert outcome.done.summary["errors"] == len(BAD_ROWS)
    for row in outcome.results[1::2]:
        assert row["output"] is None and row["error"]["message"]
        assert row["usage"] == {"input_tokens": 0, "output_tokens": 0}


def test_ids_are_echoed_also_with_errors(engine, llama):
    ids = ["a", 7, None, {"k": ["ü"]}, 2**70, 1.5]
    rows = [{"id": id, "prompt": "the cat" if i % 2 else ""} for i, id in enumerate(ids)]
    outcome = engine.run(llama, rows, generation={"max_new_tokens": 2})
    assert [row["id"] for row in outcome.results] == ids
    assert outcome.codes == ["empty_text", None] * 3


def test_messages_need_a_chat_template(engine, models_dir):
    model = make_llama(models_dir / "plain-llama", chat=False)
    outcome = engine.run(
        model, [{"messages": [USER]}, {"prompt": "the cat"}], generation={"max_new_tokens": 2}
    )
    assert outcome.codes == ["no_chat_template", None]


def test_blank_lines_are_no_rows_and_a_bom_is_no_text(engine, llama):
    lines = [b"", b'\xef\xbb\xbf{"prompt": "the cat"}', b"  ", b'{"prompt": "the cat"}\r']
    outcome = engine.run(llama, lines, generation={"max_new_tokens": 4})
    assert [row["row"] for row in outcome.results] == [0, 1]
    assert outcome.texts[0] == outcome.texts[1]


def test_a_line_of_megabytes_is_refused_before_it_is_parsed():
    line = json.dumps({"prompt": "a" * MAX_LINE_BYTES}).encode()
    with pytest.raises(RowProblem) as caught:
        read_request(0, line, InferSpec(model="m", task="text-generation", input="x"))
    assert caught.value.code == "line_too_long" and str(MAX_LINE_BYTES) in caught.value.message


def test_messages_name_what_is_wrong_and_where():
    spec = InferSpec(model="m", task="text-classification", input="x", text_column="body")

    def problem(line: bytes) -> str:
        with pytest.raises(RowProblem) as caught:
            read_request(0, line, spec)
        return caught.value.message

    assert problem(b'{"text": "a", "note": 1}') == 'no column \'body\'; the row has "note", "text"'
    assert problem(b'{"body": [1]}') == "column 'body' must be a string, not a list"
    assert problem(b'{"body": true}') == "column 'body' must be a string, not a boolean"
    assert problem(b'{"body": "a",}').endswith("at column 14")
    assert problem(b'{"body": "\xff"}') == "byte 10 of the line is not UTF-8"


def test_the_recursion_limit_is_not_what_saves_us():
    """Deep nesting is an error of the row at any depth that Python's parser refuses."""
    line = b"[" * (sys.getrecursionlimit() * 50)
    with pytest.raises(RowProblem) as caught:
        read_request(0, line, InferSpec(model="m", task="text-generation", input="x"))
    assert caught.value.code == "invalid_json"
