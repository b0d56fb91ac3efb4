"""From raw data to a spec, or to an error that says what to change."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Annotated, Any, get_args

from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from shared.errors import InvalidSpec
from shared.explain import describe, explain
from shared.specs.inference import InferSpec
from shared.specs.training import TrainSpec

JobSpec = Annotated[TrainSpec | InferSpec, Field(discriminator="kind")]
_ADAPTER: TypeAdapter[TrainSpec | InferSpec] = TypeAdapter(JobSpec)


def parse_spec(data: Any) -> TrainSpec | InferSpec:
    """Validate a spec.

    Raises:
        InvalidSpec: names the field (``param``), what is wrong with it and what is allowed.
    """
    if not isinstance(data, dict):
        raise InvalidSpec(
            f"a spec is an object, not {describe(data)}", hint="See /docs for examples."
        )
    try:
        return _ADAPTER.validate_python(data)
    except ValidationError as error:
        raise _first_problem(error) from None


def _first_problem(error: ValidationError) -> InvalidSpec:
    first, *others = error.errors(include_url=False)
    param = _field(first["loc"])
    if first["type"] in ("union_tag_invalid", "union_tag_not_found"):
        return InvalidSpec("kind must be 'train' or 'infer'", param="kind")
    hint = None
    message = explain(first, param or "the spec")
    if first["type"] == "extra_forbidden":
        message = f"unknown field '{param}'"
        meant = _meant(str(first["loc"][0]), str(first["loc"][-1]))
        hint = f"Did you mean '{meant}'?" if meant else "See /docs for the fields."
    if others:
        rest = sorted({_field(problem["loc"]) or "spec" for problem in others})
        hint = f"{hint or ''} Also wrong: {', '.join(rest)}.".strip()
    return InvalidSpec(message, param=param, hint=hint)


def _field(place: tuple[int | str, ...]) -> str | None:
    """The field with dots; a place begins with the tag of the union, which is no field, and may hold
    others, in brackets."""
    return ".".join(str(part) for part in place[1:] if not str(part).startswith("[")) or None


def _meant(kind: str, name: str) -> str | None:
    """The field whose own name is most like ``name``, wherever in the spec it belongs."""
    fields = {f.rpartition(".")[2]: f for f in _fields(TrainSpec if kind == "train" else InferSpec)}
    close = difflib.get_close_matches(name, fields, n=1, cutoff=0.75)
    return fields[close[0]] if close else None


def _fields(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every field, the outer ones last, so that they count where names are equal."""
    for name, field in model.model_fields.items():
        for inner in (field.annotation, *get_args(field.annotation)):
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                yield from _fields(inner, f"{prefix}{name}.")
    for name in model.model_fields:
        yield prefix + name
