"""From what is typed to a spec: a file, then flags over it, then ``--set``. Pure but for the reading."""

from __future__ import annotations

import difflib
import json
import re
import sys
from collections.abc import Hashable, Iterable, Mapping
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel

from shared.errors import InvalidSpec
from shared.specs import InferSpec, TrainSpec, parse_spec


class _Loader(yaml.SafeLoader):
    """YAML with the scalars of version 1.2: ``3e-4`` is a number, ``no`` and ``on`` are words, and a
    date stays text. A key that stands twice is refused and not silently the last."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key, _ in node.value:
            if key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key.value!r} stands twice", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


for _tag, _pattern, _first in (
    ("null", r"^(?:~|null|Null|NULL|)$", "~nN"),
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    ("int", r"^[-+]?[0-9]+$", "-+0123456789"),
    ("float", r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$", "-+.0123456789"),
    ("merge", r"^<<$", "<"),
):
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}",
        re.compile(_pattern),
        [*_first, *([""] if _tag == "null" else [])],
    )
# The constructors of YAML 1.1 would read 010 as octal and do not know 3e-4.
_Loader.add_constructor("tag:yaml.org,2002:int", lambda _, node: int(node.value))
_Loader.add_constructor("tag:yaml.org,2002:float", lambda _, node: float(node.value))


def read_spec(source: str) -> dict[str, Any]:
    """A spec out of a YAML or JSON file; ``-`` is stdin.

    Raises:
        InvalidSpec: it cannot be read or parsed (with line and column), or is no mapping.
    """
    name = "stdin" if source == "-" else source
    try:
        text = sys.stdin.read() if source == "-" else Path(source).read_text()
    except OSError as error:
        raise InvalidSpec(
            f"cannot read the spec {name}: {error.strerror}",
            hint="Name a YAML or JSON file, `-` for stdin, or give flags; see `gpuyard submit --help`.",
        ) from None
    except UnicodeDecodeError:
        raise InvalidSpec(f"the spec {name} is no text in UTF-8") from None
    data = _parse(text, name)
    if not isinstance(data, dict):
        raise InvalidSpec(f"the spec {name} is no mapping of fields but {_kind(data)}")
    return data


def _parse(text: str, name: str) -> Any:
    try:
        # JSON is tried first: not all of it is YAML (tabs), and it is much faster.
        return json.loads(text)
    except ValueError:
        pass
    try:
        return yaml.load(text, _Loader)  # noqa: S506 - a SafeLoader with fewer scalars
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise InvalidSpec(f"{name}{where}: {error.problem or error.context}") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise InvalidSpec(f"{name} is neither YAML nor JSON: {error}") from None


def _kind(data: Any) -> str:
    return {type(None): "empty", list: "a list", str: "text"}.get(type(data), "a number")


def put(spec: dict[str, Any], path: str, value: Any) -> None:
    """Set ``a.b.c`` in a spec, making what is missing on the way."""
    *way, last = path.split(".")
    here = spec
    for part in way:
        inner = here.get(part)
        if not isinstance(inner, dict):
            inner = here[part] = {}
        here = inner
    here[last] = value


def parse_setting(text: str) -> tuple[str, Any]:
    """``a.b=value`` of ``--set``; the value is read as YAML.

    Raises:
        InvalidSpec: there is no ``=``, or the value is no YAML.
    """
    path, equals, value = text.partition("=")
    if not equals or not all(path.split(".")):
        raise InvalidSpec(
            f"--set {text!r} is not of the form field=value",
            param="--set",
            hint="For instance --set hyperparameters.learning_rate=3e-4.",
        )
    return path, _parse(value, f"--set {path}")


def parse_devices(text: str | None) -> int | dict[str, int] | None:
    """``--devices``: a number, or the fewest and the most with a hyphen between.

    Raises:
        InvalidSpec: it is neither.
    """
    if text is None:
        return None
    numbers = text.split("-")
    if len(numbers) > 2 or not all(number.isdecimal() for number in numbers):
        raise InvalidSpec(
            f"--devices {text!r} is no number of devices",
            param="--devices",
            hint="For instance --devices 2, or --devices 2-8 for as many as are free.",
        )
    least, *most = map(int, numbers)
    return {"min": least, "max": most[0]} if most else least


def build_spec(
    base: Mapping[str, Any], flags: Mapping[str, Any], settings: Iterable[str]
) -> dict[str, Any]:
    """``base`` with ``flags`` (dotted field to value; None: not given) and then ``settings`` over it.

    ``kind`` is worked out from what is given where that leaves no doubt.
    """
    spec: dict[str, Any] = json.loads(json.dumps(base))
    for path, value in flags.items():
        if value is not None:
            put(spec, path, value)
    for text in settings:
        put(spec, *parse_setting(text))
    if "kind" not in spec:
        if "data" in spec or "hyperparameters" in spec:
            spec["kind"] = "train"
        elif "input" in spec or "rows" in spec:
            spec["kind"] = "infer"
    if spec.get("kind") == "train":
        spec.setdefault("task", "text-classification")
    return spec


def check(spec: Mapping[str, Any], source: str | None) -> None:
    """Validate, with the file named and the likely spelling in the hint.

    Raises:
        InvalidSpec: see ``parse_spec``.
    """
    try:
        parse_spec(spec)
    except InvalidSpec as error:
        hint = error.hint
        if "Did you mean" not in (hint or "") and (names := likely(spec.get("kind"), error.param)):
            _, also, rest = (hint or "").partition("Also wrong:")
            hint = f"{names} {also}{rest}".strip()
        if error.param == "kind" and "kind" not in spec:
            hint = "Give --train FILE to train, --input FILE to infer, a spec file, or --kind."
        place = f" (in {source})" if source else ""
        raise InvalidSpec(error.message + place, param=error.param, hint=hint) from None


def likely(kind: Any, param: str | None) -> str | None:
    """What a misspelt field was probably meant to be."""
    kinds: dict[Any, type[BaseModel]] = {"train": TrainSpec, "infer": InferSpec}
    model = kinds.get(kind)
    *way, last = (param or "").split(".")
    for part in way:
        model = _model_of(model, part)
    if model is None or not last or last in model.model_fields:
        return None
    prefix = ".".join([*way, ""]) if way else ""
    names = difflib.get_close_matches(last, model.model_fields, n=1)
    if names:
        return f"Did you mean {prefix}{names[0]}?"
    return f"Fields here: {', '.join(prefix + name for name in model.model_fields)}."


def _model_of(model: type[BaseModel] | None, field: str) -> type[BaseModel] | None:
    info = model.model_fields.get(field) if model is not None else None
    if info is None:
        return None
    for kind in (info.annotation, *get_args(info.annotation)):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
    return None
