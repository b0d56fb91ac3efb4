"""The Python client of the service: ``from gpuyard import Client``."""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any, Self, TypeVar

from gpuyard import fetching, streams, transfer
from gpuyard.connection import find_connection
from gpuyard.errors import JobFailed, WaitTimedOut
from gpuyard.references import with_uploads
from gpuyard.transfer import OnBytes
from gpuyard.transport import Transport
from gpuyard.waiting import looks
from shared.errors import InvalidRequest, NotFound, Unavailable
from shared.lifecycle import JobState
from shared.specs import MODEL_NAME, InferSpec, TrainSpec, parse_spec
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
        return self._transport.get(_at("jobs", id), JobDetail)

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
        answer = self._transport.request("POST", _at("jobs", id, "cancel"), json={"reason": reason})
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
        return self._transport.get(_at("sweeps", id), SweepDetail)

    def sweeps(self) -> Iterator[SweepView]:
        """All sweeps, newest first."""
        return self._pages("/v1/sweeps", SweepView)

    def cancel_sweep(self, id: str) -> SweepDetail:
        """Cancel every trial that is not over."""
        answer = self._transport.request("POST", _at("sweeps", id, "cancel"))
        return self._transport.read(answer, SweepDetail)

    # What a job says and makes

    def events(self, id: str, after: int = 0, follow: bool = True) -> Iterator[EventView]:
        """The story of a job: what there is, then, with ``follow``, what comes until the job is over.

        Goes on where it was when a connection breaks: no event is missed or given twice. Pass the
        ``id`` of the last event as ``after`` to go on in another process.
        """
        path = _at("jobs", id, "events")
        if follow:
            return streams.follow(self._transport, path, EventView, after, {})
        return iter(self._transport.get_list(path, EventView, after=after, format="json"))

    def logs(
        self, id: str, after: int = 0, follow: bool = True, rank: int | None = None
    ) -> Iterator[LogView]:
        """What the ranks printed, in pieces of text that need not end with a line; see ``events``."""
        path = _at("jobs", id, "logs")
        if follow:
            return streams.follow(self._transport, path, LogView, after, {"rank": rank})
        pieces = self._transport.get_list(path, LogView, after=after, rank=rank, format="json")
        return iter(pieces)

    def rows(self, id: str, follow: bool = False) -> Iterator[dict[str, Any]]:
        """Result rows of a batch job in input order: those that are committed or, with ``follow``,
        each as it is, until the job is over. A broken connection leaves no gap and no double.

        A row is ``{"row", "id", "output", "error", "usage"}``; one of output and error is null.
        What an output is depends on the task: see ``shared/rows.py`` or the API's own documentation.
        """
        return streams.follow_rows(self._transport, _segment(id), follow)

    def metrics(self, id: str, split: str | None = None) -> list[MetricView]:
        """Metrics in the order of steps; ``split`` is train or validation."""
        return self._transport.get_list(_at("jobs", id, "metrics"), MetricView, split=split)

    def checkpoints(self, id: str) -> list[CheckpointView]:
        """Committed checkpoints, newest first."""
        return self._transport.get_list(_at("jobs", id, "checkpoints"), CheckpointView)

    def artifacts(self, id: str) -> list[ArtifactView]:
        """Deliverables of a job that succeeded; none before."""
        return self._transport.get_list(_at("jobs", id, "artifacts"), ArtifactView)

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
                _segment(id),
                artifact,
                target / _inside(artifact.name) if into else target,
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
        return self._transport.get_list(_models(name), ModelView)

    def model(self, reference: str) -> ModelView:
        """A version, as specs name it: ``name@3``, ``name@latest``, ``name@production``."""
        name, version = _reference(reference)
        return self._transport.get(_models(name, version), ModelView)

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
            str(_inside(artifact.name).relative_to("model")): artifact
            for artifact in self.artifacts(model.job_id)
            if artifact.name.startswith("model/")
        }
        if not files:
            raise NotFound(f"{model.job_id} has no files of {model.reference}", param="model")
        job = _segment(model.job_id)
        return fetching.fetch_folder(self._transport, job, files, Path(to), on_bytes)

    def change_model(
        self, reference: str, *, stage: str | None = None, tags: Iterable[str] | None = None
    ) -> ModelView:
        """Move a version (``name@3``) to a stage, "" for none, or replace its tags. The one that was
        in production before is archived."""
        name, version = _reference(reference)
        body = {"stage": stage, "tags": None if tags is None else list(tags)}
        answer = self._transport.request("PATCH", _models(name, version), json=body)
        return self._transport.read(answer, ModelView)

    def delete_model(self, reference: str) -> ModelView:
        """Take a version off the list; its files stay with its job.

        Raises:
            Conflict: it is in production.
        """
        answer = self._transport.request("DELETE", _models(*_reference(reference)))
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
        self._uploaded[sha256, _suffix(file.name)] = file.id
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
        wanted = sha256, _suffix(path.name)
        if wanted not in self._uploaded:
            for place, file in enumerate(self.files()):
                # Also makes a repeated submission the same spec, as an idempotency key demands.
                if (file.sha256, _suffix(file.name)) == wanted:
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


def _segment(id: str) -> str:
    """An id as one piece of a path: what is no id must not lead elsewhere.

    Raises:
        InvalidRequest: it is none.
    """
    if not id.isascii() or not id.replace("_", "").isalnum():
        raise InvalidRequest(f"{id!r} is no id", param="id", hint="`gpuyard jobs` lists the ids.")
    return id


def _reference(reference: str) -> tuple[str, str]:
    """(name, version) of ``name@version``; without a version the latest."""
    name, _, version = reference.partition("@")
    return name, version or "latest"


def _models(name: str, *version: str) -> str:
    """Raises InvalidRequest: what is no name or version must not lead elsewhere."""
    for part in (name, *version):
        if re.fullmatch(MODEL_NAME, part) is None:
            raise InvalidRequest(
                f"{'@'.join((name, *version))!r} is no model reference",
                param="model",
                hint="It is name@version, such as topics@2; `gpuyard models` lists them.",
            )
    return "/".join(["/v1/models", name, *version])


def _at(kind: str, id: str, *rest: str) -> str:
    return "/".join(["/v1", kind, _segment(id), *rest])


def _suffix(name: str) -> str:
    return PurePosixPath(name).suffix.lower()


def _inside(name: str) -> PurePosixPath:
    """An artifact's name as a path below the folder of the download, whatever the service says."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts:
        raise InvalidRequest(f"the artifact {name!r} would lie outside the folder", param="name")
    return path
