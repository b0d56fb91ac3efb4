"""Events and logs: live, resumable, ended, and outliving Postgres."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from gpuyard.local.servers import PostgresServer
from shared.settings import Settings
from shared.store import Store
from tests.api.conftest import Api, error_of, running, submit
from tests.api.fake_worker import FakeFleet
from tests.api.sse import Sent, events
from tests.stack import eventually

Spec = Callable[..., dict[str, Any]]


def test_the_story_ends_with_end(client: httpx.Client, fleet: FakeFleet, infer_spec: Spec) -> None:
    job = submit(client, infer_spec(3))["id"]
    with client.stream("GET", f"/v1/jobs/{job}/events") as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        stream = events(answer)
        assert next(stream).data["type"] == "submitted"
        (holder,) = fleet.start(job)
        fleet.compute(holder, 0)
        fleet.finish(holder)
        rest = list(stream)
    assert [s.data["type"] for s in rest[:-1]] == ["dispatched", "claimed", "running", "succeeded"]
    assert rest[-1] == Sent("end", None, {"state": "succeeded"})
    ids = [int(s.id or 0) for s in rest[:-1]]
    assert ids == sorted(set(ids)) == [s.data["id"] for s in rest[:-1]]


def test_a_wake_up_comes_at_once(
    client: httpx.Client, fleet: FakeFleet, infer_spec: Spec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scheduler.api.streams.POLL", 3600.0)
    job = submit(client, infer_spec(3))["id"]
    (holder,) = fleet.start(job)
    with client.stream("GET", f"/v1/jobs/{job}/logs") as answer:
        stream = events(answer)
        for i in range(5):
            fleet.say(holder, f"line {i}\n")
            assert next(stream).data["text"] == f"line {i}\n"


def test_without_wake_ups_polling_finds_it(
    client: httpx.Client, fleet: FakeFleet, infer_spec: Spec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scheduler.api.wakeups.Wakeups._wake", lambda *_: None)
    monkeypatch.setattr("scheduler.api.streams.POLL", 0.1)
    job = submit(client, infer_spec(3))["id"]
    (holder,) = fleet.start(job)
    with client.stream("GET", f"/v1/jobs/{job}/logs") as answer:
        fleet.say(holder, "found")
        assert next(events(answer)).data["text"] == "found"


def test_a_silent_stream_is_kept_alive(
    client: httpx.Client, infer_spec: Spec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scheduler.api.streams.PING", 0.1)
    job = submit(client, infer_spec(3))["id"]
    with client.stream("GET", f"/v1/jobs/{job}/logs") as answer:
        assert next(answer.iter_lines()).startswith(":"), "a comment, which is no event"


def test_what_is_there_now(client: httpx.Client, fleet: FakeFleet, infer_spec: Spec) -> None:
    job = submit(client, infer_spec(3))["id"]
    (holder,) = fleet.start(job)
    fleet.say(holder, "one")
    fleet.say(holder, "two")
    now = client.get(f"/v1/jobs/{job}/logs", params={"follow": False})
    assert [s.data["text"] for s in events(now)] == ["one", "two"], "and no end: it still runs"
    listed = client.get(f"/v1/jobs/{job}/logs", params={"format": "json"}).json()
    assert [item["text"] for item in listed] == ["one", "two"]
    later = client.get(
        f"/v1/jobs/{job}/logs", params={"format": "json", "after": listed[0]["id"]}
    ).json()
    assert later == listed[1:]
    other = client.get(f"/v1/jobs/{job}/logs", params={"format": "json", "rank": 1}).json()
    assert other == []
    bad = client.get(f"/v1/jobs/{job}/logs", headers={"Last-Event-ID": "odd"})
    error_of(bad, 422, "invalid_request")


def test_progress_is_sent_when_asked_for(
    client: httpx.Client, fleet: FakeFleet, store: Store, infer_spec: Spec
) -> None:
    from shared.store.report import record_progress

    job = submit(client, infer_spec(3))["id"]
    (holder,) = fleet.start(job)
    progress = {"step": 1, "total_steps": 3, "examples_per_second": 4.0}
    assert store.call(record_progress, holder, progress)
    with client.stream("GET", f"/v1/jobs/{job}/events", params={"progress": True}) as answer:
        said = next(s for s in events(answer) if s.event == "progress")
    assert said.id is None, "resuming goes by the ids of events"
    assert said.data["eta_seconds"] == 0.5


def test_a_stream_cut_again_and_again_misses_and_doubles_nothing(
    api: Api, client: httpx.Client, fleet: FakeFleet, infer_spec: Spec
) -> None:
    """A writer appends all the while; the reader drops the connection in the middle of the stream
    and goes on from the last id it saw."""
    job = submit(client, infer_spec(3))["id"]
    (holder,) = fleet.start(job)
    total, per_connection = 120, 17

    def write() -> None:
        for i in range(total):
            fleet.say(holder, str(i))
        fleet.compute(holder, 0)
        fleet.finish(holder)

    writer = threading.Thread(target=write)
    writer.start()
    seen: list[str] = []
    last, ended, connections = None, False, 0
    while not ended:
        connections += 1
        headers = {"Last-Event-ID": last} if last else {}
        with client.stream("GET", f"/v1/jobs/{job}/logs", headers=headers) as answer:
            for taken, sent in enumerate(events(answer)):
                if sent.event == "end":
                    ended = True
                    break
                seen.append(sent.data["text"])
                last = sent.id
                if taken == per_connection:
                    break
    writer.join()
    assert seen == [str(i) for i in range(total)]
    assert connections > total // (per_connection + 1), "the connection was cut in the middle"
    again = client.get(f"/v1/jobs/{job}/logs", headers={"Last-Event-ID": str(last)})
    assert [s.event for s in events(again)] == ["end"]


def test_a_stream_outlives_postgres(
    new_postgres: Callable[[], PostgresServer],
    make_settings: Callable[..., Settings],
    infer_spec: Spec,
) -> None:
    postgres = new_postgres()
    store = Store(postgres.url)
    with running(make_settings(postgres.url, auth=False), store) as api, api.client("") as client:
        job = submit(client, infer_spec(3))["id"]
        with client.stream("GET", f"/v1/jobs/{job}/events") as answer:
            stream = events(answer)
            assert next(stream).data["type"] == "submitted"
            postgres.stop()
            with api.client("") as other:
                down = other.get("/v1/jobs")
                error_of(down, 503, "unavailable")
                assert down.headers["retry-after"]
                assert other.get("/healthz").status_code == 200
                assert other.get("/readyz").json()["checks"]["postgres"] == "cannot be reached"
                postgres.start()
                eventually(lambda: other.get("/v1/jobs").status_code == 200, what="it recovers")
                other.post(f"/v1/jobs/{job}/cancel")
            assert [s.data.get("type", s.event) for s in stream] == ["cancelled", "end"]
    store.close()


def test_shutting_down_ends_open_streams(
    settings: Settings, store: Store, infer_spec: Spec
) -> None:
    open_settings = settings.model_copy(update={"auth": False})
    with running(open_settings, store) as api, api.client("") as client:
        job = submit(client, infer_spec(3))["id"]
        with (
            client.stream("GET", f"/v1/jobs/{job}/events") as events_answer,
            api.client("") as other,
            other.stream("GET", f"/v1/jobs/{job}/results?follow=true") as rows_answer,
        ):
            stream = events(events_answer)
            assert next(stream).data["type"] == "submitted"
            api.server.should_exit = True
            assert list(stream) == [], "no end event: the job is not over"
            assert rows_answer.read() == b""
