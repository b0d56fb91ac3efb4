"""Model references: found, allowed, whole, and of a kind that can do the task.

Only ``config.json`` and the headers of the weight files are read; the rank that loads the model
checks it again with the real thing.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from scheduler.footprint import ModelShape
from scheduler.submission.adapters import CONFIG as ADAPTER_CONFIG
from scheduler.submission.adapters import base_of, is_adapter
from scheduler.submission.architectures import SEQ2SEQ_TYPES, why_unsuitable
from scheduler.submission.paths import inside, printable, resolved
from scheduler.submission.scratch import shape_of
from scheduler.submission.tokenizers import lacks_padding
from scheduler.submission.weights import read_tensors
from shared import ids
from shared.errors import InvalidRequest, ModelNotFound, PathNotAllowed, UnsupportedModel
from shared.lifecycle import JobState
from shared.resolved import ResolvedModel
from shared.settings import Settings
from shared.specs import MODEL_NAME, InferSpec, TrainSpec
from shared.store import Store, read
from shared.store.models import find_model, list_versions
from shared.tables import Artifact, Job, PublishedModel

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.txt",
    "vocab.json",
    "spiece.model",
    "sentencepiece.bpe.model",
)
_CONFIG_LIMIT = 16 * 1024 * 1024
_PUBLISHED = re.compile(f"({MODEL_NAME})@([a-z0-9]{{1,20}})")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")


@dataclass(frozen=True, slots=True)
class FoundModel:
    """A model that may be used; ``shape`` is None where only its name is known (the hub)."""

    resolved: ResolvedModel
    shape: ModelShape | None
    labels: tuple[str, ...] | None = None
    """The names that its config has for its classes."""
    config: dict[str, Any] | None = None
    """Its ``config.json``, if it has one already."""


def resolve_model(store: Store, settings: Settings, spec: TrainSpec | InferSpec) -> FoundModel:
    """The model that the spec names, or that it is to make from scratch.

    Raises:
        ModelNotFound: nothing of that name; the hint says where to put it or what is there.
        PathNotAllowed: a path outside the model roots.
        UnsupportedModel: it is there and cannot do the task, or is no complete safe folder.
    """
    if isinstance(spec, TrainSpec) and spec.architecture is not None:
        shape, label = shape_of(spec.architecture), f"new-{spec.architecture.type}"
        made = ResolvedModel(source="scratch", path="", label=label, parameters=shape.parameters)
        return FoundModel(made, shape)
    wanted = _Wanted(spec.model or "", spec.task, trains=spec.kind == "train")
    return _resolve(store, settings, wanted)


def resolve_teacher(store: Store, settings: Settings, spec: TrainSpec) -> FoundModel | None:
    """The model that teaches, if one does. It has to do the task already.

    Raises:
        ModelNotFound, PathNotAllowed, UnsupportedModel: as ``resolve_model``; ``param`` is teacher.
    """
    if spec.teacher is None:
        return None
    try:
        return _resolve(store, settings, _Wanted(spec.teacher, spec.task, trains=False))
    except InvalidRequest as error:
        error.param = "teacher"
        raise


@dataclass(frozen=True, slots=True)
class _Wanted:
    name: str
    task: str
    trains: bool
    """It may still lack the task's head."""
    carries: bool = False
    """It is the base of an adapter."""


def _resolve(store: Store, settings: Settings, wanted: _Wanted) -> FoundModel:
    name = wanted.name
    if name.startswith("adapter:"):
        folder, _ = _model_of_job(store, settings, name.removeprefix("adapter:"), "adapter")
        return _adapted(store, settings, wanted, folder)
    if name.startswith("job:"):
        folder, label = _model_of_job(store, settings, name.removeprefix("job:"))
        return _inspect(folder, label, "job", wanted)
    if reference := _PUBLISHED.fullmatch(name):
        model = _published(store, *reference.groups())
        folder, _ = _model_of_job(store, settings, model.job_id)
        return _inspect(folder, f"{model.name}@{model.version}", "job", wanted)
    found = _find_folder(settings, name)
    if found is not None and is_adapter(found):
        return _adapted(store, settings, wanted, found)
    if found is not None:
        return _inspect(found, found.name, "folder", wanted)
    if _HUB_ID.fullmatch(name) and settings.hub:
        label = name.rpartition("/")[2]
        return FoundModel(ResolvedModel(source="hub", path=name, label=label), None)
    raise ModelNotFound(
        f"there is no model '{printable(name)}'",
        param="model",
        hint=_where_models_are(settings, name),
    )


