"""Rows of batch jobs, metrics, checkpoints and artifacts."""

from __future__ import annotations

import hashlib
import json
import socket
import threading
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from shared.messages import FileDigest
from shared.settings import Settings
from shared.store import Store, report
from tests.api.conftest import Api, error_of, submit
from tests.api.fake_worker import FakeFleet, answer

Spec = Callable[..., dict[str, Any]]


def lines(text: str) -> list[Any]:
    return [json.loads(line) for line in text.splitlines()]


def test_results_are_readable_while_the_job_runs(
    client: httpx.Client, fleet: FakeFleet, infer_spec: Spec
) -> None:
    job = submit(client, infer_spec(10))["id"]
    address = f"/v1/jobs/{job}/results"
    nothing = client.get(address)
    assert (nothing.text, nothing.headers["x-rows-done"]) == ("", "0")
    (holder,) = fleet.start(job)
    fleet.compute(holder, 0)
    fleet.compute(holder, 2)
    partial = client.get(address)
    assert partial.headers["content-type"] == "application/x-ndjson"
    assert (partial.headers["x-rows-done"], partial.headers["x-rows-total"]) == ("6", "10")
    assert partial.headers["x-job-state"] == "running"
    assert [r["row"] for r in lines(partial.text)] == [0, 1, 2, 3, 8, 9]
    assert client.get(f"/v1/jobs/{job}").json()["rows_done"] == 6
    fleet.compute(holder, 1)
    fleet.finish(holder)
    whole = client.get(address)
    assert lines(whole.text) == [answer(row) for row in range(10)]
    assert whole.headers["x-row-errors"] == "1"
    assert [r["row"] for r in lines(client.get(address, params={"after_row": 6}).text)] == [7, 8, 9]
    assert client.get(address, params={"after_row": 9}).text == ""


def test_following_delivers_rows_in_order_and_ends_with_the_job(
    client: httpx.Client, fleet: FakeFleet, infer_spec: Spec
) -> None:
    job = submit(client, infer_spec(10))["id"]
    (holder,) = fleet.start(job)
    fleet.compute(holder, 2)
    with client.stream("GET", f"/v1/jobs/{job}/results", params={"follow": True}) as stream:
        rows = stream.iter_lines()
        fleet.compute(holder, 0)
        first = [json.loads(next(rows))["row"] for _ in range(4)]
        assert first == [0, 1, 2, 3], "the shard that was first to finish waits for its turn"
        fleet.compute(holder, 1)
        second = [json.loads(next(rows))["row"] for _ in range(6)]
        assert second == [4, 5, 6, 7, 8, 9]
        fleet.finish(holder)
        assert list(rows) == []


