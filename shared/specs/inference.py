"""The spec of a batch job."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, Self

from pydantic import AliasChoices, BeforeValidator, Field, WithJsonSchema, model_validator

from shared.specs.common import (
    GENERATIVE,
    MODEL,
    MODELS,
    BatchResources,
    JobFields,
    Precision,
    Strict,
    Task,
)
from shared.specs.data import DataFormat


def _as_text(value: Any) -> str:
    try:
        found = json.loads(value) if isinstance(value, str) else value
        if isinstance(found, dict):
            return json.dumps(found, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    except (ValueError, RecursionError):
        pass
    raise ValueError("schema must be an object, a JSON Schema")


# As text: Postgres does not keep the order of an object's fields, and the output has that of the schema's.
JsonSchema = Annotated[str, BeforeValidator(_as_text), WithJsonSchema({"type": "object"})]


class Generation(Strict):
    """Sampling options; ``temperature`` 0 is greedy. A row may have options of its own: see
    :data:`OF_A_ROW`."""

    max_new_tokens: int = Field(128, ge=1, le=1_000_000)
    min_new_tokens: int = Field(0, ge=0, le=1_000_000, description="No end before so many.")
    temperature: float = Field(0.0, ge=0, le=10)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int | None = Field(None, ge=1)
    repetition_penalty: float = Field(
        1.0,
        gt=0,
        le=10,
        description="Above 1 it makes tokens less likely that the text or its prompt has already.",
    )
    seed: int = Field(0, ge=0, lt=2**63)
    n: int = Field(1, ge=1, le=128, description="Texts for each row.")
    stop: tuple[str, ...] = Field((), max_length=16, description="Text that ends a generation.")
    stop_tokens: tuple[int, ...] = Field(
        (),
        max_length=64,
        description="Ids of tokens that end a generation, beside the model's own.",
    )
    logprobs: int | None = Field(
        None,
        ge=0,
        le=20,
        description="The log-probability of each token, and of so many that were likelier or next.",
    )

    json_schema: JsonSchema | None = Field(
        None,
        max_length=200_000,
        # BaseModel has a `schema` of its own. A spec that was stored has the field's name.
        validation_alias=AliasChoices("schema", "json_schema"),
        serialization_alias="schema",
        description="text-generation: the text is JSON that satisfies this JSON Schema, where it comes to "
        "its end within max_new_tokens.",
    )

    @model_validator(mode="after")
    def _no_contradiction(self) -> Self:
        if self.temperature == 0 and (self.top_p < 1 or self.top_k is not None):
            raise ValueError(
                "top_p and top_k choose among samples and temperature 0 is greedy: "
                "set a temperature above 0 or drop them"
            )
        if self.temperature == 0 and self.n > 1:
            raise ValueError(
                f"temperature 0 is greedy: all n = {self.n} texts would be the same; "
                "set a temperature above 0"
            )
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens ({self.min_new_tokens}) is over max_new_tokens "
                f"({self.max_new_tokens})"
            )
        if any(not text for text in self.stop):
            raise ValueError("an empty stop string would end every generation at once")
        if any(token < 0 for token in self.stop_tokens):
            raise ValueError("stop_tokens are ids of tokens: 0 and above")
        if self.json_schema is not None and (self.stop or self.stop_tokens or self.min_new_tokens):
            raise ValueError(
                "the schema says where the text ends: drop stop, stop_tokens and min_new_tokens"
            )
        return self


OF_A_ROW = "generation"
"""The column in which a row says how its own text is generated: an object with options of ``Generation``,
each in place of the job's. A row with a ``seed`` of its own gets the same text in any file."""


ROW_FORMS: dict[str, tuple[tuple[str, ...], ...]] = {
    "text-generation": (("prompt",), ("messages",)),
    "token-classification": (("tokens",), ("text",)),
    "scoring": (("text",), ("prompt", "completion"), ("messages",)),
    "reranking": (("query", "documents"), ("query", "text")),
}
"""The forms of a row by task, where it is not one ``text``. A row has a form if it has its last column."""


class Embedding(Strict):
    """How the vectors of a text's tokens become one."""

    pooling: Literal["auto", "mean", "cls"] = Field(
        "auto", description="auto: as the model's folder says (1_Pooling), else the mean."
    )
    normalize: bool = Field(True, description="To length 1, so that a dot product is the cosine.")
    encoding: Literal["float", "base64"] = Field(
        "float",
        description="float: a list of numbers. base64: the bytes of its float32 numbers, little-endian; "
        "a quarter of the size or less, and exact.",
    )


OPTIONS_OF_A_TASK: dict[str, str] = {
    "token_logprobs": "scoring",
    "end_of_text": "scoring",
    "aggregation": "token-classification",
    "top_n": "reranking",
}
"""Options that one task of batch jobs alone has."""


NEVER_SPLIT: dict[Task, str] = {
    "text-generation": "the end of a prompt would be continued without its beginning",
    "text2text": "what a text asks for at its beginning would be missing in all windows but the first",
    "fill-mask": "a mask would lose the text around it that decides what fills it",
    "scoring": "how likely a token is depends on all of the text before it",
    "reranking": "the scores of a document's parts are not the score of the document",
}
"""Tasks of which a row is computed as one, and why."""


