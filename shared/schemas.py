"""JSON schemas that generated text is held to, as far as llguidance can hold text to them.

Submission asks here about the schema of a job, an engine about those of rows. A schema is the text of one.
"""

from __future__ import annotations

from functools import lru_cache

from llguidance import LLMatcher


def grammar_of(schema: str) -> str:
    """The grammar of the texts that a schema allows.

    Raises:
        ValueError: it is no JSON object. A grammar may be wrong all the same: see :func:`why_unusable`.
    """
    return LLMatcher.grammar_from_json_schema(
        schema,
        # White space as `json.dumps` has it. With any amount allowed, a model could write nothing else.
        defaults={"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "},
    )


@lru_cache(maxsize=256)
def why_unusable(schema: str) -> str | None:
    """None, or why no text can be held to this schema: it is none, nothing satisfies it, or it asks for
    what cannot be seen to token by token (look-around in a pattern, ``not``, ``uniqueItems``, a
    reference to elsewhere)."""
    try:
        problem = LLMatcher.validate_grammar(grammar_of(schema))
    except ValueError as error:
        problem = str(error)
    if not problem or problem.startswith("WARNING"):
        return None
    return " ".join(problem.split())[:300]
