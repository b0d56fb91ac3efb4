"""What each report of a rank comes to in the store. Every function says whether it still counted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from shared.messages import (
    Alive,
    ArtifactWritten,
    CheckpointWritten,
    Done,
    Failed,
    Listening,
    Measured,
    Metric,
    Notice,
    Progress,
    Ready,
    Report,
    ShardComputed,
)
from shared.settings import Settings
from shared.store import Holder
from shared.store.claim import publish_rendezvous
from shared.store.ledger import commit_shard
from shared.store.report import (
    append_log,
    commit_checkpoint,
    forget_checkpoints,
    record_artifact,
    record_event,
    record_metric,
    record_progress,
)
from workers.attempt.folders import AttemptFolder, delete_checkpoint
from workers.attempt.insist import Insistent
from workers.attempt.rendezvous import LOOPBACK


@dataclass(frozen=True, slots=True)
class ReportWriter:
    """Writes for one holder. Each call waits until Postgres answers (``Insistent``)."""

    store: Insistent
    settings: Settings
    holder: Holder
    folder: AttemptFolder
    rank_host: str = LOOPBACK
    """The address at which the ranks of this host listen."""
    keep_checkpoints: int = 1

    def write(self, report: Report) -> bool:
        """False: stale.

        Raises:
            GivenUp: Postgres did not answer, and the attempt is given up.
            ValueError: the report names files that are not the attempt's.
        """
        call, holder = self.store.call, self.holder
        match report:
            case Listening(port=port):
                return call(publish_rendezvous, holder, f"{self.rank_host}:{port}")
            case Ready():
                how = "was warm" if report.warm else f"was loaded in {report.seconds:.1f} s"
                data: dict[str, Any] = {"seconds": report.seconds, "warm": report.warm}
                return call(record_event, holder, "ready", f"the model {how}", data)
            case Progress():
                return call(
                    record_progress, holder, report.model_dump(exclude={"type", "attempt_id"})
                )
            case Metric():
                return call(record_metric, holder, report.split, report.step, report.values)
            case CheckpointWritten():
                return self._commit_checkpoint(report)
            case ArtifactWritten():
                facts = report.model_dump(include={"name", "kind", "size", "sha256"})
                path = self.folder.relative(report.path)
                return call(record_artifact, holder, path=path, **facts)
            case Notice():
                told = {**report.data, "code": report.code}
                return call(record_event, holder, "notice", report.message, told)
            case ShardComputed():
                seconds = report.seconds
                return call(commit_shard, holder, report.index, report.results, seconds)
            case Alive() | Done() | Failed() | Measured():
                raise AssertionError(f"'{report.type}' is not written for an attempt")

    def append_log(self, text: str) -> bool:
        return self.store.call(append_log, self.holder, text)

    def _commit_checkpoint(self, report: CheckpointWritten) -> bool:
        path = self.folder.relative(report.path)
        facts = (report.step, path, report.manifest, report.best_step)
        before = self.store.repeated
        if not self.store.call(commit_checkpoint, self.holder, *facts):
            # The attempt was over before this one counted, and nobody else will look for its folder.
            # Not after a call whose answer was lost: that one may have counted.
            if self.store.repeated == before:
                delete_checkpoint(self.settings.data, path)
            return False
        old = self.store.call(forget_checkpoints, self.holder, self.keep_checkpoints)
        for forgotten in old or ():
            delete_checkpoint(self.settings.data, forgotten)
        return old is not None
