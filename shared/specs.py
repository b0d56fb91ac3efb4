"""What a user asks for: job specs as data, never code.

A spec is validated whole before anything is stored; unknown fields are refused, so that a typo
never becomes a silent default. Everything here is pure: whether a model or a file exists is
checked by ``scheduler/submission``.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from shared.errors import InvalidSpec
from shared.explain import describe, explain


class Strict(BaseModel):
    """Refuses unknown fields. A number may come as a string: YAML reads ``1e-4`` as one."""

    model_config = ConfigDict(extra="forbid", frozen=True)


Accelerator = Literal["auto", "cpu", "cuda"]
Feature = Literal["bf16", "fp8"]
Precision = Literal["auto", "fp32", "bf16"]
Task = Literal[
    "text-classification",
    "token-classification",
    "text2text",
    "summarization",
    "text-generation",
    "fill-mask",
    "embeddings",
]
"""As Transformers names them. ``summarization`` is ``text2text`` by the name its users look for."""
SEQ2SEQ: frozenset[str] = frozenset({"text2text", "summarization"})
GENERATIVE: frozenset[str] = SEQ2SEQ | {"text-generation"}


class Resources(Strict):
    """What a job *needs*; placement takes the least capable devices that have it.

    Left empty, ``memory_gb`` comes from the footprint estimate of the model.
    """

    devices: int = Field(1, ge=1, le=1024, description="World size: one rank per device.")
    accelerator: Accelerator = Field(
        "auto", description="auto: CUDA devices where the fleet has any that fit, else CPU slots."
    )
    memory_gb: float | None = Field(None, gt=0, le=10_000, description="Memory per device, GiB.")
    min_compute_capability: float | None = Field(
        None, ge=1.0, le=99.0, description="For instance 8.0 for Ampere and newer."
    )
    features: tuple[Feature, ...] = Field((), description="What the device must support.")

    @model_validator(mode="after")
    def _no_contradiction(self) -> Self:
        if self.accelerator == "cpu" and self.min_compute_capability is not None:
            raise ValueError("accelerator 'cpu' has no compute capability: drop one of the two")
        return self


class Retry(Strict):
    """How often a job is tried again after failures that are not the user's."""

    max_attempts: int = Field(4, ge=1, le=100)
    backoff_seconds: float = Field(2.0, ge=0, le=3600, description="Doubles with every failure.")


MODEL = (
    "A model folder below the service's model roots (by name or absolute path), `job:<id>` for the "
    "model that a training job made, `name@version` of a published one (also `name@latest` and "
    "`name@production`), or a hub id where the hub is enabled."
)
_MODELS = ["minilm", "job:job_01JD2V5N0W8R4QK7T9Y3ZB6XEM", "topics@2"]
MODEL_NAME = r"[a-z0-9][a-z0-9._-]{0,63}"
"""What a published model may be called."""


class _Job(Strict):
    name: str | None = Field(None, max_length=200, description="A label of your own.")
    resources: Resources = Resources()
    priority: int = Field(0, ge=-100, le=100, description="Higher goes first; equal: older first.")
    retry: Retry = Retry()
    timeout_seconds: float | None = Field(
        None, gt=0, description="Time limit for one attempt; none by default."
    )
    fail_fast: bool = Field(
        False, description="Refuse at submission what the fleet of this moment cannot run."
    )


_BYTES_AND_SPECIAL = 258


class Architecture(Strict):
    """A model from scratch: weights from the seed, and a tokenizer trained on the training data."""

    type: Literal["bert", "gpt2", "llama", "t5"]
    hidden: int = Field(256, ge=8, le=65_536, description="Size of a token's vector.")
    layers: int = Field(4, ge=1, le=1024, description="T5: of the encoder, and of the decoder.")
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


class TrainData(Strict):
    """JSONL (one object a line), CSV or TSV with a header line, Parquet, or lines of plain text. A
    reference is `file_…` (uploaded) or a path."""

    train: str = Field(min_length=1, max_length=4096)
    validation: str | None = Field(None, min_length=1, max_length=4096)
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
        return self


