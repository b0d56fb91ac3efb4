"""Stand-ins for ranks, free of torch: each does what the name of its job says.

They speak the same protocol as the real ones. They start in no time and die in ways that a real
training run cannot be made to at a chosen moment.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shared.lifecycle import FailureClass
from shared.messages import (
    UNFINISHED,
    ArtifactWritten,
    CheckpointWritten,
    ComputeShards,
    Done,
    Failed,
    FileDigest,
    InferAssignment,
    JoinRendezvous,
    Listening,
    Metric,
    Notice,
    Progress,
    Ready,
    Shard,
    ShardComputed,
    Stop,
    TrainAssignment,
    mark,
)
from shared.rows import read_lines, result, row_error
from workers.channel import Channel, ChannelClosed

Rank = Channel[Any]


def train(channel: Rank) -> int:
    """One training rank: what ``BEHAVIOURS`` says of the job's name."""
    assignment = channel.receive()
    assert isinstance(assignment, TrainAssignment)
    behave = BEHAVIOURS[assignment.spec.name or "quick"]
    try:
        return behave(channel, assignment) or 0
    except ChannelClosed:
        return 3


def _quick(channel: Rank, job: TrainAssignment) -> None:
    """Every kind of report once."""
    print(
        f"rank {job.rank} of {job.world_size} on {job.device.id}, resuming {len(job.resume_from)}"
    )
    print(f"threads {job.device.threads} cuda '{os.environ['CUDA_VISIBLE_DEVICES']}'")
    channel.send(Ready(seconds=0.1))
    channel.send(Progress(step=1, total_steps=2, loss=0.5))
    channel.send(Metric(split="train", step=1, values={"loss": 0.5}))
    channel.send(Notice(code="note", message="for your information", data={"x": 1}))
    if job.rank == 0:
        _write_checkpoint(channel, job, 1)
        _write_artifact(channel, job, "model/weights.bin", b"weights")
    channel.send(Progress(step=2, total_steps=2, loss=0.25))
    sys.stdout.write("a last line without its end")
    sys.stdout.flush()
    channel.send(Done(attempt_id=job.attempt_id, summary={"steps": 2}))


def _steps(channel: Rank, job: TrainAssignment) -> int:
    """Steps with a checkpoint each, up to ``max_steps``, from where the last attempt got to."""
    first = job.resume_from[0].step if job.resume_from else 0
    print(f"starts at step {first}")
    total = job.spec.hyperparameters.max_steps or 10
    for step in range(first + 1, total + 1):
        time.sleep(0.1)
        _write_checkpoint(channel, job, step)
        channel.send(Progress(step=step, total_steps=total))
        if isinstance(channel.receive(0), Stop):
            return 3
    channel.send(Done(attempt_id=job.attempt_id, summary={"first": first, "steps": total}))
    return 0


def _wait(channel: Rank, job: TrainAssignment) -> int:
    """Until the file ``go`` lies in the data folder, or the order to stop."""
    _say_ready(channel)
    while not (_data(job) / "go").exists():
        if isinstance(channel.receive(0.05), Stop):
            return 3
    channel.send(Done(attempt_id=job.attempt_id, summary={"waited": True}))
    return 0


