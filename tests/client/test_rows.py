"""Results in both orders and as files, running a job again, and usage: through SDK and command line."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from gpuyard import Client
from shared.errors import Conflict, InvalidRequest
from tests.api.conftest import Api
from tests.api.fake_worker import FakeFleet, answer
from tests.client.conftest import Said
from tests.client.proxy import MakeProxy

Spec = Callable[..., dict[str, Any]]
Cli = Callable[..., Said]
WHOLE = [8, 9, 10, 11, 0, 1, 2, 3, 4, 5, 6, 7]


def numbers(rows: Any) -> list[int]:
    return [row["row"] for row in rows]


@pytest.fixture
def job(sdk: Client, fleet: FakeFleet, infer_spec: Spec) -> str:
    """A batch job of 12 rows that succeeded, its last shard first; row 6 failed."""
    id = sdk.submit(infer_spec(12)).id
    (holder,) = fleet.start(id)
    for index in (2, 0, 1):
        fleet.compute(holder, index)
    fleet.finish(holder)
    return id


@pytest.mark.parametrize("cut", [0, 300, 700, 1100])
def test_a_broken_stream_goes_on_in_the_order_of_completion(
    api: Api, job: str, proxied: MakeProxy, cut: int
) -> None:
    proxy = proxied(cut, cut + 150)
    with Client(proxy.url, api.key) as client:
        rows = list(client.results(job, order="completion"))
    assert numbers(rows) == WHOLE
    assert sorted(rows, key=lambda row: row["row"]) == [answer(row) for row in range(12)]
    assert proxy.cut


def test_results_follow_a_running_job(sdk: Client, fleet: FakeFleet, infer_spec: Spec) -> None:
    job = sdk.submit(infer_spec(12)).id
    (holder,) = fleet.start(job)
    fleet.compute(holder, 2)
    assert numbers(sdk.results(job, follow=False)) == [8, 9, 10, 11]
    as_they_come = sdk.results(job, order="completion")
    assert numbers(next(as_they_come) for _ in range(4)) == [8, 9, 10, 11]
    found: dict[str, list[int]] = {}
    readers = [
        threading.Thread(target=lambda: found.update(input=numbers(sdk.results(job)))),
        threading.Thread(target=lambda: found.update(completion=numbers(as_they_come))),
    ]
    for reader in readers:
        reader.start()
    fleet.compute(holder, 0)
    fleet.compute(holder, 1)
    fleet.finish(holder)
    for reader in readers:
        reader.join(30)
    assert found == {"input": list(range(12)), "completion": WHOLE[4:]}


def test_a_file_is_parquet_by_its_ending(sdk: Client, cli: Cli, job: str, tmp_path: Path) -> None:
    for name in ("out.parquet", "out.PQ"):
        said = cli("results", job, "-o", str(tmp_path / name))
        assert (said.code, said.out) == (0, ""), said
        assert f"12 rows in {tmp_path / name}" in said.err
        assert pq.read_table(tmp_path / name)["row"].to_pylist() == list(range(12))
    assert sdk.download_results(job, tmp_path / "out.jsonl", order="completion") == 12
    lines = (tmp_path / "out.jsonl").read_text().splitlines()
    assert numbers(map(json.loads, lines)) == WHOLE
    with pytest.raises(InvalidRequest, match="in input order"):
        sdk.download_results(job, tmp_path / "new.parquet", order="completion")
    assert cli("results", job, "-o", str(tmp_path / "no" / "x.parquet")).code == 2
    assert {path.name for path in tmp_path.iterdir() if path.name.startswith((".", "new"))} == set()


def test_a_parquet_file_that_is_cut_off_is_fetched_again(
    api: Api, job: str, proxied: MakeProxy, tmp_path: Path
) -> None:
    proxy = proxied(0, 600, 1500)
    with Client(proxy.url, api.key) as client:
        assert client.download_results(job, tmp_path / "out.parquet", follow=False) == 12
    assert proxy.cut == 3
    assert pq.read_table(io.BytesIO((tmp_path / "out.parquet").read_bytes())).num_rows == 12
    assert [path.name for path in tmp_path.glob("*out*")] == ["out.parquet"]


def test_following_into_a_parquet_file_waits_for_the_end(
    sdk: Client, fleet: FakeFleet, infer_spec: Spec, tmp_path: Path
) -> None:
    job = sdk.submit(infer_spec(8)).id
    (holder,) = fleet.start(job)
    fleet.compute(holder, 0)
    path = tmp_path / "out.parquet"
    assert sdk.download_results(job, path, follow=False) == 4
    counts: list[int] = []
    reader = threading.Thread(target=lambda: counts.append(sdk.download_results(job, path)))
    reader.start()
    fleet.compute(holder, 1)
    fleet.finish(holder)
    reader.join(30)
    assert counts == [8]
    assert pq.read_table(path).num_rows == 8


def test_the_order_is_an_option_of_the_command_line(cli: Cli, job: str) -> None:
    said = cli("results", job, "--order", "completion")
    assert numbers(map(json.loads, said.out.splitlines())) == WHOLE
    assert cli("results", job, "--order", "random").code == 2


def test_failed_rows_again(sdk: Client, cli: Cli, fleet: FakeFleet, job: str) -> None:
    said = cli("retry", job, "--failed", "--set", "batch_size=4", "--set", "name=again")
    assert said.code == 0, said
    second = sdk.job(said.out.strip())
    assert "1 rows, queued" in said.err
    assert (second.retry_of, second.rows_total, second.name) == (job, 1, "again")
    assert second.spec["batch_size"] == 4
    (holder,) = fleet.start(second.id)
    fleet.compute(holder, 0)
    fleet.finish(holder)
    assert numbers(sdk.results(second.id)) == [6]
    assert numbers(sdk.results(second.id, order="completion")) == [6]
    assert sdk.job(second.id).row_errors == 0
    said = cli("retry", second.id, "--failed")
    assert said.code == 5
    assert f"no row of {second.id} failed" in said.err

    whole = sdk.retry(second.id, changes={"name": None})
    assert (whole.rows_total, whole.name) == (1, None)
    with pytest.raises(Conflict, match="is queued"):
        sdk.retry(whole.id, failed=True)
    once = [sdk.retry(job, idempotency_key="k").id for _ in range(2)]
    assert once[0] == once[1]


def test_usage_by_key_and_day(api: Api, sdk: Client, cli: Cli, job: str) -> None:
    told = sdk.job(job)
    by_key = sdk.usage(group="key")
    [item] = by_key.items
    assert (item.key, item.key_name, item.jobs) == (api.key_id, "tests", 1)
    assert (item.rows, item.row_errors, item.input_tokens) == (12, 1, told.input_tokens)
    assert item.device_seconds == pytest.approx(told.device_seconds, abs=2e-6)
    assert by_key.total.rows == 12
    assert sdk.usage(until=date(2020, 1, 1)).total.jobs == 0

    said = cli("usage", "--by", "key")
    assert said.code == 0, said
    assert [line.split()[0] for line in said.out.splitlines()] == ["KEY", "tests", "all"]
    by_project = cli("usage", "--by", "project").out.splitlines()
    assert [line.split()[0] for line in by_project] == ["PROJECT", "default", "all"]
    assert json.loads(cli("usage", "--json", "--by", "day").out)["total"]["rows"] == 12
    assert [line.split()[0] for line in cli("usage").out.splitlines()][-1] == "all"
    assert cli("usage", "--since", "yesterday").code == 2


def test_tables_are_uploaded_and_read_by_their_name(
    sdk: Client, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.csv").write_text('body,id\n"one, two",7\nthree,7\n')
    said = cli(
        "submit", "-m", "classifier", "--task", "text-classification", "-i", "in.csv",
        "--text-column", "body",
    )  # fmt: skip
    assert said.code == 0, said
    found = sdk.job(said.out.strip())
    assert found.rows_total == 2
    assert found.spec["input"].startswith("file_")
    events = [event.message for event in sdk.events(found.id, follow=False)]
    assert any("the first is row 1" in message for message in events)
    said = cli("submit", "-m", "classifier", "--task", "text-classification", "-i", "in.csv")
    assert said.code == 2
    assert "has no column 'text'; it has 'body', 'id'" in said.err
