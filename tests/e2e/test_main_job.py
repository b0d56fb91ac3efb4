"""The main job through every part, small: submit, route, train with DDP, infer, store, watch."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest
import redis
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from shared.lifecycle import JobState
from tests.e2e.broker import hints_in
from tests.e2e.facts import (
    assert_devices_are_free,
    assert_nothing_stale_was_accepted,
    assert_rows_delivered_once,
)
from tests.e2e.flower import flower, flower_tasks
from tests.e2e.inputs import ROWS
from tests.e2e.stack_process import StackProcess
from tests.e2e.test_faults import generation, training
from tests.stack import eventually

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def trained(stack: StackProcess, labelled: dict[str, Path]) -> str:
    job = stack.client.submit(training(labelled, epochs=12), upload=True)
    stack.client.wait(job.id, timeout=120)
    return job.id


def test_training_beats_the_majority_and_keeps_its_records(
    stack: StackProcess, trained: str, tmp_path: Path
) -> None:
    job = stack.client.job(trained)
    assert job.summary is not None
    assert job.summary["metrics"]["accuracy"] > 0.6  # the majority class has about 0.37
    assert [r.device_id for r in job.attempts[0].ranks] == sorted(
        d.id for d in stack.client.devices()
    )
    assert stack.client.metrics(trained, "validation")[-1].values["macro_f1"] > 0.5
    assert stack.client.checkpoints(trained)
    stack.client.download(trained, to=tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    assert set(model.config.id2label.values()) == {"animal", "plant", "food"}
    assert AutoTokenizer.from_pretrained(tmp_path / "model")("w1 w2")["input_ids"]


def test_a_batch_job_uses_the_model_of_a_training_job(
    stack: StackProcess, trained: str, labelled: dict[str, Path]
) -> None:
    job = stack.client.submit(
        {
            "kind": "infer", "task": "text-classification", "model": f"job:{trained}",
            "input": str(labelled["test"]),
        },
        upload=True,
    )  # fmt: skip
    ended = stack.client.wait(job.id, timeout=90)
    assert_rows_delivered_once(stack.client, job.id, [None] * 120)
    assert (ended.rows_total, ended.rows_done, ended.row_errors) == (120, 120, 0)
    labels = {row["output"]["label"] for row in stack.client.rows(job.id)}
    assert labels <= {"animal", "plant", "food"}
    assert len(labels) > 1


def test_the_model_stays_warm_between_jobs(stack: StackProcess) -> None:
    spec = {
        "kind": "infer", "task": "text-generation", "model": "tinyllama",
        "rows": [{"prompt": "w5"}], "generation": {"max_new_tokens": 2},
    }  # fmt: skip
    summaries = []
    for _ in range(3):  # two devices: at the latest the third meets a device that has the model
        job = stack.client.submit(spec)
        summaries.append(stack.client.wait(job.id, timeout=60).summary or {})
    assert any(summary["warm"] for summary in summaries)


def test_flower_asks_for_a_login_and_tells_devices_and_jobs(
    stack: StackProcess, trained: str
) -> None:
    url = str(stack.instance["flower_url"])
    assert httpx.get(f"{url}/api/workers").status_code == 401
    assert httpx.get(f"{url}/", follow_redirects=False).status_code in (401, 302)
    with flower(stack) as client:
        workers = client.get("/api/workers", params={"refresh": 1}).json()
        assert sorted(workers) == sorted(d.id for d in stack.client.devices())
        page = client.get("/workers")
        assert page.status_code == 200
        assert all(name in page.text for name in workers)
    tasks = [t for t in flower_tasks(stack).values() if trained in str(t["args"])]
    assert len(tasks) == 2  # one a rank
    assert {t["name"] for t in tasks} == {"train:tinybert"}
    assert {t["state"] for t in tasks} == {"SUCCESS"}


def test_revoking_in_flower_cancels_the_job(stack: StackProcess, labelled: dict[str, Path]) -> None:
    job = stack.client.submit(training(labelled, epochs=2000), upload=True)
    eventually(
        lambda: stack.client.job(job.id).state is JobState.RUNNING, within=30, what="it to run"
    )
    task = eventually(
        lambda: next((i for i, t in flower_tasks(stack).items() if job.id in str(t["args"])), None),
        within=20,
        what="Flower to know the task",
    )
    with flower(stack) as client:
        answer = client.post(f"/api/task/revoke/{task}", params={"terminate": "true"})
        answer.raise_for_status()
    ended = stack.client.wait(job.id, timeout=30, raise_on_failure=False)
    assert ended.state is JobState.CANCELLED
    told = [e.message for e in stack.client.events(job.id, follow=False)]
    assert any("Flower" in message or "revoked" in message for message in told), told
    assert_devices_are_free(stack.store)
    eventually(
        lambda: flower_tasks(stack)[task]["state"] == "REVOKED", within=20, what="REVOKED in Flower"
    )


def test_many_jobs_and_all_agree(
    stack: StackProcess, labelled: dict[str, Path], prompts: Path
) -> None:
    """200 small batch jobs and 10 training jobs on two devices: store, broker and Flower agree."""
    client = stack.client
    small = {
        "kind": "infer", "task": "text-generation", "model": "tinyllama",
        "rows": [{"id": str(i), "prompt": f"w{i} w{i + 1}"} for i in range(4)],
        "generation": {"max_new_tokens": 4},
    }  # fmt: skip
    batches: list[str] = []
    trainings: list[str] = []
    for number in range(200):
        if number % 20 == 0:
            spec = training(labelled, epochs=1, devices=1 + number // 20 % 2)
            trainings.append(client.submit(spec, upload=True).id)
        batches.append(client.submit(small).id)
    for job_id in (*trainings, *batches):
        client.wait(job_id, timeout=240)

    for job_id in batches:
        assert_rows_delivered_once(client, job_id, [str(i) for i in range(4)])
        assert_nothing_stale_was_accepted(stack.store, job_id)
    assert_devices_are_free(stack.store)

    ranks = {
        f"{attempt.id}.{rank.rank}"
        for job_id in (*trainings, *batches)
        for attempt in client.job(job_id).attempts
        for rank in attempt.ranks
    }
    assert len(ranks) == 200 + 5 + 2 * 5  # no attempt was made twice
    eventually(
        lambda: all(flower_tasks(stack).get(task, {}).get("state") == "SUCCESS" for task in ranks),
        within=30,
        what="Flower to have seen every rank succeed",
    )
    with redis.Redis.from_url(stack.setting("BROKER_URL")) as broker:
        waiting = {d.queue for d in client.devices()} | {f"device.{d.id}" for d in client.devices()}
        assert {queue: hints_in(broker, queue) for queue in waiting} == dict.fromkeys(waiting, 0)
        assert broker.hlen("unacked") == 0


def test_results_can_be_read_while_the_job_runs(stack: StackProcess, prompts: Path) -> None:
    job = stack.client.submit(
        {**generation(prompts), "generation": {"max_new_tokens": 200}, "shard_rows": 10},
        upload=True,
    )
    partial = eventually(
        lambda: [r["row"] for r in stack.client.rows(job.id)], within=60, what="first results"
    )
    assert stack.client.job(job.id).state is JobState.RUNNING
    assert len(partial) < ROWS
    followed = [r["row"] for r in stack.client.rows(job.id, follow=True)]
    assert followed == list(range(ROWS))
