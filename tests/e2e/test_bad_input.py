"""What is wrong with the input of a batch job, from the client to the stored results: a bad row costs that
row, and what can be known before is refused at submission, in a sentence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from shared.errors import GpuyardError
from shared.rows import MAX_LINE_BYTES
from tests.e2e.stack_process import StackProcess
from tests.stack import eventually

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

GOOD = {"id": "same", "prompt": "w1 w2 w3"}
LONG = " ".join(f"w{n % 300}" for n in range(400))
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}


def options(**own: Any) -> dict[str, Any]:
    return {"prompt": "w1", "generation": own}


ROWS: list[tuple[dict[str, Any] | bytes, str | None, str]] = [
    (GOOD, None, ""),
    ({"prompt": LONG}, "too_long", "the input has 400 tokens and max_new_tokens is 4"),
    ({"prompt": " \n"}, "empty_text", "column 'prompt' is empty"),
    (b'{"prompt": "caf\xe9"}', "invalid_utf8", "byte 15 of the line is not UTF-8"),
    ({"prompt": "half \ud83d"}, "invalid_utf8", "half of a surrogate pair"),
    ({"prompt": "x" * MAX_LINE_BYTES}, "line_too_long", str(MAX_LINE_BYTES)),
    (b'{"prompt": "w1"', "invalid_json", "column"),
    (b'["w1"]', "invalid_row", "must be an object, not a list"),
    ({"text": "w1"}, "missing_column", "no 'prompt' and no 'messages'; the row has \"text\""),
    (GOOD, None, ""),
    (options(temprature=1), "invalid_generation", "temprature"),
    (options(top_k=5), "invalid_generation", "temperature 0 is greedy"),
    (options(min_new_tokens=9), "invalid_generation", "min_new_tokens (9) is over"),
    (options(n=2), "invalid_generation", "all n = 2 texts would be the same"),
    (options(schema={"enum": []}), "invalid_generation", "Unsatisfiable"),
    (options(schema=SCHEMA), "invalid_generation", "schema: "),
    (
        {"messages": [{"role": "user", "content": "w1"}]},
        "no_chat_template",
        "the model has no chat template: give a 'prompt'",
    ),
    ({"prompt": "w7", "id": 7}, None, ""),
]


def write(path: Path, rows: list[dict[str, Any] | bytes]) -> str:
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return str(path)


def generation(**changes: Any) -> dict[str, Any]:
    return {
        "kind": "infer", "task": "text-generation", "model": "tinyllama",
        "generation": {"max_new_tokens": 4}, "shard_rows": 4, **changes,
    }  # fmt: skip


def test_a_bad_row_costs_that_row(stack: StackProcess, tmp_path: Path) -> None:
    client = stack.client
    path = write(tmp_path / "in.jsonl", [row for row, _, _ in ROWS])
    job = client.submit(generation(input=path), upload=True).id
    ended = client.wait(job, timeout=120)
    bad = [code for _, code, _ in ROWS if code]
    assert (ended.state, ended.rows_done, ended.row_errors) == ("succeeded", len(ROWS), len(bad))
    for found, (_, code, says) in zip(client.results(job), ROWS, strict=True):
        if code is None:
            assert found["output"]["text"] and found["error"] is None
            continue
        assert (found["output"], found["error"]["code"]) == (None, code), found
        assert says in found["error"]["message"]
    told = [event.message for event in client.events(job, follow=False) if event.type == "notice"]
    assert told == ['one row has an id that an earlier row has; the first is row 9, "same"']


def test_a_row_over_the_context_by_choice(stack: StackProcess) -> None:
    client, rows = stack.client, [{"prompt": LONG}, {"prompt": "w1"}]
    for choice, codes in [("error", ["too_long", None]), ("truncate", [None, None])]:
        job = client.submit(generation(rows=rows, too_long=choice)).id
        client.wait(job, timeout=120)
        found = list(client.results(job))
        assert [row["error"] and row["error"]["code"] for row in found] == codes
    assert found[0]["usage"]["input_tokens"] == 256 - 4
    spec = {
        "kind": "infer", "task": "embeddings", "model": "tinybert", "too_long": "split",
        "rows": [{"text": LONG}, {"text": "w1"}],
    }  # fmt: skip
    job = client.submit(spec).id
    client.wait(job, timeout=120)
    split, short = client.results(job)
    # 400 tokens, 126 of them in a window beside [CLS] and [SEP].
    assert (split["output"]["windows"], split["usage"]["input_tokens"]) == (4, 400 + 4 * 2)
    assert len(split["output"]["embedding"]) == short["output"]["dimensions"]


@pytest.mark.parametrize(
    ("changes", "code", "says"),
    [
        ({"generation": {"temprature": 1}}, "invalid_spec", "generation.temprature"),
        ({"temperature": 1}, "invalid_spec", "unknown field 'temperature'"),
        ({"generation": {"top_p": 0.5}}, "invalid_spec", "temperature 0 is greedy"),
        ({"generation": {"schema": {"type": "wat"}}}, "invalid_spec", "wat"),
        ({"too_long": "split"}, "invalid_spec", "too_long 'split' does not apply"),
        ({"too_long": "cut"}, "invalid_spec", "too_long"),
        ({"model": "tinybert"}, "unsupported_model", "tinybert"),
        ({"task": "text-classification", "generation": None}, "unsupported_model", "tinyllama"),
        ({"model": "nowhere"}, "model_not_found", "nowhere"),
        ({"rows": [{"prompt": "a"}], "input": "b"}, "invalid_spec", "exactly one of input"),
    ],
)
def test_what_can_be_known_before_is_refused(
    stack: StackProcess, changes: dict[str, Any], code: str, says: str
) -> None:
    spec = generation(**{"rows": [{"prompt": "w1", "text": "w1"}], **changes})
    with pytest.raises(GpuyardError) as caught:
        stack.client.submit({name: value for name, value in spec.items() if value is not None})
    assert caught.value.code == code
    assert says in f"{caught.value.message} {caught.value.hint}"


def test_a_model_deleted_while_the_job_waits(
    stack: StackProcess, tiny_models: Path, labelled: dict[str, Path]
) -> None:
    """The job fails once it has its device, at the first attempt: another would find nothing either."""
    client = stack.client
    shutil.copytree(tiny_models / "tinyllama", tiny_models / "doomed")
    try:
        # A training shares its devices with nobody, and holds both until the model is gone.
        long = client.submit(
            {
                "kind": "train", "task": "text-classification", "model": "tinybert",
                "data": {"train": str(labelled["train"])}, "resources": {"devices": 2},
                "hyperparameters": {"epochs": 10_000},
            },
            upload=True,
        ).id  # fmt: skip
        eventually(
            lambda: client.job(long).state == "running", within=60, what="the training to run"
        )
        waiting = client.submit(generation(model="doomed", rows=[{"prompt": "w1"}])).id
        assert client.job(waiting).state == "queued"
    finally:
        shutil.rmtree(tiny_models / "doomed")
    client.cancel(long)
    eventually(
        lambda: client.job(waiting).state in ("succeeded", "failed"), 120, "the job to be over"
    )
    ended = client.job(waiting)
    assert ended.state == "failed"
    assert ended.failure is not None
    assert ended.failure.code == "model_not_found"
    assert "doomed" in ended.failure.message
    assert len(ended.attempts) == 1
