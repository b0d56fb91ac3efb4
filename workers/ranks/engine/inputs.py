"""From a raw line of the input to a request, or to the error that this row gets.

Pure: no tokenizer, no torch. A bad row costs that row and never the job, so every way in which a
line can be wrong ends in a :class:`RowProblem` with a stable code.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from pydantic import ValidationError

from shared.explain import explain
from shared.rows import MAX_LINE_BYTES, REFUSED
from shared.schemas import why_unusable
from shared.specs import GENERATIVE, OF_A_ROW, Generation, InferSpec


class RowProblem(Exception):
    """What is wrong with one row. ``id`` is the row's own id where it could be read."""

    def __init__(self, code: str, message: str, *, id: Any = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.id = id


@dataclass(frozen=True, slots=True)
class Request:
    """A row that may be computed: exactly one of ``text``, ``messages``, ``words`` and ``documents`` is
    set."""

    row: int
    id: Any
    text: str | None = None
    messages: list[dict[str, str]] | None = None
    words: tuple[str, ...] | None = None
    completion: str | None = None
    """What follows ``text``, which then is its prompt."""
    query: str | None = None
    """What ``text`` or each of the ``documents`` is compared with."""
    documents: tuple[str, ...] | None = None
    generation: Generation | None = None
    """The row's own options; None: the job's."""
    own_seed: bool = False
    """The seed is the row's own, and its text the same wherever the row stands."""


def read_request(row: int, line: bytes, spec: InferSpec) -> Request:
    """Parse and check one line.

    Raises:
        RowProblem: line_too_long, invalid_utf8, invalid_json, invalid_row, missing_column,
            empty_text, invalid_messages, invalid_tokens, invalid_documents or invalid_generation; of
            a row that the submission could not read, what it said.
    """
    fields = _parse(line)
    if isinstance(refused := fields.get(REFUSED), dict):
        code, message = str(refused.get("code")), str(refused.get("message"))
        raise RowProblem(code, message, id=fields.get("id"))
    id = fields.get("id")
    if not _is_utf8(json.dumps(id, ensure_ascii=False)):
        raise RowProblem("invalid_utf8", "the row's id holds half of a surrogate pair")
    try:
        request = _request(row, id, fields, spec)
        if spec.task in GENERATIVE and isinstance(own := fields.get(OF_A_ROW), dict):
            request = _with_own_options(request, own, spec)
    except RowProblem as problem:
        problem.id = id
        raise
    return request


def _with_own_options(request: Request, own: dict[str, Any], spec: InferSpec) -> Request:
    own = {"json_schema" if name == "schema" else name: value for name, value in own.items()}
    try:
        options = Generation.model_validate({**spec.sampling.model_dump(exclude_unset=True), **own})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(map(str, first["loc"])) or OF_A_ROW
        raise RowProblem("invalid_generation", f"'{OF_A_ROW}': {explain(first, field)}") from None
    if options.json_schema is not None:
        problem = why_unusable(options.json_schema)
        if spec.task != "text-generation":
            problem = f"it applies to task 'text-generation' alone, not to '{spec.task}'"
        if problem is not None:
            raise RowProblem("invalid_generation", f"'{OF_A_ROW}': schema: {problem}")
    return replace(request, generation=options, own_seed="seed" in own)


def _parse(line: bytes) -> dict[str, Any]:
    if len(line) > MAX_LINE_BYTES:
        raise RowProblem(
            "line_too_long", f"the line has {len(line)} bytes; at most {MAX_LINE_BYTES} are read"
        )
    try:
        text = line.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RowProblem("invalid_utf8", f"byte {error.start} of the line is not UTF-8") from None
    try:
        fields = json.loads(text, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise RowProblem("invalid_json", f"{error.msg} at column {error.colno}") from None
    except RecursionError:
        raise RowProblem("invalid_json", "nested too deeply") from None
    except ValueError as error:  # NaN and Infinity, integers of thousands of digits
        raise RowProblem("invalid_json", str(error)) from None
    if not isinstance(fields, dict):
        raise RowProblem("invalid_row", f"a row must be an object, not {_kind(fields)}")
    return fields


def _request(row: int, id: Any, fields: dict[str, Any], spec: InferSpec) -> Request:
    if spec.task == "token-classification":
        return _tagging_request(row, id, fields, spec.text_column)
    if spec.task == "scoring":
        return _scoring_request(row, id, fields, spec.text_column)
    if spec.task == "reranking":
        return _reranking_request(row, id, fields, spec.text_column)
    if spec.task != "text-generation":
        return Request(row, id, text=_text(fields, spec.text_column or "text"))
    if spec.text_column is not None:
        if isinstance(fields.get(spec.text_column), list):
            return Request(row, id, messages=_messages(fields[spec.text_column], spec.text_column))
        return Request(row, id, text=_text(fields, spec.text_column))
    if "prompt" in fields and "messages" in fields:
        raise RowProblem("invalid_row", "the row has both 'prompt' and 'messages': keep one")
    if "messages" in fields:
        return Request(row, id, messages=_messages(fields["messages"], "messages"))
    if "prompt" not in fields:
        raise RowProblem("missing_column", f"no 'prompt' and no 'messages'; {_columns(fields)}")
    return Request(row, id, text=_text(fields, "prompt"))


def _tagging_request(row: int, id: Any, fields: dict[str, Any], asked: str | None) -> Request:
    """Words where the column is a list, else a text. With no column asked for, ``tokens`` goes before
    ``text``: rows of data sets often have both."""
    if asked is None and not {"tokens", "text"} & fields.keys():
        raise RowProblem("missing_column", f"no 'tokens' and no 'text'; {_columns(fields)}")
    column = asked or ("tokens" if "tokens" in fields else "text")
    value = fields.get(column)
    if isinstance(value, list) or (asked is None and column == "tokens"):
        return Request(row, id, words=_words(value, column))
    return Request(row, id, text=_text(fields, column))


def _scoring_request(row: int, id: Any, fields: dict[str, Any], asked: str | None) -> Request:
    if asked is None:
        named: list[str] = [n for n in ("messages", "completion", "text") if n in fields]
        if "prompt" in fields and "completion" not in fields:
            named.insert(0, "prompt")
        if len(named) > 1:
            both = f"'{named[0]}' and '{named[1]}'"
            raise RowProblem("invalid_row", f"the row has both {both}: keep one")
        if "completion" in fields or "prompt" in fields:
            prompt = _text(fields, "prompt", may_be_empty=True)
            return Request(row, id, text=prompt, completion=_text(fields, "completion"))
        if not named:
            what = "no 'text', no 'prompt' with 'completion' and no 'messages'"
            raise RowProblem("missing_column", f"{what}; {_columns(fields)}")
    column = asked or ("messages" if "messages" in fields else "text")
    value = fields.get(column)
    if not isinstance(value, list) and column != "messages":
        return Request(row, id, text=_text(fields, column))
    messages = _messages(value, column)
    if messages[-1]["role"] != "assistant" or not messages[-1]["content"].strip():
        raise RowProblem(
            "invalid_messages",
            f"'{column}' must end with what the assistant says: that is what is scored",
        )
    return Request(row, id, messages=messages)


def _reranking_request(row: int, id: Any, fields: dict[str, Any], asked: str | None) -> Request:
    query = _text(fields, "query")
    if asked is None and "documents" in fields and "text" in fields:
        raise RowProblem("invalid_row", "the row has both 'documents' and 'text': keep one")
    if asked is None and not {"documents", "text"} & fields.keys():
        raise RowProblem("missing_column", f"no 'documents' and no 'text'; {_columns(fields)}")
    column = asked or ("documents" if "documents" in fields else "text")
    value = fields.get(column)
    if isinstance(value, list) or (asked is None and column == "documents"):
        return Request(row, id, query=query, documents=_documents(value, column))
    return Request(row, id, query=query, text=_text(fields, column))


def _documents(value: Any, column: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not value:
        was = "an empty one" if value == [] else _kind(value)
        raise RowProblem(
            "invalid_documents", f"column '{column}' must be a list of texts, not {was}"
        )
    for i, text in enumerate(value):
        if not isinstance(text, str):
            raise RowProblem(
                "invalid_documents", f"'{column}'[{i}] must be a string, not {_kind(text)}"
            )
        if not text.strip():
            raise RowProblem("empty_text", f"'{column}'[{i}] is empty")
        if not _is_utf8(text):
            raise RowProblem("invalid_utf8", f"'{column}'[{i}] holds half of a surrogate pair")
    return tuple(value)


def _words(value: Any, column: str) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise RowProblem(
            "invalid_tokens",
            f"column '{column}' must be a list of words, not {_kind(value)}; a text goes into 'text'",
        )
    for i, word in enumerate(value):
        if not isinstance(word, str):
            raise RowProblem(
                "invalid_tokens", f"'{column}'[{i}] must be a string, not {_kind(word)}"
            )
        if not _is_utf8(word):
            raise RowProblem("invalid_utf8", f"'{column}'[{i}] holds half of a surrogate pair")
    if not any(word.strip() for word in value):
        raise RowProblem("empty_text", f"column '{column}' has no words")
    return tuple(value)


def _text(fields: dict[str, Any], column: str, *, may_be_empty: bool = False) -> str:
    if column not in fields:
        raise RowProblem("missing_column", f"no column '{column}'; {_columns(fields)}")
    value = fields[column]
    if not isinstance(value, str):
        raise RowProblem(
            "missing_column", f"column '{column}' must be a string, not {_kind(value)}"
        )
    if not value.strip() and not may_be_empty:
        raise RowProblem("empty_text", f"column '{column}' is empty")
    if not _is_utf8(value):
        raise RowProblem("invalid_utf8", f"column '{column}' holds half of a surrogate pair")
    return value


def _messages(value: Any, column: str) -> list[dict[str, str]]:
    def bad(why: str) -> NoReturn:
        raise RowProblem("invalid_messages", f"'{column}' {why}")

    if not isinstance(value, list) or not value:
        bad("must be a list of at least one {role, content}")
    messages: list[dict[str, str]] = []
    for i, item in enumerate(value):
        if not isinstance(item, dict):
            bad(f"[{i}] must be an object with role and content, not {_kind(item)}")
        for key in ("role", "content"):
            if not isinstance(item.get(key), str):
                bad(f"[{i}].{key} must be a string, not {_kind(item.get(key))}")
            if not _is_utf8(item[key]):
                raise RowProblem(
                    "invalid_utf8", f"'{column}'[{i}].{key} holds half of a surrogate pair"
                )
        messages.append({"role": item["role"], "content": item["content"]})
    if not any(message["content"].strip() for message in messages):
        raise RowProblem("empty_text", f"every content of '{column}' is empty")
    return messages


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _is_utf8(text: str) -> bool:
    """False for lone surrogates, which ``\\ud800`` in JSON makes and no encoder takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _columns(fields: dict[str, Any]) -> str:
    names = sorted(json.dumps(name)[:40] for name in fields)
    shown = ", ".join(names[:8]) + (", …" if len(names) > 8 else "")
    return f"the row has {shown}" if names else "the row has no columns"


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    if value is None:
        return "null"
    return names.get(type(value), "a number")
