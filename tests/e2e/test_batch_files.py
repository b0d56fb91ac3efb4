"""A batch job from a table to files, over real devices: some rows fail and are run again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.e2e.stack_process import StackProcess

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_from_a_table_to_files_and_the_failed_rows_again(
    stack: StackProcess, tmp_path: Path
) -> None:
    client = stack.client
    # 300 tokens are more than the model takes: every tenth row fails until it may be cut.
    prompts = [f"w{n} " * (300 if n % 10 == 9 else 1 + n % 7) for n in range(60)]
    table = pa.table({"id": [n // 2 for n in range(60)], "prompt": prompts})
    pq.write_table(table, tmp_path / "in.parquet", row_group_size=16)
    spec = {
        "kind": "infer", "task": "text-generation", "model": "tinyllama", "shard_rows": 8,
        "input": str(tmp_path / "in.parquet"), "generation": {"max_new_tokens": 4},
    }  # fmt: skip
    job = client.submit(spec, upload=True).id
    as_they_come = list(client.results(job, order="completion"))
    ended = client.wait(job, timeout=120)
    assert (ended.rows_total, ended.rows_done, ended.row_errors) == (60, 60, 6)

    in_order = list(client.results(job))
    assert [row["row"] for row in in_order] == list(range(60))
    assert [row["id"] for row in in_order] == [n // 2 for n in range(60)]
    assert sorted(as_they_come, key=lambda row: row["row"]) == in_order
    failed = [row["row"] for row in in_order if row["error"]]
    assert failed == [9, 19, 29, 39, 49, 59]
    told = [event.message for event in client.events(job, follow=False) if event.type == "notice"]
    assert told == ["30 rows have an id that an earlier row has; the first is row 1, 0"]

    assert client.download_results(job, tmp_path / "out.jsonl") == 60
    assert rows_of(tmp_path / "out.jsonl") == in_order
    assert client.download_results(job, tmp_path / "out.parquet") == 60
    found = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert [row["text"] for row in found] == [(row["output"] or {}).get("text") for row in in_order]
    assert [row["error_code"] for row in found if row["error_code"]] == [
        in_order[row]["error"]["code"] for row in failed
    ]

    again = client.retry(job, failed=True, changes={"too_long": "truncate"})
    assert again.rows_total == 6
    client.wait(again.id, timeout=120)
    second = list(client.results(again.id))
    assert [(row["row"], row["id"], row["error"]) for row in second] == [
        (row, row // 2, None) for row in failed
    ]

    used = client.usage(group="key")
    [item] = used.items
    jobs = [client.job(each.id) for each in client.jobs()]
    assert item.rows == sum(each.rows_done or 0 for each in jobs)
    assert item.output_tokens == sum(each.output_tokens or 0 for each in jobs)
    assert item.device_seconds == pytest.approx(
        sum(each.device_seconds for each in jobs), abs=1e-5 * len(jobs)
    )
    ended = client.job(job)
    assert ended.summary is not None
    assert ended.summary["device_seconds"] == ended.device_seconds > 0
