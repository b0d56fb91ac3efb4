"""Whether model, teacher, data and options of a training fit together, each being fine by itself.

Only what is certain is refused; a rank sees the rest, with the models loaded.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from scheduler.footprint import ModelShape
from scheduler.submission.data import Inputs
from scheduler.submission.models import FoundModel
from scheduler.submission.paths import printable
from scheduler.submission.tokenizers import lacks_chat_template
from shared.errors import InvalidSpec, UnsupportedModel
from shared.specs import TrainSpec

HEADS = frozenset(
    {"lm_head", "embed_out", "cls", "decoder", "predictions", "vocab_projector", "vocab_transform"}
    | {"classifier", "pre_classifier", "score", "dense", "out_proj", "transform"}
)
"""Layers that a model may have without a weight of their own in its folder: tied ones, and new heads."""
_SHOWN = 8


def require_fit(
    spec: TrainSpec, model: FoundModel, teacher: FoundModel | None, inputs: Inputs
) -> None:
    """Refuse at once what a rank would refuse later.

    Raises:
        UnsupportedModel: chats for a model without a chat template; a teacher with other labels.
        InvalidSpec: LoRA targets that no layer of the model is named by.
    """
    if inputs.chat is not None:
        _require_chat_template(spec, model, inputs.chat)
    if teacher is not None and inputs.labels:
        _require_labels(spec, teacher, inputs.labels)
    if spec.adaptation.targets and model.shape is not None:
        _require_targets(spec, model.shape)


def _require_chat_template(spec: TrainSpec, model: FoundModel, chat: str) -> None:
    columns, source = spec.data.columns, model.resolved.source
    if source == "hub" or (source != "scratch" and not lacks_chat_template(_folder(model))):
        return
    what = (
        "a model from scratch" if source == "scratch" else f"model '{printable(spec.model or '')}'"
    )
    answers = "answers" if spec.preference is not None else f"'{columns.completion}'"
    raise UnsupportedModel(
        f"{chat} is a chat, and {what} has no chat template to write it with",
        param="architecture" if source == "scratch" else "model",
        hint="Choose a chat model, set tokenizer.chat_template and save it beside the model, or give "
        f"a column '{columns.prompt}' with {answers}.",
    )


def _require_labels(spec: TrainSpec, teacher: FoundModel, labels: frozenset[str]) -> None:
    if teacher.resolved.source == "hub" or sorted(teacher.labels or ()) == sorted(labels):
        return
    raise UnsupportedModel(
        f"the teacher '{printable(spec.teacher or '')}' was not trained for these labels: the data have "
        f"{_listed(labels)}, and it knows {_listed(teacher.labels or ())}",
        param="teacher",
        hint="A teacher does the same task, with the same labels.",
    )


def _require_targets(spec: TrainSpec, shape: ModelShape) -> None:
    targets = spec.adaptation.targets
    if any(target.rpartition(".")[2] in HEADS for target in targets):
        return
    layers = {name.rpartition(".")[0] for name, _ in shape.tensors}
    # As PEFT matches a list of names.
    if any(layer == t or layer.endswith(f".{t}") for layer in layers for t in targets):
        return
    names = {layer.rpartition(".")[2] for layer in layers}
    raise InvalidSpec(
        f"lora.targets {', '.join(map(printable, targets))} match no layer of model "
        f"'{printable(spec.model or '')}'",
        param="lora.targets",
        hint=f"Its layers are named {_listed(name for name in names if not name.isdigit())}.",
    )


def _folder(model: FoundModel) -> Path:
    return Path(model.resolved.path)


def _listed(names: Iterable[str]) -> str:
    ordered = sorted(names)
    shown = ", ".join(f"'{printable(name, 40)}'" for name in ordered[:_SHOWN])
    return (shown + (", …" if len(ordered) > _SHOWN else "")) or "none"