OPTIMIZER_OPTIONS: dict[str, tuple[str, ...]] = {
    "adamw": ("betas", "eps"),
    "adam": ("betas", "eps"),
    "sgd": ("momentum",),
    "adafactor": (),
}
"""The optimizers, and the options that only some of them have."""


class Hyperparameters(Strict):
    """Named as in PyTorch and Transformers. ``batch_size`` is the global batch, over all ranks."""

    epochs: int = Field(3, ge=1, le=100_000)
    max_steps: int | None = Field(None, ge=1, description="Ends training early, whatever epochs.")
    batch_size: int = Field(32, ge=1, le=1_000_000)
    micro_batch_size: int | None = Field(
        None, ge=1, description="Examples a rank holds at once; the rest is accumulated."
    )
    optimizer: Literal["adamw", "adam", "sgd", "adafactor"] = "adamw"
    learning_rate: float = Field(
        5e-5, gt=0, le=10, description="For adafactor a share of each weight's size: 1e-3 to 1e-2."
    )
    weight_decay: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Of matrices, not of norms and biases. Decoupled for adamw and adafactor, L2 in "
        "the gradient for adam and sgd. Default as in PyTorch: 0.01 for adamw, else 0.",
    )
    l1: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Adds l1 * sum|w| over the same matrices to what is minimised; the loss that is "
        "reported is without it.",
    )
    betas: tuple[float, float] = Field((0.9, 0.999), description="Of adamw and adam.")
    eps: float = Field(1e-8, gt=0, description="Of adamw and adam.")
    momentum: float = Field(0.9, ge=0, lt=1, description="Of sgd.")
    warmup_ratio: float | None = Field(None, ge=0, lt=1)
    warmup_steps: int | None = Field(None, ge=0)
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    max_grad_norm: float | None = Field(1.0, gt=0)
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    dropout: float | None = Field(None, ge=0, lt=1, description="Overrides the model's own.")
    freeze: tuple[str, ...] = Field((), description="Parameter name patterns (fnmatch) to freeze.")
    max_length: int | None = Field(None, ge=4, le=1_000_000, description="Tokens; longer is cut.")
    packing: bool = Field(
        False,
        description="text-generation on plain text: texts one after another fill blocks of "
        f"max_length tokens (by default the model's limit, at most {PACKED_LENGTH}).",
    )
    mask_probability: float = Field(
        0.15, gt=0, lt=1, description="fill-mask: share of a text's tokens that is to be guessed."
    )
    contrastive_temperature: float = Field(
        0.05, gt=0, le=10, description="embeddings: lower tells near texts apart more sharply."
    )
    precision: Precision = "auto"
    seed: int = Field(42, ge=0, lt=2**63)
    eval_every_steps: int | None = Field(None, ge=1, description="Default: once an epoch.")

    @model_validator(mode="after")
    def _no_contradiction(self) -> Self:
        if self.warmup_ratio is not None and self.warmup_steps is not None:
            raise ValueError("warmup_ratio and warmup_steps exclude each other: keep one")
        if self.micro_batch_size is not None and self.micro_batch_size > self.batch_size:
            raise ValueError("micro_batch_size is larger than batch_size (the global batch)")
        if self.max_steps is not None and (self.warmup_steps or 0) >= self.max_steps:
            raise ValueError("warmup_steps must be below max_steps: training would end in warm-up")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError("betas must lie in [0, 1)")
        return self

    @model_validator(mode="after")
    def _options_fit_the_optimizer(self) -> Self:
        for option in dict.fromkeys(sum(OPTIMIZER_OPTIONS.values(), ())):
            # Not what is set: a spec that was stored has every field set.
            default = type(self).model_fields[option].default
            if option in OPTIMIZER_OPTIONS[self.optimizer] or getattr(self, option) == default:
                continue
            owners = [name for name, options in OPTIMIZER_OPTIONS.items() if option in options]
            raise ValueError(
                f"hyperparameters.{option} does not apply to optimizer '{self.optimizer}': it "
                f"belongs to {' and '.join(owners)}"
            )
        return self


