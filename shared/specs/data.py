"""What a training starts from: its data, and the architecture of a model from scratch."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, JsonValue, Tag, model_validator

from shared.specs.common import SEQ2SEQ, Strict

_BYTES_AND_SPECIAL = 258


class Architecture(Strict):
    """A model from scratch: weights from the seed, and a tokenizer trained on the training data."""

    type: Literal["bert", "gpt2", "llama", "t5", "bart"]
    hidden: int = Field(256, ge=8, le=65_536, description="Size of a token's vector.")
    layers: int = Field(
        4, ge=1, le=1024, description="T5, BART: of the encoder, and of the decoder."
    )
    heads: int = Field(4, ge=1, le=1024)
    intermediate: int | None = Field(
        None,
        ge=8,
        le=1_000_000,
        description="Inner size of the MLP; default 4 × hidden (llama 8/3).",
    )
    positions: int = Field(512, ge=8, le=1_000_000, description="Tokens the model can see.")
    vocabulary: int = Field(
        8192, ge=64, le=1_000_000, description="Tokens at most; small data make fewer."
    )

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.hidden % (2 * self.heads):
            raise ValueError(
                f"hidden {self.hidden} must be a multiple of 2 × heads ({2 * self.heads})"
            )
        if self.type != "bert" and self.vocabulary < _BYTES_AND_SPECIAL:
            raise ValueError(
                f"vocabulary must be at least {_BYTES_AND_SPECIAL}: every byte is a token of {self.type}"
            )
        return self

    @property
    def inner(self) -> int:
        """The MLP's inner size."""
        if self.intermediate is not None:
            return self.intermediate
        # A gated MLP has three matrices where others have two (Shazeer, 2020): 8/3, in steps of 8.
        return -(-8 * self.hidden // 24) * 8 if self.type == "llama" else 4 * self.hidden


ARCHITECTURE_TASKS: dict[str, frozenset[str]] = {
    "bert": frozenset({"fill-mask", "text-classification", "token-classification", "embeddings"}),
    "gpt2": frozenset({"text-generation"}),
    "llama": frozenset({"text-generation"}),
    "t5": SEQ2SEQ,
    "bart": SEQ2SEQ,
}


class Columns(Strict):
    """Where each part of an example is. Only those that the task reads may be named."""

    text: str = Field(
        "text", description="Classification, text2text, fill-mask, embeddings, plain text."
    )
    label: str = Field(
        "label", description="A name or whole number; a list for multi-label; a number."
    )
    tokens: str = Field("tokens", description="token-classification: the words.")
    tags: str = Field(
        "tags", description="token-classification: a tag a word, such as B-PER or NOUN."
    )
    target: str = Field("target", description="text2text: the text to be written.")
    positive: str = Field("positive", description="embeddings: a text that belongs to `text`.")
    prompt: str = Field("prompt", description="text-generation: what is given; not learned.")
    completion: str = Field("completion", description="text-generation: what is learned.")
    messages: str = Field(
        "messages", description="text-generation: a chat; assistant turns are learned."
    )
    chosen: str = Field("chosen", description="preference: the answer that is to be likelier.")
    rejected: str = Field(
        "rejected", description="preference: the answer that is to be less likely."
    )


TASK_COLUMNS: dict[str, tuple[str, ...]] = {
    "text-classification": ("text", "label"),
    "token-classification": ("tokens", "tags"),
    "text2text": ("text", "target"),
    "summarization": ("text", "target"),
    "text-generation": ("messages", "prompt", "completion", "text"),
    "fill-mask": ("text",),
    "embeddings": ("text", "positive"),
}
"""The columns that each task reads; for text-generation the first that a row has decides its form."""
PREFERENCE_COLUMNS: tuple[str, ...] = ("messages", "prompt", "chosen", "rejected")
"""In place of those of text-generation, with ``preference``: a chat, or else a prompt, and two answers."""


TASK_OPTIONS: dict[str, str] = {
    "packing": "text-generation",
    "mask_probability": "fill-mask",
    "contrastive_temperature": "embeddings",
}
"""Hyperparameters that one task alone has."""
PACKED_LENGTH = 2048
"""Tokens of a block of packed texts at most, where ``max_length`` does not say."""
DataFormat = Literal["jsonl", "csv", "tsv", "parquet", "text"]
PLAIN_TEXT_TASKS: frozenset[str] = frozenset({"text-generation", "fill-mask"})


class InstalledDataset(Strict):
    """A map-style dataset (`torch.utils.data.Dataset`) whose items are rows, made by a package that is
    installed where the workers run and declares it as an entry point of the group `gpuyard.datasets`."""

    dataset: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$", description="The entry point's name."
    )
    options: dict[str, JsonValue] = Field(
        {}, description="Keyword arguments of what the entry point names."
    )


def _kind_of_source(value: Any) -> str:
    return "[dataset]" if isinstance(value, dict | InstalledDataset) else "[file]"


# Tags, or an error would be told for each of the two; in brackets, as they are no fields.
Source = Annotated[
    Annotated[str, Field(min_length=1, max_length=4096), Tag("[file]")]
    | Annotated[InstalledDataset, Tag("[dataset]")],
    Discriminator(_kind_of_source),
]


class TrainData(Strict):
    """JSONL (one object a line), CSV or TSV with a header line, Parquet, or lines of plain text. A
    reference is `file_…` (uploaded) or a path. In place of a file stands also `{dataset, options}`."""

    train: Source
    validation: Source | None = None
    validation_split: float | None = Field(None, gt=0, lt=1)
    format: Literal["auto"] | DataFormat = Field(
        "auto",
        description="auto: by the suffix of each file's name (.csv, .tsv, .parquet, .txt), else "
        "JSONL. text, for text-generation and fill-mask: each line is a row. In CSV, lists (labels, "
        "tokens, tags, messages) are JSON; tokens and tags may also be words with spaces between.",
    )
    columns: Columns = Columns()

    @model_validator(mode="after")
    def _one_validation_source(self) -> Self:
        if self.validation is not None and self.validation_split is not None:
            raise ValueError("validation and validation_split exclude each other: keep one")
        if self.format != "auto" and not any(
            isinstance(source, str) for source in (self.train, self.validation)
        ):
            raise ValueError("data.format is how a file is read, and a dataset has rows: drop it")
        return self
