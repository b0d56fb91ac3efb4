"""Training files of every format: read alike, and every way to be wrong named with its place."""

from __future__ import annotations

import csv
import datetime
import json
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from shared.errors import InvalidSpec
from shared.examples import (
    Chat,
    Completion,
    Labelled,
    Passage,
    Scored,
    Tagged,
    parse_example,
    read_examples,
)
from shared.formats import DataFile, format_of, read_records
from shared.records import BadRow
from shared.specs import DataFormat, TrainSpec, parse_spec
from workers.ranks.train.failures import DataProblem
from workers.ranks.train.rows import find_labels


def spec(
    task: str = "text-classification", columns: dict[str, str] | None = None, **fields: Any
) -> TrainSpec:
    data = {"train": "rows", "columns": columns or {}}
    return TrainSpec.model_validate({"task": task, "model": "m", "data": data, **fields})


def write(folder: Path, format: DataFormat, rows: list[dict[str, Any]]) -> DataFile:
    """Rows in a format; what CSV has no type for is JSON in its cells."""
    path = folder / f"rows.{format}"
    if format == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=3)
    elif format in ("csv", "tsv"):
        with path.open("w", newline="", encoding="utf-8") as file:
            delimiter = "," if format == "csv" else "\t"
            writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
            writer.writeheader()
            for row in rows:
                cells = {k: json.dumps(v) if isinstance(v, list) else v for k, v in row.items()}
                writer.writerow(cells)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataFile(path, format)


def raw(folder: Path, content: bytes, format: DataFormat = "csv") -> DataFile:
    path = folder / f"raw.{format}"
    path.write_bytes(content)
    return DataFile(path, format)


def fields(file: DataFile) -> list[dict[str, Any]]:
    return [record.fields for record in read_records(file)]


def parsed(file: DataFile, of: TrainSpec) -> list[Any]:
    return [placed.example for placed in read_examples(file, of)]


def problem(file: DataFile, of: TrainSpec | None = None) -> BadRow:
    with pytest.raises(BadRow) as caught:
        list(read_records(file) if of is None else read_examples(file, of))
    return caught.value


# --- alike -------------------------------------------------------------------------------------

CELLS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12)
WORDS = st.text(st.characters(categories=["L", "N", "P"], codec="utf-8"), min_size=1, max_size=6)
FILLED = CELLS.filter(lambda text: text.strip() != "")
NAMES = WORDS.filter(lambda name: not name.lstrip("-").isdigit())
LABELS = NAMES | st.integers(-(10**17), 10**17)


@st.composite
def rows_of_a_task(draw: st.DrawFn) -> tuple[TrainSpec, list[dict[str, Any]]]:
    score = st.floats(allow_nan=False, allow_infinity=False)
    words = st.lists(WORDS, min_size=1, max_size=4)
    turns = st.lists(
        st.fixed_dictionaries({"role": st.just("user"), "content": CELLS}), max_size=2
    ).map(lambda turns: [*turns, {"role": "assistant", "content": "yes"}])
    kinds: list[tuple[TrainSpec, st.SearchStrategy[dict[str, Any]]]] = [
        # A column has one type in Parquet: labels are all names or all numbers.
        (spec(), st.fixed_dictionaries({"text": FILLED, "label": NAMES})),
        (spec(), st.fixed_dictionaries({"text": FILLED, "label": st.integers(-(10**17), 10**17)})),
        (
            spec(problem="multi-label"),
            st.fixed_dictionaries({"text": FILLED, "label": st.lists(WORDS, max_size=3)}),
        ),
        (spec(problem="regression"), st.fixed_dictionaries({"text": FILLED, "label": score})),
        (
            spec("token-classification"),
            words.map(lambda found: {"tokens": found, "tags": found[::-1]}),
        ),
        (spec("text2text"), st.fixed_dictionaries({"text": FILLED, "target": FILLED})),
        (
            spec("text-generation"),
            st.fixed_dictionaries({"prompt": CELLS, "completion": FILLED}),
        ),
        (spec("text-generation"), st.fixed_dictionaries({"messages": turns})),
        (spec("fill-mask"), st.fixed_dictionaries({"text": FILLED, "more": st.integers(0, 9)})),
    ]
    of, row = draw(st.sampled_from(kinds))
    return of, draw(st.lists(row, min_size=1, max_size=8))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(rows_of_a_task())
@example((spec("fill-mask"), [{"text": 'a\r\nb,"c"\t\n', "more": 1}]))
def test_the_same_rows_read_alike_whatever_the_format(
    tmp_path: Path, case: tuple[TrainSpec, list[dict[str, Any]]]
) -> None:
    of, rows = case
    wanted = [parse_example(row, of) for row in rows]
    for format in ("jsonl", "csv", "tsv", "parquet"):
        assert parsed(write(tmp_path, format, rows), of) == wanted, format


