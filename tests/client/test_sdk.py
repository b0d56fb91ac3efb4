"""Submitting once, waiting, streams that go on: through connections that break."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gpuyard import Client, InferSpec, JobFailed, TrainSpec, WaitTimedOut
from gpuyard.connection import find_connection
from shared.errors import (
    AuthenticationFailed,
    ConfigurationError,
    DataError,
    IdempotencyMismatch,
    InvalidRequest,
    InvalidSpec,
    ModelNotFound,
    NotFound,
    PayloadTooLarge,
    Unavailable,
)
from shared.lifecycle import FailureClass, JobState
from shared.views import JobDetail
from tests.api.conftest import Api
from tests.api.fake_worker import FakeFleet
from tests.client.conftest import running_on
from tests.client.proxy import MakeProxy

Spec = Callable[..., dict[str, Any]]


# Submission


def test_a_cut_after_the_commit_makes_no_second_job(
    api: Api, sdk: Client, proxied: MakeProxy, infer_spec: Spec
) -> None:
    proxy = proxied(0, 0)
    with Client(proxy.url, api.key) as client:
        job = client.submit(infer_spec())
    assert proxy.cut == 2, "the fault did not strike"
    assert [j.id for j in sdk.jobs()] == [job.id]


def test_the_same_key_gives_the_same_job(sdk: Client, infer_spec: Spec) -> None:
    first = sdk.submit(infer_spec(), idempotency_key="k")
    assert sdk.submit(infer_spec(), idempotency_key="k").id == first.id
    assert sdk.submit(infer_spec()).id != first.id
    with pytest.raises(IdempotencyMismatch):
        sdk.submit(infer_spec(5), idempotency_key="k")


def test_specs_may_be_objects(sdk: Client, infer_spec: Spec, train_spec: Spec) -> None:
    infer, train = InferSpec(**infer_spec()), TrainSpec(**train_spec())
    assert sdk.submit(infer).spec["shard_rows"] == infer.shard_rows
    assert TrainSpec(**sdk.submit(train).spec) == train


def test_a_wrong_spec_is_refused_before_anything_is_sent(infer_spec: Spec) -> None:
    with Client("http://127.0.0.1:9") as client, pytest.raises(InvalidSpec) as caught:
        client.submit(infer_spec(max_lenght=3))
    assert caught.value.param == "max_lenght"


def test_errors_of_the_service_come_back_as_their_classes(sdk: Client, infer_spec: Spec) -> None:
    with pytest.raises(ModelNotFound) as caught:
        sdk.submit(infer_spec(model="nowhere"))
    assert caught.value.param == "model"
    assert caught.value.hint
    assert caught.value.request_id
    with pytest.raises(NotFound):
        sdk.job("job_nowhere")
    with pytest.raises(InvalidRequest):
        sdk.job("../v1/files")


def test_a_wrong_key_is_said(api: Api) -> None:
    for key in ("gy_wrong", None):
        with Client(api.url, key) as client, pytest.raises(AuthenticationFailed):
            list(client.jobs())


def test_local_files_are_uploaded_once(
    sdk: Client, train_spec: Spec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = Path(train_spec()["data"]["train"]).read_text()
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.chdir(home)
    (home / "mine.jsonl").write_text(text)
    (home / "copy.jsonl").write_text(text)
    spec = train_spec(data={"train": "mine.jsonl", "validation": "copy.jsonl"})
    job = sdk.submit(spec, upload=True, idempotency_key="again")
    (file,) = sdk.files()
    assert file.sha256 == hashlib.sha256(text.encode()).hexdigest()
    assert job.spec["data"]["train"] == job.spec["data"]["validation"] == file.id
    assert spec["data"]["train"] == "mine.jsonl"
    # Another process finds it at the service, so that its repeat is the same spec.
    with Client(sdk.connection.url, sdk.connection.api_key) as another:
        assert another.submit(spec, upload=True, idempotency_key="again").id == job.id
        assert len(list(another.files())) == 1


def test_a_file_under_a_name_of_another_kind_is_another(
    sdk: Client, train_spec: Spec, tmp_path: Path
) -> None:
    content = b"text,label\n" + b"one,a\ntwo,b\n" * 10
    for name in ("rows.txt", "rows.csv"):
        (tmp_path / name).write_bytes(content)

    def submit(name: str) -> str:
        spec = train_spec(data={"train": name})
        return str(sdk.submit(spec, upload=True, bases=[tmp_path]).spec["data"]["train"])

    with pytest.raises(DataError, match="plain text by its name"):
        submit("rows.txt")
    assert submit("rows.csv") == submit("rows.csv")
    assert {file.name for file in sdk.files()} == {"rows.txt", "rows.csv"}


def test_files_beside_the_spec_are_found(sdk: Client, train_spec: Spec, tmp_path: Path) -> None:
    beside = Path(train_spec()["data"]["train"])
    spec = train_spec(data={"train": beside.name})
    job = sdk.submit(spec, upload=True, bases=[tmp_path / "nowhere", beside.parent])
    assert job.spec["data"]["train"].startswith("file_")


# Looking


def test_lists_are_paged_as_they_are_read(
    sdk: Client, infer_spec: Spec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpuyard.calls.base.PAGE", 2)
    made = [sdk.submit(infer_spec(1, name="even" if i % 2 == 0 else "odd")).id for i in range(5)]
    assert [job.id for job in sdk.jobs()] == made[::-1]
    assert [job.id for job in sdk.jobs(name="even")] == made[::-2]
    sdk.cancel(made[0])
    assert [job.id for job in sdk.jobs(state=JobState.CANCELLED)] == made[:1]
    assert len(list(sdk.jobs(state=["queued", "cancelled"]))) == 5


def test_devices_workers_and_health(sdk: Client, fleet: FakeFleet) -> None:
    fleet.add_device("gpu0@fake", simulated=True)
    assert {(d.id, d.simulated) for d in sdk.devices()} == {
        ("cpu0@fake", False),
        ("gpu0@fake", True),
    }
    assert {w.device_id for w in sdk.workers()} == {"cpu0@fake", "gpu0@fake"}
    health = sdk.health()
    assert health.status == "degraded"  # no broker is there
    assert health.checks["postgres"] == "ok"


# Waiting


def test_wait_sees_progress_and_the_end(sdk: Client, fleet: FakeFleet, infer_spec: Spec) -> None:
    job = sdk.submit(infer_spec(8))
    seen: list[JobDetail] = []

    def drive(look: JobDetail) -> None:
        seen.append(look)
        if look.state is JobState.QUEUED:
            holders.extend(fleet.start(job.id))
        elif look.state is JobState.RUNNING and (look.rows_done or 0) < 8:
            fleet.compute(holders[0], (look.rows_done or 0) // 4)
        elif look.state is JobState.RUNNING:
            fleet.finish(holders[0], {"accuracy": 0.5})

    holders: list[Any] = []
    end = sdk.wait(job.id, 20, drive, poll_seconds=0.02)
    assert end.state is JobState.SUCCEEDED
    assert [s.rows_done for s in seen] == [0, 0, 4, 8, 8]
    assert [s.state for s in seen][::4] == ["queued", "succeeded"]


def test_a_failed_job_raises_with_class_code_and_hint(
    sdk: Client, fleet: FakeFleet, infer_spec: Spec
) -> None:
    job = sdk.submit(infer_spec())
    (holder,) = fleet.start(job.id)
    fleet.fail(holder, FailureClass.DATA_ERROR, "line 3 is no JSON")
    with pytest.raises(JobFailed) as caught:
        sdk.wait(job.id)
    error = caught.value
    assert (error.failure_class, error.code) == (FailureClass.DATA_ERROR, "fake_failure")
    assert (error.message, error.hint) == ("line 3 is no JSON", "Change the test.")
    assert error.job.id == job.id
    assert sdk.wait(job.id, raise_on_failure=False).state is JobState.FAILED


def test_a_cancelled_job_raises_too(sdk: Client, infer_spec: Spec) -> None:
    job = sdk.submit(infer_spec())
    assert sdk.cancel(job.id, "not needed").state is JobState.CANCELLED
    with pytest.raises(JobFailed, match="not needed") as caught:
        sdk.wait(job.id)
    assert caught.value.failure_class is FailureClass.CANCELLED


def test_wait_gives_up_in_time(sdk: Client, infer_spec: Spec) -> None:
    job = sdk.submit(infer_spec())
    with pytest.raises(WaitTimedOut) as caught:
        sdk.wait(job.id, timeout=0.1, poll_seconds=0.02)
    assert caught.value.job.state is JobState.QUEUED
    assert isinstance(caught.value, TimeoutError)


def test_wait_outlives_the_api(api: Api, fleet: FakeFleet, infer_spec: Spec) -> None:
    with running_on(api) as port:
        client = Client(f"http://127.0.0.1:{port}", api.key, patience=0.3)
        job = client.submit(infer_spec(4))
    looked = threading.Event()
    outcome: list[Any] = []

    def wait() -> None:
        outcome.append(client.wait(job.id, on_progress=lambda _: looked.set(), poll_seconds=0.02))

    with running_on(api, port):
        thread = threading.Thread(target=wait)
        thread.start()
        assert looked.wait(10)
    with pytest.raises(Unavailable):  # longer away than patience lasts, and nobody waits in vain
        client.job(job.id)
    (holder,) = fleet.start(job.id)
    fleet.compute(holder, 0)
    fleet.finish(holder)
    with running_on(api, port):
        thread.join(20)
    assert [job.state for job in outcome] == [JobState.SUCCEEDED]


# Streams


def test_events_go_on_where_the_connection_broke(
    api: Api, sdk: Client, proxied: MakeProxy, fleet: FakeFleet, infer_spec: Spec
) -> None:
    job = sdk.submit(infer_spec(4)).id
    (holder,) = fleet.start(job)
    for number in range(30):
        fleet.tell(holder, f"note {number}")
    fleet.compute(holder, 0)
    fleet.finish(holder)
    told = list(sdk.events(job, follow=False))
    proxy = proxied(0, 700, 1501, 2503)
    with Client(proxy.url, api.key) as client:
        assert list(client.events(job)) == told
    assert proxy.cut == 4, "the fault did not strike"
    assert [e.type for e in told][-1] == "succeeded"
    assert list(sdk.events(job, after=told[-3].id)) == told[-2:]


def test_logs_come_while_the_job_runs(sdk: Client, fleet: FakeFleet, train_spec: Spec) -> None:
    fleet.add_device("cpu1@fake")
    job = sdk.submit(train_spec(resources={"devices": 2})).id
    one, two = fleet.start(job, ("cpu0@fake", "cpu1@fake"))
    fleet.say(one, "first\n")
    stream = sdk.logs(job)
    assert next(stream).text == "first\n"
    fleet.say(two, "second\n")
    assert next(stream).rank == 1
    fleet.finish(one)
    fleet.finish(two)
    assert list(stream) == []
    assert [log.text for log in sdk.logs(job, follow=False, rank=1)] == ["second\n"]


def test_rows_have_no_gap_and_no_double_through_cuts(
    api: Api, sdk: Client, proxied: MakeProxy, fleet: FakeFleet, infer_spec: Spec
) -> None:
    job = sdk.submit(infer_spec(40)).id
    (holder,) = fleet.start(job)
    for shard in range(10):
        fleet.compute(holder, shard)
    proxy = proxied(0, 600, 1000, None, 800)
    with Client(proxy.url, api.key) as client:
        rows = client.rows(job, follow=True)
        got = [next(rows) for _ in range(40)]
        fleet.finish(holder)
        got += rows
    assert proxy.cut >= 3, "the fault did not strike"
    assert [row["row"] for row in got] == list(range(40))
    assert list(sdk.rows(job)) == got


def test_rows_follow_past_a_restart_of_the_service(
    api: Api, fleet: FakeFleet, infer_spec: Spec
) -> None:
    with running_on(api) as port:
        client = Client(f"http://127.0.0.1:{port}", api.key)
        job = client.submit(infer_spec(8)).id
        (holder,) = fleet.start(job)
        fleet.compute(holder, 0)
        rows = client.rows(job, follow=True)
        got = [next(rows) for _ in range(4)]
    # That stream ended as properly as one that is complete.
    fleet.compute(holder, 1)
    fleet.finish(holder)
    with running_on(api, port):
        got += rows
    assert [row["row"] for row in got] == list(range(8))


def test_partial_rows_are_those_that_are_committed(
    sdk: Client, fleet: FakeFleet, infer_spec: Spec
) -> None:
    job = sdk.submit(infer_spec(12)).id
    (holder,) = fleet.start(job)
    fleet.compute(holder, 2)
    fleet.compute(holder, 0)
    assert [row["row"] for row in sdk.rows(job)] == [0, 1, 2, 3, 8, 9, 10, 11]
    with pytest.raises(InvalidRequest):
        list(sdk.rows("job/nowhere"))


# Transfers


@pytest.fixture
def published(sdk: Client, fleet: FakeFleet, train_spec: Spec, tmp_data: Path) -> tuple[str, bytes]:
    """(a job that succeeded, the content of its model/weights)."""
    job = sdk.submit(train_spec()).id
    (holder,) = fleet.start(job)
    content = bytes(range(256)) * 4000
    fleet.publish(holder, tmp_data, "model/weights", content)
    fleet.publish(holder, tmp_data, "empty.txt", b"")
    assert sdk.artifacts(job) == []
    fleet.finish(holder)
    return job, content


def test_a_download_resumes_and_is_checked(
    api: Api, proxied: MakeProxy, published: tuple[str, bytes], tmp_path: Path
) -> None:
    job, content = published
    proxy = proxied(None, 300_000, 300_000, 0)
    moved: list[int] = []
    with Client(proxy.url, api.key) as client:
        client.artifacts(job)
        client._transport._http.close()
    with Client(proxy.url, api.key) as client:
        # The list and the content go over one connection, so the cuts hit what is large.
        (path,) = client.download(
            job, "model/weights", tmp_path / "w", on_bytes=lambda done, _: moved.append(done)
        )
    assert proxy.cut >= 2, "the fault did not strike"
    assert path.read_bytes() == content
    assert moved == sorted(moved), "something was fetched again"
    assert list(tmp_path.glob(".*")) == []


def test_all_artifacts_keep_their_names(
    sdk: Client, published: tuple[str, bytes], tmp_path: Path
) -> None:
    job, content = published
    paths = sdk.download(job, to=tmp_path / "all")
    assert sorted(str(p.relative_to(tmp_path / "all")) for p in paths) == [
        "empty.txt",
        "model/weights",
    ]
    assert (tmp_path / "all/model/weights").read_bytes() == content
    with pytest.raises(NotFound):
        sdk.download(job, "nothing", tmp_path)


def test_a_damaged_part_is_fetched_again_and_a_damaged_file_is_refused(
    sdk: Client, published: tuple[str, bytes], tmp_path: Path, tmp_data: Path
) -> None:
    job, content = published
    sha256 = hashlib.sha256(content).hexdigest()
    part = tmp_path / f".w.{sha256[:12]}.part"
    part.write_bytes(b"something else")
    (path,) = sdk.download(job, "model/weights", tmp_path / "w")
    assert path.read_bytes() == content
    (stored,) = tmp_data.glob("jobs/*/*/artifacts/model/weights")
    stored.write_bytes(bytes(len(content)))
    with pytest.raises(Exception, match="another SHA-256"):
        sdk.download(job, "model/weights", tmp_path / "again")
    assert not (tmp_path / "again").exists()
    assert list(tmp_path.glob(".*")) == []


def test_an_upload_survives_a_cut_and_tells_how_far_it_is(
    api: Api, sdk: Client, proxied: MakeProxy, tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "hello"}\n' * 20_000)
    moved: list[tuple[int, int]] = []
    with Client(proxied(0).url, api.key) as client:
        file = client.upload(path, lambda done, total: moved.append((done, total)))
    size = path.stat().st_size
    assert (file.name, file.size) == ("rows.jsonl", size)
    assert moved[-1] == (size, size)
    with pytest.raises(PayloadTooLarge):
        path.write_bytes(b"x" * 1_000_001)
        sdk.upload(path)


# Where the service is


def test_settings_come_from_arguments_environment_and_local_stack(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(ConfigurationError, match="no gpuyard service"):
        find_connection()
    data = tmp_path / "stack"
    data.mkdir()
    monkeypatch.setenv("GPUYARD_DATA", str(data))
    (data / "instance.json").write_text(
        '{"url": "http://127.0.0.1:1", "api_key": "gy_1", "pid": 1}'
    )
    found = find_connection()
    assert (found.url, found.api_key) == ("http://127.0.0.1:1", "gy_1")
    # Of a stack that was killed:
    (data / "instance.json").write_text('{"url": "http://127.0.0.1:1", "pid": 4194305}')
    with pytest.raises(ConfigurationError, match="no gpuyard service"):
        find_connection()
    monkeypatch.setenv("GPUYARD_URL", "http://127.0.0.1:2/")
    assert find_connection().url == "http://127.0.0.1:2"
    # The local stack's key goes to the local stack alone.
    assert find_connection().api_key is None
    assert find_connection("https://x.example", "k").api_key == "k"
    with pytest.raises(ConfigurationError, match="not the address"):
        find_connection("x.example")


def test_what_answers_and_is_no_gpuyard_is_said(api: Api) -> None:
    with Client(api.url + "/docs", api.key) as client, pytest.raises(NotFound):
        client.job("job_1")
    with Client("http://127.0.0.1:9", patience=0.2) as client, pytest.raises(Unavailable) as caught:
        client.job("job_1")
    assert "127.0.0.1:9" in caught.value.message