class Distilling(Strict):
    """How much a student listens to its teacher."""

    temperature: float = Field(2.0, gt=0, le=100, description="Softens what both think.")
    alpha: float = Field(
        0.5,
        ge=0,
        le=1,
        description="Share of the teacher's part of the loss; the rest is the truth's.",
    )


TEACHABLE: frozenset[str] = frozenset(
    {"text-classification", "token-classification", "text2text", "summarization"}
    | {"text-generation", "fill-mask"}
)
"""Tasks whose model chooses one of a fixed set of answers."""


class Lora(Strict):
    """Low-rank adaptation: small matrices are trained beside frozen weights."""

    r: int = Field(8, ge=1, le=4096, description="Rank of the matrices.")
    alpha: float = Field(16.0, gt=0, description="Their product is scaled by alpha / r.")
    dropout: float = Field(0.0, ge=0, lt=1)
    targets: tuple[str, ...] = Field(
        (), description="Names of layers; none: those customary for the architecture."
    )


class Checkpointing(Strict):
    every_steps: int | None = Field(None, ge=1)
    every_seconds: float | None = Field(600, gt=0)
    keep: int = Field(
        2, ge=1, le=100, description="How many of the newest are kept; the best one besides."
    )


class EarlyStopping(Strict):
    """Ends training once validation gets no better, and delivers the best model that was evaluated.

    Each evaluation that is the best so far writes a checkpoint.
    """

    patience: int = Field(
        ge=1, le=100_000, description="Evaluations in a row without improvement that end training."
    )
    min_delta: float = Field(
        0.0, ge=0, description="What the metric must improve by, at least, to count for patience."
    )
    metric: str | None = Field(
        None, min_length=1, max_length=100, description="Default: the task's own (accuracy, ...)."
    )


Problem = Literal["single-label", "multi-label", "regression"]