@pytest.mark.parametrize(
    ("name", "format"),
    [
        ("train.jsonl", "jsonl"),
        ("train.json", "jsonl"),
        ("Train.CSV", "csv"),
        ("a.b.tsv", "tsv"),
        ("x.tab", "tsv"),
        ("part-0.parquet", "parquet"),
        ("part.pq", "parquet"),
        ("book.txt", "text"),
        ("upload", "jsonl"),
        (".csv", "jsonl"),
    ],
)
def test_a_format_by_its_name(name: str, format: str) -> None:
    assert format_of(name) == format


# --- CSV ---------------------------------------------------------------------------------------


def test_csv_with_all_that_is_allowed(tmp_path: Path) -> None:
    content = b'\xef\xbb\xbf,text ,label\r\n0,"two\r\nlines, ""quoted""",a\r\n\r\n1,plain,b'
    records = list(read_records(raw(tmp_path, content)))
    assert [record.fields for record in records] == [
        {"text": 'two\r\nlines, "quoted"', "label": "a"},
        {"text": "plain", "label": "b"},
    ]
    assert [record.line for record in records] == [2, 5]
    assert sum(record.size for record in records) == len(content) - content.index(b"0,") - 2


def test_labels_that_all_look_like_numbers_sort_as_numbers(tmp_path: Path) -> None:
    def labels(*names: str) -> tuple[str, ...]:
        rows = [{"text": "x", "label": name} for name in names]
        return find_labels(write(tmp_path, "csv", rows), spec(), at_least=2)

    assert labels("10", "9", "-1") == ("-1", "9", "10")
    assert labels("10", "9", "x") == ("10", "9", "x")
    assert labels("10", "9", "007") == ("007", "10", "9")
    assert labels("9" * 5000, "1") == ("1", "9" * 5000)


def test_lists_in_cells(tmp_path: Path) -> None:
    tags = raw(tmp_path, b'tokens,tags\n[ see  1 ],A B C D\n"[""a b"", ""c""]",X Y\n')
    assert parsed(tags, spec("token-classification")) == [
        Tagged(("[", "see", "1", "]"), ("A", "B", "C", "D")),
        Tagged(("a b", "c"), ("X", "Y")),
    ]
    labels = raw(tmp_path, b'text,label\nx,"[""a"", 2]"\ny,\n')
    assert parsed(labels, spec(problem="multi-label")) == [
        Labelled("x", ("a", "2"), False),
        Labelled("y", (), True),
    ]
    scores = raw(tmp_path, b"text\tlabel\nx\t1e-3\ny\t -2\n", "tsv")
    assert parsed(scores, spec(problem="regression")) == [Scored("x", 0.001), Scored("y", -2.0)]


def test_the_filled_columns_decide_the_form_of_a_generation_row(tmp_path: Path) -> None:
    chat = [{"role": "assistant", "content": "hi"}]
    wanted = [Chat((("assistant", "hi"),)), Completion("", "c"), Passage("t")]
    cells = raw(
        tmp_path,
        b'messages,prompt,completion,text\n"[{""role"": ""assistant"", ""content"": ""hi""}]",,,\n'
        b",,c,\n,,,t\n",
    )
    assert parsed(cells, spec("text-generation")) == wanted
    nothing = {"messages": None, "prompt": None, "completion": None, "text": None}
    rows = [
        {**nothing, "messages": chat},
        {**nothing, "prompt": "", "completion": "c"},
        {**nothing, "text": "t"},
    ]
    assert parsed(write(tmp_path, "parquet", rows), spec("text-generation")) == wanted


@pytest.mark.parametrize(
    ("content", "code", "line", "says"),
    [
        (b'text,label\nx,a\n"y\nz",b,c\n', "invalid_csv", 3, "3 field(s), and the header names 2"),
        (b"text,label\nx,a\n\ny\n", "invalid_csv", 4, "1 field(s), and the header names 2"),
        (b"text,label\n\nx,a,\n", "invalid_csv", 3, "3 field(s)"),
        (b"text,text\nx,a\n", "invalid_csv", 1, "names column 'text' twice"),
        (b'text,label\nx,a\n"y,b\nz,c\n', "invalid_csv", 3, "unexpected end of data"),
        (b'text,label\n"y"x,b\n', "invalid_csv", 2, "expected after"),
        (b"text,label\nx,a\ny\xff,b\n", "invalid_csv", 3, "not UTF-8 (byte 1)"),
        (b"text,label\rx,a\r", "invalid_csv", 1, "new-line character"),
        (b'text,label\nx,a\n"' + b"y\n" * 5_000_000, "line_too_long", 3, "the row is longer"),
        (b"text,label\n" + b"y" * 9_000_000, "line_too_long", 2, "the line is longer"),
    ],
)
def test_what_is_no_csv(tmp_path: Path, content: bytes, code: str, line: int, says: str) -> None:
    found = problem(raw(tmp_path, content))
    assert (found.code, found.line) == (code, line), found.message
    assert says in found.message


