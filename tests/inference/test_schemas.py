"""Text under a JSON schema parses and validates, whatever a model of random weights would rather write."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest

from shared.schemas import why_unusable
from shared.specs import Generation

from .conftest import text_of

PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["red", "grün", 7, None]}, "maxItems": 3},
        "size": {"anyOf": [{"const": "all"}, {"type": "boolean"}]},
    },
    "required": ["name", "age", "tags", "size"],
    "additionalProperties": False,
}
PAIR: dict[str, Any] = {
    "type": "array",
    "prefixItems": [{"type": "boolean"}, {"$ref": "#/$defs/colour"}],
    "items": False,
    "minItems": 2,
    "$defs": {"colour": {"enum": ["red", "blue"]}},
}
SAMPLED = {"max_new_tokens": 120, "temperature": 1.0, "seed": 5}


def valid(text: str, schema: dict[str, Any]) -> bool:
    jsonschema.validate(json.loads(text), schema)
    return True


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_sampled_text_satisfies_its_schema(engine, request, kind):
    model = request.getfixturevalue(kind)
    limit = {"max_new_tokens": 100 if kind == "gpt2" else 120}
    rows = [{"prompt": text_of(1 + i % 5, i)} for i in range(24)]
    options = {**SAMPLED, **limit, "schema": PERSON}
    outcome = engine.run(model, rows, batch_size=7, generation=options)
    assert outcome.codes == [None] * 24
    ended = [r["output"] for r in outcome.results if r["output"]["finish_reason"] == "stop"]
    assert len(ended) > 12 and all(valid(output["text"], PERSON) for output in ended)
    assert len({output["text"] for output in ended}) == len(ended)
    for row in outcome.results:
        if row["output"]["finish_reason"] == "length":
            assert row["usage"]["output_tokens"] == limit["max_new_tokens"]
    # The same in any batch.
    alone = engine.run(model, rows[:5], batch_size=1, generation=options)
    assert alone.texts == outcome.texts[:5]


def test_a_text_that_is_not_finished_says_so(engine, llama):
    options = {"max_new_tokens": 4, "temperature": 1.0, "schema": PERSON}
    outcome = engine.run(llama, [{"prompt": "the cat"}], generation=options)
    assert outcome.results[0]["output"]["finish_reason"] == "length"
    assert outcome.texts[0].startswith('{"')


def test_rows_with_and_without_schemas_share_passes(engine, llama):
    prompts = [text_of(2 + i % 5, i) for i in range(12)]
    plain = engine.run(llama, [{"prompt": p} for p in prompts], generation={"max_new_tokens": 24})
    rows: list[dict[str, Any]] = [{"prompt": p} for p in prompts]
    for i, row in enumerate(rows):
        if i % 3:
            row["generation"] = {"schema": (PERSON, PAIR)[i % 2], "max_new_tokens": 150}
    mixed = engine.run(llama, rows, batch_size=12, generation={"max_new_tokens": 24})
    for i, (row, free) in enumerate(zip(mixed.results, plain.results, strict=True)):
        if i % 3 == 0:
            assert row["output"] == free["output"]
        elif i % 2:
            # Greedy: nothing but the schema ends it.
            assert row["output"]["finish_reason"] == "stop" and valid(row["output"]["text"], PAIR)
    # A row's own goes before the job's, and null is none.
    own = [
        {"prompt": prompts[0], "generation": {"schema": PAIR}},
        {"prompt": prompts[0], "generation": {"schema": None}},
        {"prompt": prompts[0]},
    ]
    outcome = engine.run(llama, own, generation={"max_new_tokens": 24, "schema": {"const": "yes"}})
    assert valid(outcome.texts[0], PAIR) and outcome.texts[2] == '"yes"'
    assert outcome.texts[1] == plain.texts[0]


def test_several_texts_and_likelihoods(engine, llama):
    options = {**SAMPLED, "schema": PAIR, "n": 6, "logprobs": 0}
    output = engine.run(llama, [{"prompt": "the cat"}], generation=options).results[0]["output"]
    assert len(output["choices"]) == 6
    for choice in output["choices"]:
        assert valid(choice["text"], PAIR) and choice["finish_reason"] == "stop"
        assert "".join(entry["token"] for entry in choice["logprobs"]) == choice["text"]


UNUSABLE: list[tuple[dict[str, Any], str]] = [
    ({"type": "wat"}, "wat"),
    ({"enum": []}, "Unsatisfiable"),
    ({"type": "integer", "minimum": 5, "maximum": 1}, "minimum"),
    ({"type": "string", "pattern": "(?=a)"}, "look-around"),
    ({"$ref": "#/nope"}, "nope"),
    ({"$ref": "https://example.org/schema"}, "example.org"),
    ({"not": {"type": "string"}}, "not"),
    ({"type": "array", "uniqueItems": True}, "uniqueItems"),
]


def test_schemas_that_cannot_be_used_are_their_rows_errors(engine, llama):
    rows = [{"prompt": "a", "generation": {"schema": schema}} for schema, _ in UNUSABLE]
    rows.append({"prompt": "a", "generation": {"schema": "text"}})
    rows.append({"prompt": "a", "generation": {"schema": PAIR, "stop": ["x"]}})
    rows.append({"prompt": "a", "generation": {"schema": {"const": 1}}})
    outcome = engine.run(llama, rows, generation={"max_new_tokens": 9})
    assert outcome.codes == ["invalid_generation"] * (len(UNUSABLE) + 2) + [None]
    for (_, says), row in zip(UNUSABLE, outcome.results, strict=False):
        assert says in row["error"]["message"], row
    assert "must be an object" in outcome.results[-3]["error"]["message"]
    assert "drop stop" in outcome.results[-2]["error"]["message"]
    assert outcome.results[-1]["output"]["text"] == "1"


def test_what_is_said_of_schemas():
    for schema, says in UNUSABLE:
        assert says in (why_unusable(json.dumps(schema)) or "")
    assert not any(why_unusable(json.dumps(schema)) for schema in ({}, PERSON, PAIR))
    assert why_unusable("[") and why_unusable("[]")
    # Kept as text, in its order, also through a store that keeps none.
    given = Generation.model_validate({"schema": {"b": 1, "a": "ü"}})
    assert given.json_schema == '{"b":1,"a":"ü"}'
    assert Generation.model_validate(given.model_dump(mode="json")) == given
