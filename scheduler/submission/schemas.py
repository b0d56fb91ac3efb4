"""The JSON schema that a batch job's texts are to be held to."""

from __future__ import annotations

from shared.errors import InvalidSpec
from shared.schemas import why_unusable
from shared.specs import InferSpec


def require_usable_schema(spec: InferSpec) -> None:
    """Raises InvalidSpec for a schema that no text can be held to."""
    if (schema := spec.sampling.json_schema) is None:
        return
    if (problem := why_unusable(schema)) is not None:
        raise InvalidSpec(
            f"generation.schema cannot be used: {problem}",
            param="generation.schema",
            hint="Most of JSON Schema can: types, properties, required, enum, const, anyOf, items, minimum "
            "and maximum, lengths, pattern, format, $ref within the schema.",
        )