class TrainSpec(_Job):
    """Fine-tune a model with DDP over ``resources.devices`` ranks."""

    kind: Literal["train"] = "train"
    task: Task
    problem: Problem = Field(
        "single-label", description="text-classification: one label a text, any number, or a score."
    )
    method: Literal["full", "lora", "pretrain", "distillation"] = Field(
        "full",
        description="full: all weights; lora: small matrices beside them; pretrain: `architecture` in "
        "place of `model`, from random weights; distillation: full, and taught by `teacher`.",
    )
    lora: Lora | None = None
    teacher: str | None = Field(
        None,
        min_length=1,
        max_length=1024,
        description="distillation: a model as `model` names one.",
    )
    distillation: Distilling | None = None
    model: str | None = Field(
        None, min_length=1, max_length=1024, description=MODEL, examples=_MODELS
    )
    architecture: Architecture | None = None
    data: TrainData
    hyperparameters: Hyperparameters = Hyperparameters()
    checkpoint: Checkpointing = Checkpointing()
    publish: str | None = Field(
        None,
        pattern=f"^{MODEL_NAME}$",
        description="Publish the model under this name, as its next version, once the job succeeds.",
    )
    early_stopping: EarlyStopping | None = None

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if self.lora is not None and self.method != "lora":
            raise ValueError("lora is for method 'lora': set it, or drop lora")
        if self.method == "lora" and self.hyperparameters.freeze:
            raise ValueError("method 'lora' freezes all but its own weights: drop freeze")
        if self.method != "pretrain":
            if self.model is None:
                raise ValueError(
                    "model must name what to fine-tune (or choose method 'pretrain' and an architecture)"
                )
            if self.architecture is not None:
                raise ValueError(
                    "architecture is for method 'pretrain': set it, or drop architecture"
                )
            return self
        if self.model is not None:
            raise ValueError(
                "method 'pretrain' starts from random weights: drop model, or choose method 'full'"
            )
        if self.architecture is None:
            raise ValueError("method 'pretrain' needs an architecture")
        tasks = ARCHITECTURE_TASKS[self.architecture.type]
        if self.task not in tasks:
            raise ValueError(
                f"architecture.type '{self.architecture.type}' does not do task '{self.task}': "
                f"it is for {', '.join(sorted(tasks))}"
            )
        if self.hyperparameters.freeze:
            raise ValueError("freeze keeps weights as they are, and those of pretrain are random")
        return self

    @model_validator(mode="after")
    def _has_a_teacher_if_any(self) -> Self:
        if self.method != "distillation":
            if self.teacher is not None or self.distillation is not None:
                what = "teacher" if self.teacher is not None else "distillation"
                raise ValueError(f"{what} is for method 'distillation': set it, or drop {what}")
            return self
        if self.teacher is None:
            raise ValueError(
                "method 'distillation' needs a teacher: name a model that does the task"
            )
        if self.task not in TEACHABLE or self.problem != "single-label":
            what = self.problem if self.problem != "single-label" else self.task
            raise ValueError(f"method 'distillation' does not apply to {what}")
        return self

    @property
    def teaching(self) -> Distilling:
        """The options of method 'distillation'."""
        return self.distillation or Distilling()

    @property
    def adaptation(self) -> Lora:
        """The options of method 'lora'."""
        return self.lora or Lora()

    @model_validator(mode="after")
    def _stops_by_something(self) -> Self:
        validates = self.data.validation is not None or self.data.validation_split is not None
        if self.early_stopping is not None and not validates:
            raise ValueError(
                "early_stopping judges by validation data and there are none: give "
                "data.validation or data.validation_split"
            )
        return self

    @model_validator(mode="after")
    def _fits_the_task(self) -> Self:
        if self.problem != "single-label" and self.task != "text-classification":
            raise ValueError(f"problem '{self.problem}' does not apply to task '{self.task}'")
        reads = TASK_COLUMNS[self.task]
        if self.data.format == "text" and self.task not in PLAIN_TEXT_TASKS:
            raise ValueError(
                f"data.format 'text' does not apply to task '{self.task}', which reads the columns "
                f"{', '.join(reads)}"
            )
        for name, field in Columns.model_fields.items():
            # Not what is set: a spec that was stored has every field set.
            if name not in reads and getattr(self.data.columns, name) != field.default:
                raise ValueError(
                    f"data.columns.{name} does not apply to task '{self.task}', which reads "
                    f"{', '.join(reads)}"
                )
        smoothing = self.hyperparameters.label_smoothing
        if smoothing and (self.problem != "single-label" or self.task == "embeddings"):
            raise ValueError(
                "label_smoothing spreads one right label over the others: it does not apply to "
                + (f"problem '{self.problem}'" if self.task != "embeddings" else "embeddings")
            )
        return self

    @model_validator(mode="after")
    def _options_fit_the_task(self) -> Self:
        for name, task in TASK_OPTIONS.items():
            default = Hyperparameters.model_fields[name].default
            # Not what is set: a spec that was stored has every field set.
            if self.task != task and getattr(self.hyperparameters, name) != default:
                raise ValueError(
                    f"hyperparameters.{name} applies to task '{task}' alone, not to '{self.task}'"
                )
        return self

    @model_validator(mode="after")
    def _pairs_have_negatives(self) -> Self:
        share = self.hyperparameters.batch_size // self.resources.devices
        together = min(share, self.hyperparameters.micro_batch_size or share)
        if self.task == "embeddings" and together < 2:
            raise ValueError(
                "embeddings learn to tell a pair from the others of its micro-batch: "
                f"hyperparameters.batch_size {self.hyperparameters.batch_size} over "
                f"resources.devices {self.resources.devices}"
                + (" and micro_batch_size 1" if share > 1 else "")
                + " leaves one pair alone; a rank needs 2 or more at once"
            )
        return self

    @model_validator(mode="after")
    def _batch_splits_over_ranks(self) -> Self:
        batch, ranks = self.hyperparameters.batch_size, self.resources.devices
        if batch % ranks:
            raise ValueError(
                f"hyperparameters.batch_size {batch} is the global batch and does not divide "
                f"evenly over resources.devices {ranks}"
            )
        share, micro = batch // ranks, self.hyperparameters.micro_batch_size
        # One above a rank's share is cut to it, so that a spec also runs on more devices.
        if micro is not None and micro < share and share % micro:
            raise ValueError(
                f"hyperparameters.batch_size {batch} over resources.devices {ranks} is {share} for "
                f"each rank, which is no multiple of hyperparameters.micro_batch_size {micro}"
            )
        if self.hyperparameters.precision == "fp32" and "bf16" in self.resources.features:
            raise ValueError("precision 'fp32' and the required feature 'bf16' contradict")
        return self


