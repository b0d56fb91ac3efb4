"""Calls about what a job says and makes: events, logs, results, metrics, deliverables."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpuyard import result_files, streams, transfer
from gpuyard.addresses import at, inside, segment
from gpuyard.calls.jobs import JobCalls
from gpuyard.streams import Order
from gpuyard.transfer import OnBytes
from shared.errors import NotFound
from shared.views import ArtifactView, CheckpointView, EventView, LogView, MetricView


class OutputCalls(JobCalls):
    def events(self, id: str, after: int = 0, follow: bool = True) -> Iterator[EventView]:
        """The story of a job: what there is, then, with ``follow``, what comes until the job is over.

        Goes on where it was when a connection breaks: no event is missed or given twice. Pass the
        ``id`` of the last event as ``after`` to go on in another process.
        """
        path = at("jobs", id, "events")
        if follow:
            return streams.follow(self._transport, path, EventView, after, {})
        return iter(self._transport.get_list(path, EventView, after=after, format="json"))

    def logs(
        self, id: str, after: int = 0, follow: bool = True, rank: int | None = None
    ) -> Iterator[LogView]:
        """What the ranks printed, in pieces of text that need not end with a line; see ``events``."""
        path = at("jobs", id, "logs")
        if follow:
            return streams.follow(self._transport, path, LogView, after, {"rank": rank})
        pieces = self._transport.get_list(path, LogView, after=after, rank=rank, format="json")
        return iter(pieces)

    def results(
        self, id: str, *, follow: bool = True, order: Order = "input"
    ) -> Iterator[dict[str, Any]]:
        """Result rows of a batch job, each as it is committed, until the job is over; without ``follow``
        those that are committed now. A broken connection leaves no gap and no double.

        ``order`` is that of the input, or that of completion: rows as they come.

        A row is ``{"row", "id", "output", "error", "usage"}``; one of output and error is null.
        What an output is depends on the task: see ``shared/rows.py`` or the API's own documentation.
        """
        return streams.follow_results(self._transport, segment(id), follow, order)

    def rows(self, id: str, follow: bool = False) -> Iterator[dict[str, Any]]:
        """As ``results``, in input order and, by default, without waiting for more."""
        return self.results(id, follow=follow)

    def download_results(
        self, id: str, to: str | Path, *, follow: bool = True, order: Order = "input"
    ) -> int:
        """Write the results into a file, which appears whole or not at all: Parquet where its name
        ends in .parquet or .pq, else JSONL. Returns how many rows it has.

        With ``follow`` it has all rows of the job, once that is over, and else those of now.

        Raises:
            InvalidRequest: Parquet in the order of completion; it is in input order.
            DataError: the file cannot be written.
        """
        return result_files.download(
            self, self._transport, segment(id), Path(to), follow=follow, order=order
        )

    def metrics(self, id: str, split: str | None = None) -> list[MetricView]:
        """Metrics in the order of steps; ``split`` is train or validation."""
        return self._transport.get_list(at("jobs", id, "metrics"), MetricView, split=split)

    def checkpoints(self, id: str) -> list[CheckpointView]:
        """Committed checkpoints, newest first."""
        return self._transport.get_list(at("jobs", id, "checkpoints"), CheckpointView)

    def artifacts(self, id: str) -> list[ArtifactView]:
        """Deliverables of a job that succeeded; none before."""
        return self._transport.get_list(at("jobs", id, "artifacts"), ArtifactView)

    def download(
        self,
        id: str,
        name: str | None = None,
        to: str | Path = ".",
        *,
        on_bytes: OnBytes | None = None,
    ) -> list[Path]:
        """Fetch one deliverable, or all of them, and return where they are now.

        All, or one ``to`` an existing folder, keep their names below ``to``; otherwise ``to`` is the
        file to write. Each file appears whole and checked, or not at all; one that was broken off
        goes on where it was.

        Raises:
            NotFound: the job has no such deliverable, or none at all.
            CorruptDownload: what arrived does not have the SHA-256 that it should have.
        """
        wanted = [a for a in self.artifacts(id) if name is None or a.name == name]
        if not wanted:
            which = f"no artifact '{name}'" if name else "no artifacts"
            raise NotFound(
                f"{id} has {which}",
                param="name",
                hint="A job has artifacts once it has succeeded; `gpuyard artifacts` lists them.",
            )
        target = Path(to)
        into = name is None or target.is_dir()
        return [
            transfer.download(
                self._transport,
                segment(id),
                artifact,
                target / inside(artifact.name) if into else target,
                on_bytes,
            )
            for artifact in wanted
        ]