def _adapted(store: Store, settings: Settings, wanted: _Wanted, folder: Path) -> FoundModel:
    """The base of an adapter, to which that is applied."""
    if wanted.carries:
        raise UnsupportedModel(
            f"'{printable(wanted.name)}' is an adapter itself",
            param="model",
            hint="Merge one of the two into its base.",
        )
    base = base_of(folder, wanted.name, wanted.task, trains=wanted.trains)
    try:
        found = _resolve(store, settings, replace(wanted, name=base, carries=True))
    except InvalidRequest as error:
        error.message = f"the base of adapter '{printable(wanted.name)}': {error.message}"
        raise
    where = found.resolved.model_copy(update={"adapter": str(folder)})
    return replace(found, resolved=where)


def _published(store: Store, name: str, which: str) -> PublishedModel:
    model = store.call(find_model, name, which)
    if model is not None:
        return model
    there = [f"{name}@{m.version}" for m in store.call(list_versions, name)]
    raise ModelNotFound(
        f"there is no published model '{name}@{which}'",
        param="model",
        hint=f"There are: {', '.join(there[:10])}." if there else "`gpuyard models` lists them.",
    )


def _find_folder(settings: Settings, name: str) -> Path | None:
    if "\0" in name or "\\" in name:
        raise ModelNotFound(f"'{printable(name)}' is no model reference", param="model")
    given = Path(name)
    if ".." in given.parts:
        raise PathNotAllowed("a model reference may not contain '..'", param="model")
    candidates = [given] if given.is_absolute() else [r / given for r in settings.model_roots]
    for candidate in candidates:
        folder = resolved(candidate)
        if folder is not None and inside(folder, settings.model_roots):
            if folder.is_dir():
                return folder
        elif given.is_absolute() or candidate.exists():
            raise PathNotAllowed(
                f"'{printable(name)}' lies outside the model roots",
                param="model",
                hint="Put the folder below "
                f"{settings.model_roots[0]}, or let the operator add its parent to "
                "GPUYARD_MODEL_ROOTS. Links that lead out of a root are not followed.",
            )
    return None


def _where_models_are(settings: Settings, name: str) -> str:
    there = sorted(
        folder.name
        for root in settings.model_roots
        if root.is_dir()
        for folder in root.iterdir()
        if (folder / "config.json").is_file()
    )
    near = difflib.get_close_matches(name, there, n=1)
    hint = f"Did you mean '{near[0]}'? " if near else ""
    shown = ", ".join(there[:10]) + (", …" if len(there) > 10 else "")
    hint += f"Models here: {shown}. " if there else ""
    hint += f"Put a model folder (what save_pretrained writes) below {settings.model_roots[0]}"
    if _HUB_ID.fullmatch(name):
        return hint + ", or let the operator enable the hub (GPUYARD_HUB=true)."
    return hint + "."


def _model_of_job(
    store: Store, settings: Settings, job_id: str, part: Literal["model", "adapter"] = "model"
) -> tuple[Path, str]:
    job, artifacts = (
        store.call(_job_and_artifacts, job_id) if ids.is_id(job_id, ids.JOB) else (None, [])
    )
    if job is None:
        raise ModelNotFound(f"there is no job '{printable(job_id)}'", param="model")
    if job.kind != "train":
        raise UnsupportedModel(
            f"{job.id} is no training job: it made no model",
            param="model",
            hint="Name a training job that succeeded.",
        )
    if job.state != JobState.SUCCEEDED:
        over = JobState(job.state).terminal
        raise ModelNotFound(
            f"{job.id} is {job.state}: its model {'was never finished' if over else 'is not ready'}",
            param="model",
            hint=None if over else f"Wait for it: `gpuyard watch {job.id}`.",
        )
    parts = [a for a in artifacts if a.name.startswith(f"{part}/")]
    named = {"model": "model/config.json", "adapter": f"adapter/{ADAPTER_CONFIG}"}[part]
    config = next((a for a in parts if a.name == named), None)
    if part == "adapter" and not parts:
        raise ModelNotFound(
            f"{job.id} made no adapter",
            param="model",
            hint=f"A training with method lora makes one; `job:{job.id}` is the whole model.",
        )
    missing = [a.name for a in parts if not (settings.data / a.path).is_file()]
    if config is None or missing:
        what = f"({missing[0]})" if missing else f"({named})"
        raise ModelNotFound(
            f"the {part} of {job.id} is gone from the data folder {what}",
            param="model",
            hint="Train it again, or restore the data folder.",
        )
    label = str(job.resolved["model"]["label"]).removesuffix("-tuned")
    return (settings.data / config.path).parent.resolve(), f"{label}-tuned"


