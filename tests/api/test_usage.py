"""What was used, held against what the jobs themselves say."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest
from sqlalchemy import text
from sqlmodel import Session

from shared.errors import InvalidRequest
from shared.lifecycle import FailureClass
from shared.settings import Settings
from shared.store import Store
from shared.store.keys import create_key
from tests.api.conftest import Api, error_of, running, submit
from tests.api.fake_worker import FakeFleet

Spec = Callable[..., dict[str, Any]]
COUNTS = ("rows", "row_errors", "input_tokens", "output_tokens")


def lease_times(store: Store, job: str, times: list[tuple[datetime, datetime | None]]) -> None:
    """Let the leases of a job, by attempt and rank, have been held at these times."""

    def write(session: Session) -> None:
        rows = session.connection().execute(
            text(
                "SELECT l.attempt_id, l.rank FROM leases l JOIN attempts a ON a.id = l.attempt_id"
                " WHERE a.job_id = :job ORDER BY a.number, l.rank"
            ),
            {"job": job},
        )
        for (attempt, rank), (claimed, released) in zip(rows.all(), times, strict=True):
            session.connection().execute(
                text(
                    "UPDATE leases SET claimed_at = :claimed,"
                    " released_at = CASE WHEN released_at IS NULL THEN NULL ELSE"
                    " CAST(:released AS timestamptz) END"
                    " WHERE attempt_id = :attempt AND rank = :rank"
                ),
                {"claimed": claimed, "released": released, "attempt": attempt, "rank": rank},
            )

    store.call(write)


def commit_times(store: Store, job: str, times: list[datetime]) -> None:
    def write(session: Session) -> None:
        for index, at in enumerate(times):
            session.connection().execute(
                text("UPDATE shards SET committed_at = :at WHERE job_id = :job AND index = :index"),
                {"at": at, "job": job, "index": index},
            )

    store.call(write)


def usage(client: httpx.Client, **params: Any) -> dict[str, Any]:
    answer = client.get("/v1/usage", params=params)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def test_usage_is_what_the_jobs_say(
    api: Api, client: httpx.Client, fleet: FakeFleet, infer_spec: Spec, train_spec: Spec
) -> None:
    fleet.add_device("cpu1@fake")
    other_id, other_key = api.store.call(create_key, "others", "elsewhere")
    third_id, third_key = api.store.call(create_key, "third", "elsewhere")
    with api.client(other_key) as others, api.client(third_key) as third:
        first = submit(client, infer_spec(10))["id"]
        second = submit(others, infer_spec(30))["id"]
        gang = submit(third, train_spec(resources={"devices": 2}))["id"]
        waits = submit(client, infer_spec(4))["id"]
    (holder,) = fleet.start(first)
    for index in range(3):
        fleet.compute(holder, index)
    fleet.finish(holder)
    (holder,) = fleet.start(second)
    fleet.compute(holder, 0)
    fleet.fail(holder, FailureClass.USER_ERROR, "wrong")
    one, two = fleet.start(gang, ("cpu0@fake", "cpu1@fake"))
    fleet.finish(one)
    fleet.finish(two)

    jobs = {id: client.get(f"/v1/jobs/{id}").json() for id in (first, second, gang, waits)}
    assert all(jobs[id]["device_seconds"] > 0 for id in (first, second, gang))
    assert jobs[waits]["device_seconds"] == 0
    for id in (first, gang):
        assert jobs[id]["summary"]["device_seconds"] == jobs[id]["device_seconds"]
    assert jobs[first]["input_tokens"] == jobs[first]["summary"]["input_tokens"] == 27

    def expected(*ids: str) -> dict[str, Any]:
        told = [jobs[id] for id in ids]
        return {
            "jobs": len(ids),
            "device_seconds": pytest.approx(sum(job["device_seconds"] for job in told), abs=2e-6),
            "rows": sum(job["rows_done"] or 0 for job in told),
            "row_errors": sum(job["row_errors"] or 0 for job in told),
            "input_tokens": sum(job["input_tokens"] or 0 for job in told),
            "output_tokens": sum(job["output_tokens"] or 0 for job in told),
        }

    by_key = usage(client, group="key")
    found = {item["key"]: item for item in by_key["items"]}
    assert set(found) == {api.key_id, other_id, third_id}
    assert found[other_id]["key_name"] == "others"
    assert {key: item["project"] for key, item in found.items()} == {
        api.key_id: "default",
        other_id: "elsewhere",
        third_id: "elsewhere",
    }
    for key, ids in ((api.key_id, (first, waits)), (other_id, (second,)), (third_id, (gang,))):
        assert {name: found[key][name] for name in expected()} == expected(*ids)
    by_project = usage(client, group="project")
    projects = {item["project"]: item for item in by_project["items"]}
    assert set(projects) == {"default", "elsewhere"}
    for project, ids in (("default", (first, waits)), ("elsewhere", (second, gang))):
        assert {name: projects[project][name] for name in expected()} == expected(*ids)
    assert by_project["total"] == by_key["total"]
    assert {name: by_key["total"][name] for name in expected()} == expected(*jobs)
    whole = usage(client)
    assert {name: whole["total"][name] for name in expected()} == expected(*jobs)
    assert [item["day"] for item in usage(client, group="day")["items"]]


def test_a_period_takes_its_part_of_what_was_held(
    client: httpx.Client, store: Store, fleet: FakeFleet, infer_spec: Spec
) -> None:
    job = submit(client, infer_spec(12))["id"]
    (holder,) = fleet.start(job)
    for index in range(3):
        fleet.compute(holder, index)
    fleet.finish(holder)
    start = datetime(2020, 3, 1, 22, 0, 0, 250_000, tzinfo=UTC)
    end = datetime(2020, 3, 3, 1, 0, tzinfo=UTC)
    lease_times(store, job, [(start, end)])
    midnight = datetime(2020, 3, 2, tzinfo=UTC)
    commit_times(store, job, [start, midnight, midnight - timedelta(microseconds=1)])
    assert client.get(f"/v1/jobs/{job}").json()["device_seconds"] == 97_199.75

    days = usage(client, group="day", since="2020-02-01", until="2020-04-01")
    found = {item["day"]: item for item in days["items"]}
    seconds = {day: item["device_seconds"] for day, item in found.items()}
    assert seconds == {"2020-03-01": 7199.75, "2020-03-02": 86_400.0, "2020-03-03": 3600.0}
    # Rows 0-3 and 8-11 before midnight, 4-7 at midnight; row 6 is the only error.
    assert [found[day]["rows"] for day in sorted(found)] == [8, 4, 0]
    assert [found[day]["row_errors"] for day in sorted(found)] == [0, 1, 0]
    assert days["total"]["device_seconds"] == 97_199.75
    assert days["total"]["jobs"] == 0, "it was submitted today"

    day = usage(client, since="2020-03-02", until="2020-03-03")["total"]
    assert (day["device_seconds"], day["rows"]) == (86_400.0, 4)
    part = usage(client, since="2020-03-02T10:00:00+02:00", until="2020-03-02T09:00:00Z")["total"]
    assert (part["device_seconds"], part["rows"]) == (3600.0, 0)
    assert usage(client, since="2020-03-03T01:00:00Z", until="2020-03-04")["items"] == []


def test_what_runs_counts_until_now(
    client: httpx.Client, store: Store, fleet: FakeFleet, infer_spec: Spec
) -> None:
    job = submit(client, infer_spec(4))["id"]
    fleet.start(job)
    lease_times(store, job, [(datetime.now(UTC) - timedelta(hours=2), None)])
    looks = [client.get(f"/v1/jobs/{job}").json() for _ in range(2)]
    assert looks[0] == looks[1], "a job that does not change looks the same"
    assert 7200 <= usage(client)["total"]["device_seconds"] < 7500
    later = datetime.now(UTC) + timedelta(days=2)
    future = usage(client, since=later.isoformat(), until=(later + timedelta(days=1)).isoformat())
    assert future["items"] == [] and future["total"]["device_seconds"] == 0


def test_periods_that_are_none(client: httpx.Client) -> None:
    answer = client.get("/v1/usage", params={"since": "2020-03-02", "until": "2020-03-01"})
    assert error_of(answer, 422, "invalid_request")["param"] == "since"
    answer = client.get("/v1/usage", params={"since": "yesterday"})
    assert error_of(answer, 422, "invalid_request")["param"] == "since"
    answer = client.get("/v1/usage", params={"group": "team"})
    assert error_of(answer, 422, "invalid_request")["param"] == "group"
    nothing = usage(client, group="key")
    assert nothing["items"] == []
    assert {name: nothing["total"][name] for name in COUNTS} == dict.fromkeys(COUNTS, 0)


def test_jobs_without_a_key_are_of_the_default_project(
    database: str, make_settings: Callable[..., Settings], store: Store, infer_spec: Spec
) -> None:
    with running(make_settings(database, auth=False), store) as api, api.client() as client:
        submit(client, infer_spec(3))
        [item] = usage(client, group="project")["items"]
        assert (item["project"], item["jobs"], item["key"]) == ("default", 1, None)
        [item] = usage(client, group="key")["items"]
        assert (item["project"], item["key"]) == ("default", None)


@pytest.mark.parametrize("project", ["", "-x", "a b", "x" * 65, "a/b"])
def test_names_that_are_none(store: Store, project: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        store.call(create_key, "me", project)
    assert caught.value.param == "project"
