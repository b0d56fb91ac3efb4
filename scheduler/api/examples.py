"""Bodies that the documentation shows; a test holds them to the types."""

from __future__ import annotations

from typing import Any

from shared.specs import InferSpec, TrainSpec, parse_spec
from shared.sweeps import SweepSpec

TRAIN: dict[str, Any] = {
    "kind": "train",
    "task": "text-classification",
    "name": "topics",
    "model": "minilm",
    "data": {"train": "file_01JD2V5N0W8R4QK7T9Y3ZB6XEM", "validation_split": 0.1},
    "hyperparameters": {"epochs": 3, "batch_size": 32, "learning_rate": 5e-5},
    "resources": {"devices": 2},
}
CLASSIFY: dict[str, Any] = {
    "kind": "infer",
    "task": "text-classification",
    "model": "job:job_01JD2V5N0W8R4QK7T9Y3ZB6XEM",
    "input": "file_01JD2V5N0W8R4QK7T9Y3ZB6XEM",
}
GENERATE: dict[str, Any] = {
    "kind": "infer",
    "task": "text-generation",
    "model": "smollm2",
    "rows": [{"prompt": "The capital of France is"}],
    "generation": {"max_new_tokens": 20},
}
TAG: dict[str, Any] = {
    "kind": "infer",
    "task": "token-classification",
    "model": "job:job_01JD2V5N0W8R4QK7T9Y3ZB6XEM",
    "rows": [{"tokens": ["Angela", "visited", "Paris"]}, {"text": "Angela visited Paris."}],
}
FILL: dict[str, Any] = {
    "kind": "infer",
    "task": "fill-mask",
    "model": "roberta",
    "rows": [{"text": "The capital of France is [MASK]."}],
    "top_k_labels": 5,
}
EMBED: dict[str, Any] = {
    "kind": "infer",
    "task": "embeddings",
    "model": "minilm",
    "input": "file_01JD2V5N0W8R4QK7T9Y3ZB6XEM",
    "embedding": {"pooling": "mean"},
    "too_long": "truncate",
}
SCORE: dict[str, Any] = {
    "kind": "infer",
    "task": "scoring",
    "model": "smollm2",
    "rows": [
        {"prompt": "The capital of France is", "completion": " Paris."},
        {"prompt": "The capital of France is", "completion": " Rome."},
    ],
    "token_logprobs": True,
}
RERANK: dict[str, Any] = {
    "kind": "infer",
    "task": "reranking",
    "model": "cross-encoder",
    "rows": [
        {"query": "capital of France", "documents": ["Rome lies on the Tiber.", "Paris it is."]}
    ],
    "top_n": 1,
}
SUMMARIZE: dict[str, Any] = {
    "kind": "infer",
    "task": "summarization",
    "model": "bart",
    "input": "file_01JD2V5N0W8R4QK7T9Y3ZB6XEM",
    "text_column": "article",
    "generation": {"max_new_tokens": 80},
}
JOB: dict[str, Any] = {
    "id": "job_01JD2V5N0W8R4QK7T9Y3ZB6XEM",
    "kind": "train",
    "task": "text-classification",
    "name": "topics",
    "model": "minilm",
    "state": "running",
    "priority": 0,
    "waiting_reason": None,
    "progress": {
        "step": 120,
        "total_steps": 330,
        "epoch": 1.09,
        "loss": 0.71,
        "learning_rate": 3.5e-5,
        "examples_per_second": 96.0,
        "tokens_per_second": 2300.0,
        "grad_norm": 1.84,
        "memory_bytes": 812_384_256,
        "eta_seconds": 70.0,
        "attempt": 1,
    },
    "failure": None,
    "summary": None,
    "retry_of": None,
    "created_at": "2026-01-05T09:29:55Z",
    "started_at": "2026-01-05T09:30:00Z",
    "finished_at": None,
    "spec": parse_spec(TRAIN).model_dump(mode="json"),
    "requirements": {
        "devices": 2,
        "accelerator": "auto",
        "memory_bytes": 1_073_741_824,
        "memory_is_estimate": True,
        "memory_from": "measured",
        "compute_capability": 0,
        "features": [],
    },
    "attempts": [
        {
            "id": "att_01JD2V5P3C6M8X1F0S5HA9KRTW",
            "number": 1,
            "token": 17,
            "state": "running",
            "world_size": 2,
            "ranks": [
                {"rank": 0, "device_id": "gpu0@host", "state": "held"},
                {"rank": 1, "device_id": "gpu1@host", "state": "held"},
            ],
            "failure": None,
            "created_at": "2026-01-05T09:29:56Z",
            "started_at": "2026-01-05T09:30:00Z",
            "finished_at": None,
        }
    ],
    "rows_total": None,
    "rows_done": None,
    "row_errors": None,
    "input_tokens": None,
    "output_tokens": None,
    "device_seconds": 0.0,
}
JOB_ANSWER: dict[str, Any] = {"content": {"application/json": {"example": JOB}}}
JOB_BODY: dict[str, Any] = {
    "required": True,
    "content": {
        "application/json": {
            "schema": {
                "oneOf": [
                    {"$ref": "#/components/schemas/TrainSpec"},
                    {"$ref": "#/components/schemas/InferSpec"},
                ],
                "discriminator": {"propertyName": "kind"},
            },
            "examples": {
                "train": {"summary": "Fine-tune a classifier with DDP", "value": TRAIN},
                "classify": {"summary": "Classify with the model just made", "value": CLASSIFY},
                "generate": {"summary": "Generate from a few prompts", "value": GENERATE},
                "tag": {"summary": "Find names in words and in texts", "value": TAG},
                "fill": {"summary": "Fill masks", "value": FILL},
                "embed": {"summary": "A vector for each text", "value": EMBED},
                "score": {"summary": "How likely a model finds a text", "value": SCORE},
                "rerank": {"summary": "Documents by how well they answer", "value": RERANK},
                "summarize": {"summary": "Summarize a column of a file", "value": SUMMARIZE},
            },
        }
    },
}
SWEEP = {
    "name": "which rate",
    "spec": TRAIN,
    "parameters": {"hyperparameters.learning_rate": [1e-4, 3e-4], "hyperparameters.seed": [1, 2]},
}
SWEEP_BODY: dict[str, Any] = {
    "required": True,
    "content": {
        "application/json": {
            "schema": {"$ref": "#/components/schemas/SweepSpec"},
            "examples": {"grid": {"summary": "Two rates, two seeds each", "value": SWEEP}},
        }
    },
}
FILE_BODY: dict[str, Any] = {
    "required": True,
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": ["file"],
                "properties": {"file": {"type": "string", "format": "binary"}},
            }
        },
        "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
    },
}
EVENT_STREAM = (
    "id: 17\nevent: event\n"
    'data: {"id":17,"type":"running","message":"attempt 1 runs","attempt":1,"data":{},'
    '"at":"2026-01-05T09:30:00Z"}\n\n'
    'event: end\ndata: {"state":"succeeded"}\n\n'
)


def spec_schemas() -> dict[str, Any]:
    """The JSON schemas of the specs, as components of the OpenAPI document."""
    schemas: dict[str, Any] = {}
    for model in (TrainSpec, InferSpec, SweepSpec):
        schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas |= schema.pop("$defs", {})
        schemas[model.__name__] = schema
    return schemas