def _job_and_artifacts(session: Any, job_id: str) -> tuple[Job | None, Sequence[Artifact]]:
    return read.get_job(session, job_id), read.list_artifacts(session, job_id)


def _inspect(folder: Path, label: str, source: Any, wanted: _Wanted) -> FoundModel:
    name = wanted.name
    config = _read_config(folder, name)
    _check_task(config, wanted)
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise UnsupportedModel(
            f"model '{printable(name)}' has no tokenizer files",
            param="model",
            hint="tokenizer.save_pretrained(folder) writes them beside the model's.",
        )
    if wanted.trains and wanted.task != "text-generation" and lacks_padding(folder):
        raise UnsupportedModel(
            f"the tokenizer of model '{printable(name)}' has no padding token",
            param="model",
            hint="Set one (tokenizer.pad_token = ...) and save it beside the model.",
        )
    tensors, stored = read_tensors(folder, name)
    shape = _shape(config, tensors, stored)
    where = ResolvedModel(source=source, path=str(folder), label=label, parameters=shape.parameters)
    return FoundModel(where, shape, labels=_labels(config), config=config)


def shape_of_folder(folder: Path) -> ModelShape:
    """The shape of a model folder that is known to be whole.

    Raises:
        UnsupportedModel: it is not.
    """
    return _shape(_read_config(folder, folder.name), *read_tensors(folder, folder.name))


def _read_config(folder: Path, name: str) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise UnsupportedModel(
            f"'{printable(name)}' has no config.json: it is no model folder",
            param="model",
            hint="A model folder is what model.save_pretrained(folder) writes.",
        )
    try:
        if path.stat().st_size > _CONFIG_LIMIT:
            raise ValueError("it is far too large")
        config = json.loads(path.read_bytes())
        if not isinstance(config, dict):
            raise ValueError("it is no JSON object")
    except (OSError, ValueError) as error:
        raise UnsupportedModel(
            f"config.json of '{printable(name)}' cannot be read: {error}", param="model"
        ) from None
    return config


def _labels(config: dict[str, Any]) -> tuple[str, ...] | None:
    names = config.get("id2label")
    if not isinstance(names, dict) or not names:
        return None
    return tuple(str(name) for name in names.values())


def _check_task(config: dict[str, Any], wanted: _Wanted) -> None:
    problem = why_unsuitable(config, wanted.task, trains=wanted.trains)
    if problem is not None:
        what, hint = problem
        message = f"model '{printable(wanted.name)}' is {what}"
        raise UnsupportedModel(message, param="model", hint=hint)


def _shape(config: dict[str, Any], tensors: tuple[tuple[str, int], ...], stored: int) -> ModelShape:
    def number(*names: str, default: int) -> int:
        found = (config.get(name) for name in names)
        usable = (v for v in found if isinstance(v, int) and not isinstance(v, bool) and v > 0)
        return next(usable, default)

    hidden = number("hidden_size", "n_embd", "d_model", "dim", default=768)
    heads = number("num_attention_heads", "n_head", "n_heads", "num_heads", default=12)
    layers = number("num_hidden_layers", "n_layer", "n_layers", "num_layers", default=12)
    if config.get("model_type") in SEQ2SEQ_TYPES:
        layers += number("num_decoder_layers", "decoder_layers", default=layers)
    return ModelShape(
        tensors=tensors,
        weight_bytes=stored,
        model_type=str(config.get("model_type") or ""),
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=number("num_key_value_heads", default=heads),
        head_dim=number("head_dim", "d_kv", default=max(1, hidden // heads)),
        intermediate=number(
            "intermediate_size",
            "n_inner",
            "hidden_dim",
            "ffn_dim",
            "d_ff",
            "encoder_ffn_dim",
            default=4 * hidden,
        ),
        vocabulary=number("vocab_size", default=32_000),
        positions=number(
            "max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length", default=4096
        ),
        gated_mlp=any(name.endswith("gate_proj.weight") for name, _ in tensors),
        attention_dropout=any(
            isinstance(value := config.get(name), int | float) and value > 0
            for name in ("attention_probs_dropout_prob", "attn_pdrop", "attention_dropout")
        ),
    )