@pytest.mark.parametrize(
    ("content", "of", "code", "says"),
    [
        (b"txt,label\nx,a\n", spec(), "missing_column", "no column 'text'; the row has 'txt'"),
        (b"text,label\nx,high\n", spec(problem="regression"), "invalid_label", "a string (high)"),
        (b"text,label\nx,1_0\n", spec(problem="regression"), "invalid_label", "a string (1_0)"),
        (b"text,label\nx,nan\n", spec(problem="regression"), "invalid_label", "a number (nan)"),
        (b"text,label\nx,\n", spec(problem="regression"), "invalid_label", "an empty string"),
        (b"text,label\nx,a b\n", spec(problem="multi-label"), "invalid_label", "JSON list"),
        (b"text,label\nx,7\n", spec(problem="multi-label"), "invalid_label", "must be a list"),
        (b"tokens,tags\na b,X\n", spec("token-classification"), "invalid_tags", "2 words"),
        (b"tokens,tags\n,\n", spec("token-classification"), "invalid_tags", "empty list"),
        (b"messages\nhello\n", spec("text-generation"), "invalid_messages", "holds no JSON"),
        (b"messages\n7\n", spec("text-generation"), "invalid_messages", "must be a list"),
        (b"id,text\n1,x\n", spec("text2text"), "missing_column", "no column 'target'"),
    ],
)
def test_cells_that_a_task_cannot_use(
    tmp_path: Path, content: bytes, of: TrainSpec, code: str, says: str
) -> None:
    found = problem(raw(tmp_path, content), of)
    assert (found.code, found.line) == (code, 2)
    assert says in found.message


# --- Parquet -----------------------------------------------------------------------------------


def table(folder: Path, columns: dict[str, Any], **options: Any) -> DataFile:
    path = folder / "rows.parquet"
    pq.write_table(pa.table(columns), path, **options)
    return DataFile(path, "parquet")


def test_parquet_values_become_what_json_has(tmp_path: Path) -> None:
    words = pa.array(["a", "b", "a"]).dictionary_encode()
    nested = [[{"role": "user", "content": "x"}], [], None]
    file = table(tmp_path, {"word": words, "n": [1, 2, None], "nested": nested}, row_group_size=2)
    records = list(read_records(file))
    assert [record.line for record in records] == [1, 2, 3]
    assert records[0].fields == {"word": "a", "n": 1, "nested": nested[0]}
    assert records[2].fields == {"word": "a", "n": None, "nested": None}
    assert all(record.size > 0 for record in records)


def test_a_column_that_nobody_asked_for_is_not_decoded(tmp_path: Path) -> None:
    # Nanoseconds that no datetime can hold.
    odd = pa.array([1, 2], pa.timestamp("ns"))
    file = table(tmp_path, {"text": ["a", "b"], "label": ["x", "y"], "when": odd})
    assert parsed(file, spec()) == [Labelled("a", ("x",)), Labelled("b", ("y",))]
    found = problem(file, spec(columns={"text": "gloss"}))
    assert "no column 'gloss'; the row has 'label', 'text', 'when'" in found.message
    found = problem(file, spec(columns={"text": "a", "label": "b"}))
    assert (found.code, found.line) == ("missing_column", 1)


@pytest.mark.parametrize(
    ("text", "label", "code", "says"),
    [
        (["a", None], ["x", "y"], "invalid_text", "must be a string, not null"),
        ([b"a", b"b"], ["x", "y"], "invalid_text", "not a value of type bytes"),
        (["a", "b"], [1.0, 2.0], "invalid_label", "not a number (1.0)"),
        (
            ["a", "b"],
            [datetime.date(2020, 1, 1)] * 2,
            "invalid_label",
            "not a value of type date",
        ),
    ],
)
def test_parquet_of_other_types(
    tmp_path: Path, text: list[Any], label: list[Any], code: str, says: str
) -> None:
    found = problem(table(tmp_path, {"text": text, "label": label}), spec())
    assert (found.code, found.line) == (code, 2 if None in text else 1)
    assert says in found.message