def test_a_silent_stream_is_kept_alive(
    client: httpx.Client, fleet: FakeFleet, infer_spec: Spec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scheduler.api.streams.POLL", 0.05)
    monkeypatch.setattr("scheduler.api.result_orders.PING", 0.2)
    job = submit(client, infer_spec(4))["id"]
    with client.stream("GET", f"/v1/jobs/{job}/results", params={"follow": True}) as stream:
        rows = stream.iter_lines()
        assert [next(rows), next(rows)] == ["", ""], "blank lines are no rows"
        client.post(f"/v1/jobs/{job}/cancel")
        assert set(rows) <= {""}


def test_following_a_job_that_is_cancelled_delivers_what_there_is(
    client: httpx.Client, fleet: FakeFleet, store: Store, infer_spec: Spec
) -> None:
    from shared.store.finish import leave_attempt

    job = submit(client, infer_spec(10))["id"]
    (holder,) = fleet.start(job)
    fleet.compute(holder, 2)
    with client.stream("GET", f"/v1/jobs/{job}/results", params={"follow": True}) as stream:
        client.post(f"/v1/jobs/{job}/cancel")
        assert store.call(leave_attempt, holder)
        assert [r["row"] for r in lines(stream.read().decode())] == [8, 9]


def test_many_rows_in_order(client: httpx.Client, fleet: FakeFleet, infer_spec: Spec) -> None:
    job = submit(client, infer_spec(2000, shard_rows=50))["id"]
    (holder,) = fleet.start(job)
    for index in reversed(range(40)):
        fleet.compute(holder, index)
    rows = lines(client.get(f"/v1/jobs/{job}/results").text)
    assert [r["row"] for r in rows] == list(range(2000))


def test_a_training_job_has_no_rows(client: httpx.Client, train_spec: Spec) -> None:
    job = submit(client, train_spec())["id"]
    error_of(client.get(f"/v1/jobs/{job}/results"), 422, "invalid_request")


def test_metrics_and_checkpoints(
    client: httpx.Client, fleet: FakeFleet, store: Store, train_spec: Spec
) -> None:
    job = submit(client, train_spec())["id"]
    (holder,) = fleet.start(job)
    for step in (1, 2):
        assert store.call(report.record_metric, holder, "train", step, {"loss": 1.0 / step})
        manifest = {"state.pt": FileDigest(size=7, sha256="0" * 64)}
        assert store.call(report.commit_checkpoint, holder, step, f"jobs/x/{step}", manifest, 1)
    for _ in range(2):  # once more, as if the answer had been lost
        assert store.call(report.record_metric, holder, "validation", 2, {"accuracy": 0.5})
    told = client.get(f"/v1/jobs/{job}/events", params={"format": "json"}).json()
    assert [e["message"] for e in told if e["type"] == "evaluation"] == [
        "validation at step 2: accuracy 0.5"
    ]
    metrics = client.get(f"/v1/jobs/{job}/metrics").json()["items"]
    assert [(m["split"], m["step"]) for m in metrics] == [
        ("train", 1), ("train", 2), ("validation", 2),
    ]  # fmt: skip
    some = client.get(f"/v1/jobs/{job}/metrics", params={"split": "validation"}).json()["items"]
    assert [m["values"] for m in some] == [{"accuracy": 0.5}]
    checkpoints = client.get(f"/v1/jobs/{job}/checkpoints").json()["items"]
    assert [(c["step"], c["size"], c["best"]) for c in checkpoints] == [
        (2, 7, False), (1, 7, True),
    ]  # fmt: skip


@pytest.fixture
def published(
    client: httpx.Client, fleet: FakeFleet, settings: Settings, train_spec: Spec
) -> tuple[str, bytes]:
    """A job that succeeded with an artifact, and its content."""
    job = submit(client, train_spec())["id"]
    (holder,) = fleet.start(job)
    content = bytes(range(256)) * 1000
    fleet.publish(holder, settings.data, "model/weights.bin", content)
    assert client.get(f"/v1/jobs/{job}/artifacts").json()["items"] == [], "not before success"
    error_of(client.get(f"/v1/jobs/{job}/artifacts/model/weights.bin"), 404, "not_found")
    fleet.finish(holder)
    return job, content


def test_artifacts_are_downloaded_whole_and_in_parts(
    client: httpx.Client, published: tuple[str, bytes]
) -> None:
    job, content = published
    (listed,) = client.get(f"/v1/jobs/{job}/artifacts").json()["items"]
    assert (listed["name"], listed["size"]) == ("model/weights.bin", len(content))
    address = f"/v1/jobs/{job}/artifacts/model/weights.bin"
    whole = client.get(address)
    assert whole.content == content
    etag = f'"{hashlib.sha256(content).hexdigest()}"'
    assert whole.headers["etag"] == etag
    rest = client.get(address, headers={"Range": "bytes=250000-", "If-Range": etag})
    assert (rest.status_code, rest.content) == (206, content[250000:])
    beyond = client.get(address, headers={"Range": f"bytes={len(content)}-"})
    error_of(beyond, 416, "range_not_satisfiable")
    assert beyond.headers["content-range"] == f"bytes */{len(content)}"
    odd = client.get(address, headers={"Range": "lines=1-2"})
    error_of(odd, 422, "invalid_request")
    same = client.get(address, headers={"If-None-Match": etag})
    assert (same.status_code, same.content) == (304, b"")


@pytest.mark.parametrize(
    "name", ["../../../../../etc/passwd", "..", "model/../../x", "/etc/passwd", "a//b", "a\\..\\b"]
)
def test_names_that_lead_out(api: Api, published: tuple[str, bytes], name: str) -> None:
    """Sent as written: clients tidy such paths away before they send them."""
    job, _ = published
    for path in (name, name.replace("..", "%2e%2e"), name.replace("/", "%2F")):
        with socket.create_connection(("127.0.0.1", api.port), timeout=10) as raw:
            raw.sendall(
                f"GET /v1/jobs/{job}/artifacts/{path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
                f"Authorization: Bearer {api.key}\r\n\r\n".encode()
            )
            answered = b""
            while part := raw.recv(65536):
                answered += part
        head, _, body = answered.partition(b"\r\n\r\n")
        assert head.split()[1] == b"422", answered[:300]
        assert json.loads(body)["error"]["param"] == "name"


def test_an_artifact_that_is_gone_from_disk(
    client: httpx.Client, settings: Settings, published: tuple[str, bytes]
) -> None:
    job, _ = published
    next(settings.data.glob("jobs/*/*/artifacts/model/weights.bin")).unlink()
    gone = client.get(f"/v1/jobs/{job}/artifacts/model/weights.bin")
    assert "data folder" in error_of(gone, 404, "not_found")["message"]
    error_of(client.get(f"/v1/jobs/{job}/artifacts/other"), 404, "not_found")


def test_followers_do_not_block_others(
    api: Api, client: httpx.Client, fleet: FakeFleet, infer_spec: Spec
) -> None:
    """More open streams than the server has threads: they wait without holding one."""
    job = submit(client, infer_spec(4))["id"]
    (holder,) = fleet.start(job)
    got: list[str] = []

    def follow() -> None:
        with api.client() as one:
            got.append(one.get(f"/v1/jobs/{job}/results", params={"follow": True}).text)

    threads = [threading.Thread(target=follow) for _ in range(60)]
    for thread in threads:
        thread.start()
    assert client.get(f"/v1/jobs/{job}").status_code == 200
    fleet.compute(holder, 0)
    fleet.finish(holder)
    for thread in threads:
        thread.join(timeout=30)
    assert [len(lines(text)) for text in got] == [4] * 60