class InferSpec(JobFields):
    """Run a model over the rows of a file (or inline rows) and keep every answer."""

    kind: Literal["infer"] = "infer"
    task: Task
    model: str = Field(min_length=1, max_length=1024, description=MODEL, examples=MODELS)
    input: str | None = Field(
        None,
        min_length=1,
        max_length=4096,
        description="`file_…` (uploaded) or a path: JSONL, CSV, TSV, Parquet or lines of plain text.",
    )
    format: Literal["auto"] | DataFormat = Field(
        "auto",
        description="auto: by the suffix of the file's name (.csv, .tsv, .parquet, .txt), else JSONL.",
    )
    rows: tuple[dict[str, Any], ...] | None = Field(None, min_length=1, max_length=10_000)
    text_column: str | None = Field(
        None,
        description="Where the text is. Default: `text`; `prompt` or `messages` for text-generation; "
        "`tokens` (words) or `text` for token-classification; `documents` or `text` for reranking.",
    )
    generation: Generation | None = None
    embedding: Embedding | None = None
    top_k_labels: int = Field(
        1, ge=1, le=1000, description="Labels a text or tokens a mask gets, best first."
    )
    token_logprobs: bool = Field(False, description="scoring: also tell of each scored token.")
    end_of_text: bool = Field(
        False,
        description="scoring: the end of text behind a text or a completion counts as well, as "
        "training counts it.",
    )
    aggregation: Literal["none", "first", "average", "max"] = Field(
        "first",
        description="token-classification: how the tokens of a word decide its tag: the first; the mean "
        "of their probabilities; the surest one. none: no entities are put together, each token of a "
        "text (or word of a list) has its own.",
    )
    top_n: int | None = Field(
        None, ge=1, le=1_000_000, description="reranking: so many documents are in the ranking."
    )
    batch_size: int = Field(128, ge=1, le=4096, description="Rows computed together, at most.")
    shard_rows: int = Field(64, ge=1, le=100_000, description="Rows committed together.")
    max_length: int | None = Field(None, ge=4, description="Tokens of input a row may have.")
    too_long: Literal["error", "truncate", "split"] = Field(
        "error",
        description="What becomes of a row with more tokens than the model or max_length allows. split: it "
        "is computed in windows, and its answer put together; for text-classification, "
        "token-classification, embeddings and summarization.",
    )
    max_errors: int | None = Field(
        None, ge=0, description="Fails the job when more rows than this fail; none: never."
    )
    precision: Precision = Field(
        "auto",
        description="auto: bf16 where the device has it, else fp32. int8: linear layers on CPUs, several times "
        "as fast, and not quite the same answers.",
    )
    engine: Literal["auto", "gpuyard", "vllm"] = Field(
        "auto",
        description="auto: vLLM for text-generation on CUDA devices whose worker has it, else gpuyard's own.",
    )
    resources: BatchResources = BatchResources()

    @model_validator(mode="after")
    def _no_contradiction(self) -> Self:
        if (self.input is None) == (self.rows is None):
            raise ValueError("give exactly one of input (a file) and rows (inline)")
        if self.rows is not None and self.format != "auto":
            raise ValueError(
                "format is how a file is read, and rows are given as they are: drop it"
            )
        if self.generation is not None and self.task not in GENERATIVE:
            raise ValueError(f"generation options do not apply to task '{self.task}'")
        if self.sampling.json_schema is not None and self.task != "text-generation":
            raise ValueError(
                f"generation.schema applies to task 'text-generation' alone, not to '{self.task}'"
            )
        if self.too_long == "split" and (why := NEVER_SPLIT.get(self.task)) is not None:
            raise ValueError(
                f"too_long 'split' does not apply to task '{self.task}': {why}; use error or truncate"
            )
        if self.embedding is not None and self.task != "embeddings":
            raise ValueError(f"embedding options do not apply to task '{self.task}'")
        if self.precision == "int8" and self.resources.accelerator == "cuda":
            raise ValueError(
                "precision int8 is for CPUs and resources.accelerator is cuda: drop one of the two"
            )
        if self.engine == "vllm":
            self._refuse_what_vllm_is_not_given()
        for name, task in OPTIONS_OF_A_TASK.items():
            # Not what is set: a spec that was stored has every field set.
            if self.task != task and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} applies to task '{task}' alone, not to '{self.task}'")
        return self

    def _refuse_what_vllm_is_not_given(self) -> None:
        if self.task != "text-generation":
            raise ValueError(f"engine vllm is for task 'text-generation', not for '{self.task}'")
        if self.precision == "int8":
            raise ValueError("precision int8 is gpuyard's own: drop engine, or choose another")
        if self.sampling.json_schema is not None:
            raise ValueError("engine vllm is given no schema: drop engine, or choose gpuyard")

    @property
    def forms(self) -> tuple[tuple[str, ...], ...]:
        """The forms that a row may have, each by the columns that it reads; see :data:`ROW_FORMS`."""
        if self.text_column is not None:
            asked = ("query",) if self.task == "reranking" else ()
            return ((*asked, self.text_column),)
        return ROW_FORMS.get(self.task, (("text",),))

    @property
    def sampling(self) -> Generation:
        return self.generation or Generation()
