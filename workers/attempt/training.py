"""A training attempt on one device: a rank process of its own, from launch to its last report."""

from __future__ import annotations

import contextlib
import logging
import select
import time
from pathlib import Path

from shared.messages import (
    CheckpointRef,
    FileDigest,
    JoinRendezvous,
    Preempt,
    Stop,
    Tracking,
    TrainAssignment,
)
from shared.micro_batch import rows_at_once
from shared.resolved import Resolved, ResolvedInput
from shared.specs import TrainSpec
from shared.store.claim import Claimed, CommittedCheckpoint
from workers.attempt.folders import AttemptFolder
from workers.attempt.inbox import Inbox
from workers.attempt.outcome import (
    Failed,
    Finished,
    OomWatch,
    Outcome,
    Stale,
    classify_exit,
    last_line,
)
from workers.attempt.rendezvous import HOST_VARIABLE
from workers.attempt.reporter import Reporter
from workers.attempt.site import Site
from workers.attempt.watch import Watch
from workers.channel import ChannelClosed
from workers.launch import Exit, RankProcess, launch

log = logging.getLogger(__name__)

PEER_LOST = "peer_lost"
PEER_PATIENCE = 10.0
"""Seconds. It is waited for so long only where nobody says more: a host is gone with its worker."""


def run_training(
    site: Site,
    claimed: Claimed,
    folder: AttemptFolder,
    host: str,
    inbox: Inbox,
    reporter: Reporter,
    deadline: float | None,
    device_mtbf: float,
) -> Outcome:
    """Returns once no process of the rank lives. ``device_mtbf``: see ``TrainAssignment``.

    Raises:
        LaunchFailed: no rank could be started.
    """
    site.engine.end()  # a training rank has its device to itself
    rank_number = claimed.holder.rank
    log_path = folder.log(rank_number, site.device.id)
    environment = {**site.device.environment, HOST_VARIABLE: host}
    oom = OomWatch()
    with launch(site.nursery, "train", env=environment, log_path=log_path) as rank:
        sent: set[str] = set()

        def send_orders() -> None:
            if inbox.rendezvous is not None and "join" not in sent:
                sent.add("join")
                _send(rank, JoinRendezvous(address=inbox.rendezvous))
            if inbox.preempt is not None and "preempt" not in sent:
                sent.add("preempt")
                _send(rank, inbox.preempt)

        _send(rank, training_assignment(site, claimed, folder, device_mtbf))
        watch = Watch(
            rank,
            claimed.holder.attempt_id,
            inbox,
            reporter,
            deadline,
            reporter.put,
            send_orders,
        )
        end = watch.until_end()
        if isinstance(end, Finished):
            rank.wait(site.settings.end_grace)
        elif not isinstance(end, Exit):
            _send(rank, Stop(reason=type(end).__name__.lower()))
        exit = rank.end(0 if isinstance(end, Stale) else site.settings.end_grace)
        if isinstance(end, Finished | Stale):
            return end
        if watch.said_so and isinstance(end, Failed):
            return _prefer_the_cause(end, inbox)
        # A rank may have finished, or have made a checkpoint, just before its end was ordered.
        rest = watch.read_rest()
        if isinstance(rest, Finished):
            return rest
        if not isinstance(end, Exit):
            return end
        if isinstance(rest, Failed):
            return _prefer_the_cause(rest, inbox)
        return classify_exit(
            f"rank {rank_number}",
            exit,
            out_of_memory=oom.struck(),
            last_words=last_line(log_path),
            rows_at_once=rows_at_once(TrainSpec.model_validate(claimed.spec), claimed.micro_batch),
        )


def _prefer_the_cause(said: Failed, inbox: Inbox) -> Outcome:
    """A rank that lost a peer often knows before the peer's worker has told why. The first report
    is the attempt's: leave it to that one, for a moment."""
    if said.failure.code != PEER_LOST:
        return said
    deadline = time.monotonic() + PEER_PATIENCE
    while inbox.end is None and (left := deadline - time.monotonic()) > 0:
        select.select([inbox], [], [], left)
        inbox.clear()
    return inbox.end or said


def training_assignment(
    site: Site, claimed: Claimed, folder: AttemptFolder, device_mtbf: float
) -> TrainAssignment:
    resolved = Resolved.model_validate(claimed.resolved)
    data = site.settings.data
    train, validation = resolved.inputs.get("train"), resolved.inputs.get("validation")
    spec = TrainSpec.model_validate(claimed.spec)
    return TrainAssignment(
        job_id=claimed.holder.job_id,
        attempt_id=claimed.holder.attempt_id,
        attempt=claimed.attempt_number,
        token=claimed.holder.token,
        rank=claimed.holder.rank,
        world_size=claimed.world_size,
        device=site.device.handle,
        spec=spec,
        model_path=resolved.model.path,
        teacher_path=resolved.teacher.path if resolved.teacher else None,
        train_path=str(data / train.path) if train else "",
        train_format=train.format if train else "jsonl",
        validation_path=_validation_path(data, validation, spec),
        validation_format=validation.format if validation else "jsonl",
        work_dir=str(folder.path),
        parallelism=resolved.parallelism,
        cache_dir=str(_cache(data)),
        micro_batch=claimed.micro_batch,
        hung_after=site.settings.hung_after,
        resume_from=tuple(_reference(each, data) for each in claimed.checkpoints),
        best_from=tuple(_reference(each, data) for each in claimed.best),
        device_mtbf=device_mtbf,
        ended=claimed.ended,
        tracking=Tracking(
            mlflow_uri=site.settings.mlflow_tracking_uri,
            mlflow_experiment=site.settings.mlflow_experiment,
            wandb=site.settings.wandb,
        ),
    )


def _validation_path(data: Path, file: ResolvedInput | None, spec: TrainSpec) -> str | None:
    """Empty for a dataset that the rank makes, None where there is no validation data."""
    if file is not None:
        return str(data / file.path)
    return "" if spec.data.validation is not None else None


def _cache(data: Path) -> Path:
    folder = data / "cache"
    with contextlib.suppress(OSError):  # the rank does without, and says so
        folder.mkdir(exist_ok=True)
    return folder


def _reference(checkpoint: CommittedCheckpoint, data: Path) -> CheckpointRef:
    return CheckpointRef(
        id=checkpoint.id,
        step=checkpoint.step,
        path=str(data / checkpoint.path),
        manifest={
            name: FileDigest.model_validate(digest) for name, digest in checkpoint.manifest.items()
        },
    )


def _send(rank: RankProcess, message: TrainAssignment | JoinRendezvous | Stop | Preempt) -> None:
    # A rank that is gone says so by its exit, which the watch sees next.
    with contextlib.suppress(ChannelClosed):
        rank.channel.send(message)