def test_a_parquet_value_that_is_not_utf8_names_its_row(tmp_path: Path) -> None:
    good, bad = pa.array(["abcd"] * 300), b"\xff\xfe\xfd\xfc"
    _, offsets, data = good.buffers()
    content = bytearray(data.to_pybytes())
    content[4 * 200 : 4 * 201] = bad
    broken = pa.StringArray.from_buffers(300, offsets, pa.py_buffer(bytes(content)))
    file = table(tmp_path, {"text": broken, "label": ["x"] * 300})
    found = problem(file, spec())
    assert (found.code, found.line) == ("invalid_parquet", 201)
    with pytest.raises(DataProblem, match=r"rows\.parquet, row 201: a value cannot be read"):
        find_labels(file, spec(), at_least=2)


def test_damaged_parquet(tmp_path: Path) -> None:
    whole = table(tmp_path, {"text": ["abc"] * 999, "label": ["x"] * 999}, compression="zstd")
    content = whole.path.read_bytes()
    cases = [b"", b"PAR1", content[:-9], content[: len(content) // 2], b"text,label\na,b\n" * 9]
    cases += [content[:-8] + b"\xff\xff\xff\x7fPAR1"]
    for case in cases:
        whole.path.write_bytes(case)
        found = problem(whole, spec())
        assert found.code == "invalid_parquet"
        assert "no Parquet file, or it is damaged" in found.message
    # Wherever a byte flips: either it does no harm, or it is a data error; never another exception.
    codes = set()
    for place in range(4, len(content) - 8, 5):
        flipped = bytearray(content)
        flipped[place] ^= 0xFF
        whole.path.write_bytes(flipped)
        try:
            list(read_examples(whole, spec()))
        except BadRow as error:
            codes.add(error.code)
    assert "invalid_parquet" in codes


def test_pyarrow_is_loaded_for_parquet_alone(tmp_path: Path) -> None:
    file = write(tmp_path, "csv", [{"text": "x", "label": "a"}])
    program = (
        "import sys; from pathlib import Path; from shared.formats import DataFile, read_records\n"
        f"assert len(list(read_records(DataFile(Path({str(file.path)!r}), 'csv')))) == 1\n"
        "assert 'pyarrow' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[2])


# --- plain text, and all of them ----------------------------------------------------------------


def test_lines_of_text(tmp_path: Path) -> None:
    content = b"\xef\xbb\xbf  one \r\n\n \t\ntwo\x85half\nthree"
    file = raw(tmp_path, content.replace(b"\x85", "\x85".encode()), "text")
    assert parsed(file, spec("fill-mask")) == [
        Passage("  one "),
        Passage("two\x85half"),
        Passage("three"),
    ]
    assert [record.line for record in read_records(file)] == [1, 4, 5]
    found = problem(raw(tmp_path, b"one\ntw\xffo\n", "text"))
    assert (found.code, found.line) == ("invalid_text", 2)
    found = problem(raw(tmp_path, b"one\n" + b"x" * 9_000_000, "text"))
    assert (found.code, found.line) == ("line_too_long", 2)


def test_plain_text_is_for_tasks_that_read_plain_text() -> None:
    of = {"kind": "train", "task": "text-classification", "model": "m"}
    with pytest.raises(InvalidSpec, match=r"data\.format 'text' does not apply to task"):
        parse_spec({**of, "data": {"train": "x", "format": "text"}})
    parse_spec({**of, "task": "fill-mask", "data": {"train": "x", "format": "text"}})
    with pytest.raises(InvalidSpec, match=r"data\.format"):
        parse_spec({**of, "data": {"train": "x", "format": "xlsx"}})


@pytest.mark.parametrize("format", ["jsonl", "csv", "tsv", "parquet", "text"])
def test_a_file_that_is_not_there(tmp_path: Path, format: DataFormat) -> None:
    with pytest.raises(FileNotFoundError):
        list(read_records(DataFile(tmp_path / "gone", format)))


@pytest.mark.parametrize("format", ["jsonl", "csv", "parquet", "text"])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, format: DataFormat) -> None:
    rows = [{"text": f"{n:09}" * 100} for n in range(20_000)]
    file = write(tmp_path, format, rows)
    del rows
    if format == "parquet":
        # One row group, as most writers make them: 18 MB that must not be in memory at once.
        pq.write_table(pq.read_table(file.path), file.path, use_dictionary=False)
    next(read_records(file))
    pool = pa.default_memory_pool()
    held, peak = pool.bytes_allocated(), 0
    tracemalloc.start()
    for _ in read_records(file):
        peak = max(peak, pool.bytes_allocated() - held)
    _, traced = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert traced + peak < 6_000_000
