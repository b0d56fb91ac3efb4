"""The Python client of the service: ``from gpuyard import Client``."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import date, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from gpuyard import fetching, result_files, streams, transfer
from gpuyard.addresses import at, inside, models_at, reference_of, segment, suffix_of
from gpuyard.connection import find_connection
from gpuyard.errors import JobFailed, WaitTimedOut
from gpuyard.references import with_uploads
from gpuyard.streams import Order
from gpuyard.transfer import OnBytes
from gpuyard.transport import Transport
from gpuyard.waiting import looks
from shared.errors import NotFound, Unavailable
from shared.lifecycle import JobState
from shared.specs import InferSpec, TrainSpec, parse_spec
from shared.sweeps import parse_sweep, plan
from shared.views import (
    ArtifactView,
    CheckpointView,
    DeviceView,
    EventView,
    FileView,
    Health,
    JobDetail,
    JobView,
    LogView,
    MetricView,
    ModelView,
    Page,
    SweepDetail,
    SweepView,
    UsageReport,
    View,
    WorkerView,
)

V = TypeVar("V", bound=View)
PAGE = 200
KNOWN_FILES = 5 * PAGE
"""How many of the newest uploads are looked through for one with the same content."""


class Client:
    """Talks to one service. Safe to share among threads; close it, or use it as a context manager.

    Requests that can be repeated without harm are repeated for ``patience`` seconds when the
    connection breaks or the service answers that it is busy; ``on_retry`` hears of each time. Every
    error of the service is raised as its class of ``shared.errors``, with its code, parameter, hint
    and request id.

    Raises:
        ConfigurationError: neither ``url``, nor ``GPUYARD_URL``, nor a running local stack names one.
    """

    def __init__(
        self,
        url: str | None = None,
        api_key: str | None = None,
        *,
        patience: float = 30.0,
        on_retry: Callable[[Unavailable], None] | None = None,
    ) -> None:
        self.connection = find_connection(url, api_key)
        self._transport = Transport(self.connection, patience, on_retry)
        self._uploaded: dict[tuple[str, str], str] = {}

    def close(self) -> None:
        self._transport.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # Jobs

    def submit(
        self,
        spec: Mapping[str, Any] | TrainSpec | InferSpec,
        *,
        idempotency_key: str | None = None,
        upload: bool = False,
        bases: Sequence[Path] = (),
        on_bytes: OnBytes | None = None,
    ) -> JobDetail:
        """Submit a job, once: the request carries an idempotency key, one of its own if none is given,
        so it is safely repeated until an answer arrives.

        With ``upload``, files that the spec names and that exist here (from the current folder, else
        from one of ``bases``) are uploaded first; what the service has already is not sent again.

        Raises:
            InvalidSpec: before anything is sent.
            IdempotencyMismatch: the key was used for another spec.
        """
        data = (
            spec.model_dump(mode="json", exclude_unset=True) | {"kind": spec.kind}
            if isinstance(spec, TrainSpec | InferSpec)
            else dict(spec)
        )
        parse_spec(data)
        if upload:
            data = with_uploads(data, lambda path: self._uploaded_id(path, on_bytes), bases)
        answer = self._transport.request(
            "POST",
            "/v1/jobs",
            json=data,
            headers={"Idempotency-Key": idempotency_key or secrets.token_hex(16)},
        )
        return self._transport.read(answer, JobDetail)

    def job(self, id: str) -> JobDetail:
        """A job with its spec, its attempts, and why it waits or failed."""
        return self._transport.get(at("jobs", id), JobDetail)

    def jobs(
        self,
        *,
        state: JobState | str | Iterable[JobState | str] | None = None,
        kind: str | None = None,
        name: str | None = None,
    ) -> Iterator[JobView]:
        """All jobs, newest first, fetched page by page as they are asked for."""
        states = [state] if isinstance(state, str) else list(state or ())
        return self._pages(
            "/v1/jobs", JobView, state=[str(s) for s in states] or None, kind=kind, name=name
        )

    def cancel(self, id: str, reason: str = "by the user") -> JobDetail:
        """Cancel a job; of one that is over or being cancelled already, nothing changes.

        The answer's state tells: ``cancelled`` at once, or ``cancelling`` until its ranks are gone.
        """
        answer = self._transport.request("POST", at("jobs", id, "cancel"), json={"reason": reason})
        return self._transport.read(answer, JobDetail)

    def wait(
        self,
        id: str,
        timeout: float | None = None,
        on_progress: Callable[[JobDetail], None] | None = None,
        *,
        raise_on_failure: bool = True,
        poll_seconds: float = 0.5,
    ) -> JobDetail:
        """Wait until the job is over, also through minutes in which the API is away.

        ``on_progress`` is called whenever the job looks different from before, and with its end.

        Raises:
            JobFailed: it failed or was cancelled (unless ``raise_on_failure`` is false).
            WaitTimedOut: it was not over after ``timeout`` seconds; it goes on.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        seen: JobDetail | None = None
        for job in looks(lambda: self.job(id), every=poll_seconds):
            if isinstance(job, JobDetail) and job != seen:
                seen = job
                if on_progress is not None:
                    on_progress(job)
            over = seen is not None and seen.state.terminal
            if (
                seen is not None
                and not over
                and deadline is not None
                and deadline < time.monotonic()
            ):
                raise WaitTimedOut(seen, timeout or 0.0)
        assert seen is not None  # noqa: S101 - the last look was the terminal job
        if raise_on_failure and seen.state is not JobState.SUCCEEDED:
            raise JobFailed(seen)
        return seen

    # Sweeps

    def submit_sweep(
        self,
        sweep: Mapping[str, Any],
        *,
        upload: bool = False,
        idempotency_key: str | None = None,
        bases: Sequence[Path] = (),
        on_bytes: OnBytes | None = None,
    ) -> SweepDetail:
        """Submit a sweep: ``spec``, a training, and ``parameters``, the fields that differ.

        Arguments as for ``submit``; a file that ``spec.data`` names is uploaded once for all trials.

        Raises:
            InvalidSpec: before anything is sent; names the trial.
        """
        data = dict(sweep)
        plan(parse_sweep(data))
        if upload:
            spec = with_uploads(data["spec"], lambda path: self._uploaded_id(path, on_bytes), bases)
            data["spec"] = spec
        answer = self._transport.request(
            "POST",
            "/v1/sweeps",
            json=data,
            headers={"Idempotency-Key": idempotency_key or secrets.token_hex(16)},
        )
        return self._transport.read(answer, SweepDetail)

    def sweep(self, id: str) -> SweepDetail:
        """A sweep with its trials, and the best of those that have succeeded."""
        return self._transport.get(at("sweeps", id), SweepDetail)

    def sweeps(self) -> Iterator[SweepView]:
        """All sweeps, newest first."""
        return self._pages("/v1/sweeps", SweepView)

    def cancel_sweep(self, id: str) -> SweepDetail:
        """Cancel every trial that is not over."""
        answer = self._transport.request("POST", at("sweeps", id, "cancel"))
        return self._transport.read(answer, SweepDetail)

    # What a job says and makes

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
        if order == "completion":
            return streams.follow_completion(self._transport, segment(id), follow)
        return streams.follow_rows(self._transport, segment(id), follow)

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

    def retry(
        self,
        id: str,
        *,
        failed: bool = False,
        changes: Mapping[str, Any] | None = None,
        idempotency_key: str | None = None,
    ) -> JobDetail:
        """Submit a job that is over once more; ``failed``: only its rows that have an error, whose
        results carry the numbers that they had in the first input.

        ``changes`` are laid over the spec as a JSON merge patch (None takes a field away).

        Raises:
            Conflict: the job is not over, or no row of it failed.
            InvalidRequest: a training has no rows, or the spec is wrong with the changes.
        """
        answer = self._transport.request(
            "POST",
            at("jobs", id, "retry"),
            json={"failed": failed, "changes": dict(changes or {})},
            headers={"Idempotency-Key": idempotency_key or secrets.token_hex(16)},
        )
        return self._transport.read(answer, JobDetail)

    def usage(
        self,
        *,
        since: datetime | date | str | None = None,
        until: datetime | date | str | None = None,
        group: str | None = None,
    ) -> UsageReport:
        """Devices, rows and tokens that were used from ``since`` to before ``until``; ``group`` is key,
        project or day. Days and times without a zone are those of UTC."""
        period = {
            name: value.isoformat() if isinstance(value, date) else value
            for name, value in (("since", since), ("until", until))
        }
        return self._transport.get("/v1/usage", UsageReport, group=group, **period)

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

    # Published models

    def models(self) -> Iterator[ModelView]:
        """Published models by name, each in its newest version."""
        return self._pages("/v1/models", ModelView)

    def model_versions(self, name: str) -> list[ModelView]:
        """The versions of a model, newest first.

        Raises:
            NotFound: there is none of this name.
        """
        return self._transport.get_list(models_at(name), ModelView)

    def model(self, reference: str) -> ModelView:
        """A version, as specs name it: ``name@3``, ``name@latest``, ``name@production``."""
        name, version = reference_of(reference)
        return self._transport.get(models_at(name, version), ModelView)

    def publish(self, job: str, name: str, tags: Iterable[str] = ()) -> ModelView:
        """Give the model of a training job a name and the next version. Repeating it changes nothing.

        Raises:
            Conflict: the job made no model, or has not succeeded.
        """
        body = {"job": job, "name": name, "tags": list(tags)}
        return self._transport.read(
            self._transport.request("POST", "/v1/models", json=body), ModelView
        )

    def fetch_model(
        self, reference: str, to: str | Path, *, on_bytes: OnBytes | None = None
    ) -> Path:
        """Fetch all files of a version into the folder ``to``, which any ``from_pretrained`` of Transformers
        takes then. It appears whole and checked, or not at all; a fetch that was broken off goes on
        where it was, and one that is repeated changes nothing.

        Raises:
            NotFound: there is no such version.
            Conflict: ``to`` is there already and holds something else.
            CorruptDownload: what arrived does not have the SHA-256 that it should have.
        """
        model = self.model(reference)
        files = {
            str(inside(artifact.name).relative_to("model")): artifact
            for artifact in self.artifacts(model.job_id)
            if artifact.name.startswith("model/")
        }
        if not files:
            raise NotFound(f"{model.job_id} has no files of {model.reference}", param="model")
        job = segment(model.job_id)
        return fetching.fetch_folder(self._transport, job, files, Path(to), on_bytes)

    def change_model(
        self, reference: str, *, stage: str | None = None, tags: Iterable[str] | None = None
    ) -> ModelView:
        """Move a version (``name@3``) to a stage, "" for none, or replace its tags. The one that was
        in production before is archived."""
        name, version = reference_of(reference)
        body = {"stage": stage, "tags": None if tags is None else list(tags)}
        answer = self._transport.request("PATCH", models_at(name, version), json=body)
        return self._transport.read(answer, ModelView)

    def delete_model(self, reference: str) -> ModelView:
        """Take a version off the list; its files stay with its job.

        Raises:
            Conflict: it is in production.
        """
        answer = self._transport.request("DELETE", models_at(*reference_of(reference)))
        return self._transport.read(answer, ModelView)

    # Files and the fleet

    def upload(self, path: str | Path, on_bytes: OnBytes | None = None) -> FileView:
        """Upload a file and return it as the service keeps it; its ``id`` goes into specs.

        Raises:
            DataError: it cannot be read, or changed meanwhile.
            PayloadTooLarge: it is over the service's cap.
        """
        path = Path(path)
        sha256 = transfer.digest(path)
        file = transfer.upload(self._transport, path, sha256, on_bytes)
        self._uploaded[sha256, suffix_of(file.name)] = file.id
        return file

    def files(self) -> Iterator[FileView]:
        """Uploaded files, newest first."""
        return self._pages("/v1/files", FileView)

    def devices(self) -> list[DeviceView]:
        return self._transport.get_list("/v1/devices", DeviceView)

    def workers(self) -> list[WorkerView]:
        return self._transport.get_list("/v1/workers", WorkerView)

    def health(self) -> Health:
        """Whether the service is ready, and which part is not. Asks once.

        Raises:
            Unavailable: nothing answers at all.
        """
        return self._transport.probe("/readyz", Health)

    def _uploaded_id(self, path: Path, on_bytes: OnBytes | None) -> str:
        """The id under which the service has the content of ``path`` under a name of its kind;
        uploads it if it has not. The suffix says how the service reads a file."""
        sha256 = transfer.digest(path)
        wanted = sha256, suffix_of(path.name)
        if wanted not in self._uploaded:
            for place, file in enumerate(self.files()):
                # Also makes a repeated submission the same spec, as an idempotency key demands.
                if (file.sha256, suffix_of(file.name)) == wanted:
                    self._uploaded[wanted] = file.id
                if wanted in self._uploaded or place >= KNOWN_FILES:
                    break
        if wanted not in self._uploaded:
            file = transfer.upload(self._transport, path, sha256, on_bytes)
            self._uploaded[wanted] = file.id
        return self._uploaded[wanted]

    def _pages(self, path: str, item: type[V], **params: Any) -> Iterator[V]:
        cursor: str | None = None
        while True:
            page = self._transport.get(path, Page[item], limit=PAGE, cursor=cursor, **params)  # type: ignore[valid-type]
            yield from page.items
            cursor = page.next
            if cursor is None:
                return
