"""Calls about published models."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from gpuyard import fetching
from gpuyard.addresses import inside, models_at, reference_of, segment
from gpuyard.calls.outputs import OutputCalls
from gpuyard.transfer import OnBytes
from shared.errors import NotFound
from shared.views import ModelView


class ModelCalls(OutputCalls):
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
