"""What the command line says, to whom, and with which exit code."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gpuyard import Client
from shared.lifecycle import FailureClass, JobState
from shared.messages import FileDigest
from shared.store import Store
from shared.store.report import commit_checkpoint
from tests.api.conftest import Api
from tests.api.fake_worker import FakeFleet
from tests.client.conftest import Said, start_cli
from tests.stack import eventually

Cli = Callable[..., Said]
Spec = Callable[..., dict[str, Any]]


@pytest.fixture
def spec_file(infer_spec: Spec, tmp_path: Path) -> str:
    path = tmp_path / "spec.json"
    path.write_text(json.dumps(infer_spec()))
    return str(path)


@pytest.fixture
def succeeded(sdk: Client, fleet: FakeFleet, infer_spec: Spec) -> str:
    """A batch job of 8 rows that succeeded."""
    job = sdk.submit(infer_spec(8, name="done")).id
    (holder,) = fleet.start(job)
    fleet.say(holder, "hello\nworld")
    for shard in range(2):
        fleet.compute(holder, shard)
    fleet.finish(holder)
    return job


def test_submit_prints_the_id_alone_on_stdout(cli: Cli, sdk: Client, spec_file: str) -> None:
    said = cli("submit", spec_file)
    assert said.code == 0
    assert sdk.job(said.out.strip()).state is JobState.QUEUED
    assert f"gpuyard watch {said.out.strip()}" in said.err


def test_submit_from_flags_stdin_and_settings(
    cli: Cli, sdk: Client, train_spec: Spec, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "spec.yaml").write_text("model: encoder\nhyperparameters: {epochs: 9, seed: 1}\n")
    monkeypatch.setattr("sys.stdin", (tmp_path / "spec.yaml").open())
    train = train_spec()["data"]["train"]
    said = cli(
        "submit", "-", "--train", train, "--epochs", "2", "--lr", "3e-4", "--devices", "2",
        "--set", "hyperparameters.warmup_ratio=1e-1", "--idempotency-key", "k", "--json",
    )  # fmt: skip
    assert said.code == 0, said.err
    assert said.err == ""
    job = json.loads(said.out)
    given = job["spec"]["hyperparameters"]
    assert job["kind"] == "train"
    assert job["spec"]["data"]["train"].startswith("file_"), "a file that exists here is uploaded"
    assert [given[k] for k in ("epochs", "seed", "learning_rate", "warmup_ratio")] == [
        2,
        1,
        3e-4,
        0.1,
    ]
    assert job["spec"]["resources"]["devices"] == 2
    kept = cli("submit", "-m", "encoder", "--train", train, "--no-upload", "--json")
    assert json.loads(kept.out)["spec"]["data"]["train"] == train


def test_prompts_are_rows(cli: Cli, sdk: Client) -> None:
    said = cli("submit", "-m", "causal", "-p", "one", "-p", "two", "--max-new-tokens", "5")
    assert said.code == 0, said.err
    job = sdk.job(said.out.strip())
    assert (job.task, job.rows_total) == ("text-generation", 2)
    assert job.spec["generation"]["max_new_tokens"] == 5
    assert Path(job.spec["input"]).read_text() == '{"prompt": "one"}\n{"prompt": "two"}\n'
    for more, column in (((), "text"), (("--text-column", "body"), "body")):
        said = cli("submit", "-m", "encoder", "--task", "embeddings", "-p", "one", *more)
        assert said.code == 0, said.err
        rows = Path(sdk.job(said.out.strip()).spec["input"]).read_text()
        assert json.loads(rows) == {column: "one"}


def test_everything_prints_json(
    cli: Cli,
    succeeded: str,
    sdk: Client,
    fleet: FakeFleet,
    store: Store,
    train_spec: Spec,
    tmp_data: Path,
    tmp_path: Path,
) -> None:
    trained = sdk.submit(train_spec()).id
    (holder,) = fleet.start(trained)
    manifest = {"state": FileDigest(size=1, sha256="0" * 64)}
    for step in (10, 20):
        assert store.call(commit_checkpoint, holder, step, f"p{step}", manifest, 10)
    said = cli("checkpoints", trained)
    newest, best = (line.split() for line in said.out.splitlines()[1:])
    assert (newest[1], best[1:3]) == ("20", ["10", "best"]), said
    fleet.publish(holder, tmp_data, "metrics.json", b"{}")
    fleet.finish(holder)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "x"}\n')
    for arguments, count in [
        (["jobs"], 3),
        (["show", succeeded], 1),
        (["watch", succeeded], 1),
        (["logs", succeeded], 1),
        (["results", succeeded], 8),
        (["workers"], 1),
        (["files", "upload", str(rows)], 1),
        (["files"], 1),
        (["files", "list"], 1),
        (["artifacts", trained], 1),
        (["checkpoints", trained], 2),
        (["download", trained, "--to", str(tmp_path / "to")], 1),
        (["cancel", sdk.submit(train_spec()).id], 1),
        (["health"], 1),
        (["version"], 1),
    ]:
        for said in (cli(*arguments, "--json"), cli("--json", *arguments)):
            assert (said.code, said.err) == (0, ""), arguments
            lines = [json.loads(line) for line in said.out.splitlines()]
            assert all(isinstance(line, dict) for line in lines)
            if arguments[0] != "files":  # the second upload is one more
                assert len(lines) == count, arguments


def test_exit_codes(
    cli: Cli,
    api: Api,
    sdk: Client,
    fleet: FakeFleet,
    succeeded: str,
    spec_file: str,
    infer_spec: Spec,
) -> None:
    failed = sdk.submit(infer_spec()).id
    (holder,) = fleet.start(failed)
    fleet.fail(holder, FailureClass.USER_ERROR, "it is [red]wrong[/red]")
    assert cli("watch", succeeded).code == 0
    said = cli("watch", failed)
    assert said.code == 1
    assert "it is [red]wrong[/red] [user_error: fake_failure]" in said.err
    assert "hint: Change the test." in said.err
    for code, arguments in [
        (2, ["submit", spec_file, "--set", "model=nowhere"]),
        (2, ["submit", "no-such-file.yaml"]),
        (2, ["submit", spec_file, "--set", "nonsense"]),
        (2, ["jobs", "--bogus"]),
        (2, ["jobs", "--state", "sleeping"]),
        (2, ["jobs", "--url", "nonsense"]),
        (3, ["show", "job_nowhere"]),
        (3, ["download", succeeded]),
        (4, ["jobs", "--api-key", "gy_wrong"]),
        (5, ["cancel", succeeded]),
    ]:
        said = cli(*arguments)
        assert (said.code, said.out.startswith("{")) == (code, False), (arguments, said)
        assert said.err
        assert "Traceback" not in said.err
    assert cli("submit", spec_file, "--idempotency-key", "k").code == 0
    assert cli("submit", spec_file, "--idempotency-key", "k", "--priority", "5").code == 5


def test_a_service_that_is_away_is_6(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpuyard.cli.session.PATIENCE", 0.3)
    for command in (["jobs"], ["watch", "job_x"]):
        said = cli(*command, "--url", "http://127.0.0.1:9")
        assert said.code == 6
        assert said.err.count("trying again") == 1
        assert "no gpuyard service answers at http://127.0.0.1:9" in said.err


def test_errors_are_json_on_stderr_with_json(cli: Cli) -> None:
    said = cli("show", "job_nowhere", "--json")
    assert (said.code, said.out) == (3, "")
    error = json.loads(said.err)["error"]
    assert error["code"] == "not_found"
    assert error["request_id"]


def test_a_misspelt_field_is_named_with_its_likely_spelling(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text(
        "kind: train\ntask: text-classification\nmodel: encoder\ndata: {train: x.jsonl}\n"
        "hyperparameters: {learnin_rate: 3e-4}\n"
    )
    said = cli("submit", str(path))
    assert said.code == 2
    assert f"unknown field 'hyperparameters.learnin_rate' (in {path})" in said.err
    assert re.search("Did you mean '?hyperparameters.learning_rate'?", said.err)


def test_a_file_that_is_nowhere_is_said_to_be(cli: Cli) -> None:
    said = cli("submit", "-m", "encoder", "--train", "nowhere.jsonl")
    assert said.code == 2
    assert "nowhere.jsonl is no file here" in said.err


def test_lists_and_details_tell_the_reason(
    cli: Cli, sdk: Client, fleet: FakeFleet, succeeded: str, infer_spec: Spec
) -> None:
    failed = sdk.submit(infer_spec(name="two\nlines")).id
    (holder,) = fleet.start(failed)
    fleet.fail(holder, FailureClass.DATA_ERROR, "line 3 is no JSON")
    listed = cli("jobs").out
    assert [line.split()[:2] for line in listed.splitlines()[1:]] == [
        [failed, "failed"],
        [succeeded, "succeeded"],
    ]
    assert "line 3 is no JSON" in listed
    assert "two lines" in listed
    shown = cli("show", failed).out
    for text in (
        "line 3 is no JSON [data_error: fake_failure]",
        "Change the test.",
        "cpu0@fake",
        "submitted:",
    ):
        assert text in shown
    assert "\x1b" not in listed + shown, "colour where nobody sees it"


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_narrow_terminals_keep_ids_whole(
    cli: Cli, succeeded: str, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    for command in (["jobs"], ["workers"], ["show", succeeded]):
        lines = cli(*command).out.splitlines()
        # Only events, which are prose, may be longer: the terminal wraps them.
        assert all(len(line) <= width or line[2] == ":" for line in lines), command
    assert succeeded in cli("jobs").out


def test_logs_of_a_gang_say_of_whom_they_are(
    cli: Cli, sdk: Client, fleet: FakeFleet, train_spec: Spec
) -> None:
    fleet.add_device("cpu1@fake")
    job = sdk.submit(train_spec(resources={"devices": 2})).id
    one, two = fleet.start(job, ("cpu0@fake", "cpu1@fake"))
    fleet.say(one, "step 1\nst")
    fleet.say(two, "other\n")
    fleet.say(one, "ep 2\nno end")
    assert cli("logs", job).out.splitlines() == [
        "[rank 0] step 1",
        "[rank 1] other",
        "[rank 0] step 2",
        "[rank 0] no end",
    ]
    assert cli("logs", job, "--rank", "1").out == "other\n"


def test_results_go_to_a_file_whole(cli: Cli, succeeded: str, tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    said = cli("results", succeeded, "-o", str(path))
    assert (said.code, said.out) == (0, "")
    assert [json.loads(line)["row"] for line in path.read_text().splitlines()] == list(range(8))
    assert cli("results", succeeded, "-o", str(tmp_path / "no" / "folder")).code == 2
    (tmp_path / "out").mkdir()
    said = cli("results", succeeded, "-o", str(tmp_path / "out"))
    assert said.code == 2
    assert "cannot write" in said.err
    assert list(tmp_path.glob(".out*")) == []


def test_results_that_are_followed_fail_with_the_job(
    cli: Cli, sdk: Client, fleet: FakeFleet, infer_spec: Spec
) -> None:
    job = sdk.submit(infer_spec(8)).id
    (holder,) = fleet.start(job)
    fleet.compute(holder, 0)
    said = cli("results", job)
    assert said.code == 0
    assert "4 of 8 rows so far" in said.err
    fleet.fail(holder, FailureClass.USER_ERROR, "no more")
    said = cli("results", job, "--follow")
    assert said.code == 1
    assert len(said.out.splitlines()) == 4
    assert "no more" in said.err


def test_watch_ends_with_the_job_and_tells_its_story(
    api: Api, sdk: Client, fleet: FakeFleet, spec_file: str
) -> None:
    process = start_cli(api, "submit", spec_file, "--wait", "--json")
    job = eventually(lambda: next(sdk.jobs(), None), within=30, what="the job is submitted")
    (holder,) = fleet.start(job.id)
    for shard in range(5):
        fleet.compute(holder, shard)
    fleet.finish(holder)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (0, "")
    looks = [json.loads(line) for line in out.splitlines()]
    assert looks[-1]["state"] == "succeeded"
    process = start_cli(api, "watch", job.id)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 0
    assert "rows 20" in out
    for text in ("submitted:", "attempt 1 runs", f"{job.id} succeeded in"):
        assert text in err


def test_ctrl_c_detaches_and_the_job_goes_on(
    api: Api, sdk: Client, fleet: FakeFleet, infer_spec: Spec
) -> None:
    job = sdk.submit(infer_spec()).id
    fleet.start(job)
    process = start_cli(api, "watch", job, stderr=subprocess.PIPE)
    assert process.stderr is not None
    said = ""
    while "attempt 1 runs" not in said:
        line = process.stderr.readline()
        assert line, said
        said += line
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert f"detached; {job} goes on" in err
    assert f"gpuyard cancel {job}" in err
    assert "Traceback" not in err
    assert sdk.job(job).state is JobState.RUNNING


def test_a_reader_that_goes_away_is_no_error(
    api: Api, sdk: Client, fleet: FakeFleet, infer_spec: Spec
) -> None:
    job = sdk.submit(infer_spec(4000, shard_rows=2000)).id
    (holder,) = fleet.start(job)
    fleet.compute(holder, 0)
    fleet.compute(holder, 1)
    process = start_cli(api, "results", job)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(30) == 141


def on_terminal(api: Api, *arguments: str, **env: str) -> tuple[int, str]:
    """Run on a pseudo-terminal: (exit code, everything that was shown)."""
    mine, its = pty.openpty()
    process = start_cli(api, *arguments, stdout=its, stderr=its, env={"TERM": "xterm", **env})
    os.close(its)
    shown, deadline = b"", time.monotonic() + 60
    while time.monotonic() < deadline:
        if select.select([mine], [], [], 0.1)[0]:
            try:
                shown += os.read(mine, 65536)
            except OSError:
                break  # its end is closed
    os.close(mine)
    return process.wait(10), shown.decode()


def test_colour_is_for_terminals_that_want_it(api: Api, succeeded: str) -> None:
    code, shown = on_terminal(api, "jobs")
    assert code == 0
    assert re.search(r"\x1b\[[0-9;]*m", shown)
    code, shown = on_terminal(api, "jobs", NO_COLOR="1")
    assert code == 0
    assert not re.search(r"\x1b\[3[0-9]", shown)
    assert succeeded in shown


def test_watch_moves_on_a_terminal(api: Api, succeeded: str) -> None:
    code, shown = on_terminal(api, "watch", succeeded)
    assert code == 0
    assert "attempt 1 runs" in shown
    assert f"{succeeded} succeeded in" in shown
