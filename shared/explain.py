"""What pydantic found wrong, said to people: what a field must be, and what it was."""

from __future__ import annotations

from typing import Any

from pydantic_core import ErrorDetails

_WANTED = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "a string",
    "model": "an object",
    "dict": "an object",
    "tuple": "a list",
    "list": "a list",
}
_BOUNDS = {
    "greater_than_equal": ("at least", "ge"),
    "greater_than": ("above", "gt"),
    "less_than_equal": ("at most", "le"),
    "less_than": ("below", "lt"),
}
_SHOWN = 60


def explain(error: ErrorDetails, field: str) -> str:
    """The sentence for ``error``, with ``field`` as its subject.

    Examples:
        ``epochs must be at least 1, not 0``; ``model is required``.
    """
    kind, context = error["type"], error.get("ctx", {})
    was = f", not {describe(error['input'])}"
    if kind == "missing":
        return f"{field} is required"
    if kind == "value_error":
        return error["msg"].removeprefix("Value error, ")
    if kind in ("literal_error", "enum"):
        return f"{field} must be {context['expected']}{was}"
    if kind in _BOUNDS:
        word, key = _BOUNDS[kind]
        return f"{field} must be {word} {context[key]:g}{was}"
    wanted = _WANTED.get(kind.partition("_")[0])
    if wanted is not None and kind.endswith(("_type", "_parsing", "_from_float")):
        return f"{field} must be {wanted}{was}"
    return f"{field}: {error['msg']}"


def describe(value: Any) -> str:
    """A value as JSON's words have it, short enough for a message."""
    if value is None:
        return "null"
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list | tuple):
        return "a list"
    if isinstance(value, bool):
        return str(value).lower()
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