class Generation(Strict):
    """Sampling options; ``temperature`` 0 is greedy."""

    max_new_tokens: int = Field(128, ge=1, le=1_000_000)
    temperature: float = Field(0.0, ge=0, le=10)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int | None = Field(None, ge=1)
    seed: int = Field(0, ge=0, lt=2**63)
    stop: tuple[str, ...] = Field((), max_length=16, description="Text that ends a generation.")

    @model_validator(mode="after")
    def _no_contradiction(self) -> Self:
        if self.temperature == 0 and (self.top_p < 1 or self.top_k is not None):
            raise ValueError(
                "top_p and top_k choose among samples and temperature 0 is greedy: "
                "set a temperature above 0 or drop them"
            )
        if any(not text for text in self.stop):
            raise ValueError("an empty stop string would end every generation at once")
        return self


class Embedding(Strict):
    """How the vectors of a text's tokens become one."""

    pooling: Literal["auto", "mean", "cls"] = Field(
        "auto", description="auto: as the model's folder says (1_Pooling), else the mean."
    )
    normalize: bool = Field(True, description="To length 1, so that a dot product is the cosine.")


class InferSpec(_Job):
    """Run a model over the rows of a JSONL file (or inline rows) and keep every answer."""

    kind: Literal["infer"] = "infer"
    task: Task
    model: str = Field(min_length=1, max_length=1024, description=MODEL, examples=_MODELS)
    input: str | None = Field(
        None, min_length=1, max_length=4096, description="`file_…` (uploaded) or a path to JSONL."
    )
    rows: tuple[dict[str, Any], ...] | None = Field(None, min_length=1, max_length=10_000)
    text_column: str | None = Field(
        None,
        description="Where the text is. Default: `text`; `prompt` or `messages` for text-generation; "
        "`tokens` (words) or `text` for token-classification.",
    )
    generation: Generation | None = None
    embedding: Embedding | None = None
    top_k_labels: int = Field(
        1, ge=1, le=1000, description="Labels a text or tokens a mask gets, best first."
    )
    batch_size: int = Field(32, ge=1, le=4096, description="Rows computed together, at most.")
    shard_rows: int = Field(64, ge=1, le=100_000, description="Rows committed together.")
    max_length: int | None = Field(None, ge=4, description="Tokens of input a row may have.")
    too_long: Literal["error", "truncate"] = "error"
    max_errors: int | None = Field(
        None, ge=0, description="Fails the job when more rows than this fail; none: never."
    )
    precision: Precision = "auto"

    @model_validator(mode="after")
    def _no_contradiction(self) -> Self:
        if (self.input is None) == (self.rows is None):
            raise ValueError("give exactly one of input (a file) and rows (inline)")
        if self.generation is not None and self.task not in GENERATIVE:
            raise ValueError(f"generation options do not apply to task '{self.task}'")
        if self.embedding is not None and self.task != "embeddings":
            raise ValueError(f"embedding options do not apply to task '{self.task}'")
        if self.resources.devices != 1:
            raise ValueError("an inference job runs on one device: resources.devices must be 1")
        return self

    @property
    def sampling(self) -> Generation:
        return self.generation or Generation()


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
    """The field with dots; a place begins with the tag of the union, which is no field."""
    return ".".join(map(str, place[1:])) or None


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