def _deaf(channel: Rank, job: TrainAssignment) -> None:
    """Ignores orders, SIGTERM and the end of the channel, with grandchildren that do the same."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    subprocess.Popen(
        ["sh", "-c", "trap '' TERM; while :; do sleep 1; done"], start_new_session=True
    )
    _say_ready(channel)
    while True:
        time.sleep(1000)


def _gang(channel: Rank, job: TrainAssignment) -> int:
    """Meets its fellows, then does as ``wait``."""
    if job.rank == 0:
        channel.send(Listening(port=4711))
    order = channel.receive(20)
    assert isinstance(order, JoinRendezvous), order
    print(f"rank {job.rank} joins {order.address}")
    return _wait(channel, job)


def _lose_a_peer(channel: Rank, job: TrainAssignment) -> int:
    """Rank 1 runs out of memory; rank 0 sees its peer vanish, and says so first."""
    if job.rank == 1:
        if job.attempt > 1:
            channel.send(Done(attempt_id=job.attempt_id))
            return 0
        time.sleep(0.5)
        channel.send(_failure(job, FailureClass.OUT_OF_MEMORY, "out_of_memory"))
    elif job.attempt == 1:
        channel.send(_failure(job, FailureClass.INFRASTRUCTURE, "peer_lost"))
    else:
        channel.send(Done(attempt_id=job.attempt_id))
    return 1


def _die_once(channel: Rank, job: TrainAssignment) -> int:
    if job.attempt == 1:
        _write_checkpoint(channel, job, 7)
        (Path(job.work_dir) / "checkpoints" / f"{UNFINISHED}step-8").mkdir()
        os.kill(os.getpid(), signal.SIGKILL)
    summary = {"resumed": [each.step for each in job.resume_from]}
    channel.send(Done(attempt_id=job.attempt_id, summary=summary))
    return 0


def _crash(channel: Rank, job: TrainAssignment) -> int:
    raise RuntimeError("the flux capacitor is empty")


def _leave(channel: Rank, job: TrainAssignment) -> int:
    """Ends well and has not said that it is done."""
    return 0


def _blame_user(channel: Rank, job: TrainAssignment) -> int:
    channel.send(_failure(job, FailureClass.USER_ERROR, "bad_column"))
    return 1


def _chatty(channel: Rank, job: TrainAssignment) -> None:
    """Some 600 kB of log in a burst, with text that is not ASCII."""
    for number in range(20_000):
        print(f"line {number} äöü ☃ {'x' * (number % 20)}")
    channel.send(Done(attempt_id=job.attempt_id))


def _outlast(channel: Rank, job: TrainAssignment) -> int:
    """Many reports while Postgres is away: none may be lost, and their order must be kept."""
    for step in range(1, 301):
        channel.send(Metric(split="train", step=step, values={"loss": 1 / step}))
        channel.send(Progress(step=step, total_steps=300))
        time.sleep(0.02)
    _write_checkpoint(channel, job, 300)
    channel.send(Done(attempt_id=job.attempt_id))
    return 0


def _lie(channel: Rank, job: TrainAssignment) -> int:
    """Names a checkpoint that is not its own."""
    channel.send(CheckpointWritten(step=1, path="/etc", manifest={}))
    channel.receive(20)
    return 0


def _hog(channel: Rank, job: TrainAssignment) -> None:
    """Takes more memory than its control group may have, unless it is told what to hold at once."""
    if job.micro_batch is None:
        Path(os.environ["TEST_GROUP"], "cgroup.procs").write_text(str(os.getpid()))
        bytearray(256 << 20).replace(b"\0", b"x")
    channel.send(Done(attempt_id=job.attempt_id, summary={"held": job.micro_batch}))


BEHAVIOURS: dict[str, Callable[[Rank, TrainAssignment], int | None]] = {
    "quick": _quick,
    "steps": _steps,
    "wait": _wait,
    "deaf": _deaf,
    "gang": _gang,
    "lose_a_peer": _lose_a_peer,
    "die_once": _die_once,
    "crash": _crash,
    "hog": _hog,
    "leave": _leave,
    "blame_user": _blame_user,
    "chatty": _chatty,
    "outlast": _outlast,
    "lie": _lie,
}


def engine(channel: Rank) -> int:
    """An engine that writes rows back in capitals, of several jobs in turn. ``slow``: 50 ms a row.
    ``die_once``: is killed in the third shard, the first time. ``stuck``: takes no orders. ``brisk``: 10 ms a
    row. ``gated``: computes the rows that the test opens the gate for. ``die_loading``: before it is ready. A
    row "abort" aborts the process, "break" makes it fail as the real one does, "hang" and "stop" that it gets no
    further, whatever the job is called."""
    jobs: dict[str, InferAssignment] = {}
    orders: dict[str, deque[Shard]] = {}
    done: Counter[str] = Counter()
    while True:
        try:
            message = channel.receive(0 if any(orders.values()) else None)
        except ChannelClosed:
            return 0
        if isinstance(message, InferAssignment):
            id = message.attempt_id
            jobs[id], orders[id] = message, deque()
            print(f"engine {os.getpid()} begins {message.job_id}", flush=True)
            if message.spec.name == "die_loading":
                os._exit(9)
            channel.send(Ready(seconds=0.0, warm=True, attempt_id=id, models=(message.model_path,)))
            if message.spec.name == "stuck":
                time.sleep(1000)
        elif isinstance(message, ComputeShards) and message.attempt_id in jobs:
            orders[message.attempt_id].extend(message.shards)
        elif isinstance(message, Stop) and message.attempt_id in jobs:
            del jobs[message.attempt_id], orders[message.attempt_id]
            summary = {"reason": message.reason}
            channel.send(Done(attempt_id=message.attempt_id, summary=summary))
        elif any(orders.values()):
            id = next(each for each in jobs if orders[each])
            job = jobs[id] = jobs.pop(id)  # the others are first now
            if job.spec.name == "gated" and orders[id][0].first_row >= _gate(job):
                time.sleep(0.01)
                continue
            shard = orders[id].popleft()
            if (end := _one_shard(channel, job, shard)) is not None:
                return end
            done[id] += shard.rows
            channel.send(Progress(attempt_id=id, step=done[id], total_steps=0))


def _one_shard(channel: Rank, job: InferAssignment, shard: Shard) -> int | None:
    """An exit status, if the engine has to end."""
    _note(job, shard)
    print(f"{mark(job.attempt_id)}computes {job.job_id}", flush=True)
    if job.spec.name == "die_once" and shard.index == 2 and _first_time(job):
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        _compute(channel, job, shard)
    except RuntimeError as error:
        channel.send(
            Failed(
                attempt_id=job.attempt_id,
                failure_class=FailureClass.INFRASTRUCTURE,
                code="engine_error",
                message=f"the engine failed: {error}",
            )
        )
        return 1
    return None


def _gate(job: InferAssignment) -> int:
    """The row at which ``gated`` engines wait until a test opens the gate further."""
    path = Path(f"{job.input_path}.gate")
    return int(path.read_text() or 0) if path.exists() else 0


def _first_time(job: InferAssignment) -> bool:
    mark = Path(f"{job.input_path}.died")
    first = not mark.exists()
    mark.touch()
    return first


def _note(job: InferAssignment, shard: Shard) -> None:
    """Which rows this engine begins to compute, for tests that count them."""
    rows = range(shard.first_row, shard.first_row + shard.rows)
    with Path(f"{job.input_path}.begun").open("a") as file:
        file.write("".join(f"{row} {job.device.id}\n" for row in rows))


def _compute(channel: Rank, job: InferAssignment, shard: Shard) -> None:
    results = []
    for row, line in read_lines(Path(job.input_path), shard):
        time.sleep({"slow": 0.05, "brisk": 0.01}.get(job.spec.name or "", 0))
        try:
            text = json.loads(line)["prompt"].upper()
            if text == "ABORT":
                os.abort()
            if text == "HANG":
                time.sleep(1000)
            if text == "STOP":
                os.kill(os.getpid(), signal.SIGSTOP)
            if text == "BREAK":
                raise RuntimeError("it broke")
        except ValueError:
            results.append(row_error(row, "invalid_json", "no JSON"))
        else:
            results.append(result(row, output={"text": text, "finish_reason": "stop"}))
    channel.send(
        ShardComputed(
            attempt_id=job.attempt_id, index=shard.index, results=tuple(results), seconds=0.1
        )
    )


def _say_ready(channel: Rank) -> None:
    channel.send(Notice(code="set_up", message="set up", data={"pid": os.getpid()}))


def _failure(job: TrainAssignment, failure_class: FailureClass, code: str) -> Failed:
    return Failed(
        attempt_id=job.attempt_id, failure_class=failure_class, code=code, message=f"it is {code}"
    )


def _write_checkpoint(channel: Rank, job: TrainAssignment, step: int) -> None:
    folder = Path(job.work_dir) / "checkpoints" / f"step-{step}"
    folder.mkdir(parents=True)
    data = f"state of step {step}".encode()
    (folder / "state").write_bytes(data)
    digest = FileDigest(size=len(data), sha256=hashlib.sha256(data).hexdigest())
    channel.send(CheckpointWritten(step=step, path=str(folder), manifest={"state": digest}))


def _write_artifact(channel: Rank, job: TrainAssignment, name: str, data: bytes) -> None:
    path = Path(job.work_dir) / "artifacts" / name
    path.parent.mkdir(parents=True)
    path.write_bytes(data)
    sha256 = hashlib.sha256(data).hexdigest()
    channel.send(
        ArtifactWritten(name=name, kind="model", path=str(path), size=len(data), sha256=sha256)
    )


def _data(job: TrainAssignment) -> Path:
    return Path(job.work_dir).parents[3]
