"""The spec of a training job."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from shared.specs.common import (
    INFERENCE_ONLY,
    MODEL,
    MODEL_NAME,
    MODELS,
    JobFields,
    Resources,
    Task,
)
from shared.specs.data import (
    ARCHITECTURE_TASKS,
    PLAIN_TEXT_TASKS,
    PREFERENCE_COLUMNS,
    TASK_COLUMNS,
    TASK_OPTIONS,
    Architecture,
    Columns,
    TrainData,
)
from shared.specs.hyperparameters import (
    TEACHABLE,
    Checkpointing,
    Distilling,
    EarlyStopping,
    Hyperparameters,
    Lora,
    Preference,
)
from shared.specs.world_sizes import WorldSizes, fixed_world_size, world_sizes

Problem = Literal["single-label", "multi-label", "regression"]


class TrainSpec(JobFields):
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
    preference: Preference | None = Field(
        None,
        description="text-generation by method full or lora: learn from pairs of answers of which one "
        "is preferred (DPO). `{}` for the defaults.",
    )
    model: str | None = Field(
        None, min_length=1, max_length=1024, description=MODEL, examples=MODELS
    )
    architecture: Architecture | None = None
    data: TrainData
    hyperparameters: Hyperparameters = Hyperparameters()
    parallelism: Literal["auto", "ddp", "fsdp"] = Field(
        "auto",
        description="ddp: each device holds the whole model; fsdp: a part of its weights, gradients and "
        "moments. auto: ddp, unless by the footprint no device of the fleet is large enough for that "
        "and resources.devices together are.",
    )
    checkpoint: Checkpointing = Checkpointing()
    publish: str | None = Field(
        None,
        pattern=f"^{MODEL_NAME}$",
        description="Publish the model under this name, as its next version, once the job succeeds.",
    )
    early_stopping: EarlyStopping | None = None
    resources: Resources = Resources()

    @field_validator("task")
    @classmethod
    def _can_be_trained(cls, task: Task) -> Task:
        if task in INFERENCE_ONLY:
            raise ValueError(
                f"task '{task}' is for batch jobs (kind 'infer') alone: {INFERENCE_ONLY[task]}"
            )
        return task

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
    def _prefers_where_it_can(self) -> Self:
        if self.preference is None:
            return self
        if self.task != "text-generation":
            raise ValueError(f"preference is for task 'text-generation', not '{self.task}'")
        if self.method not in ("full", "lora"):
            raise ValueError(f"preference goes with method 'full' or 'lora', not '{self.method}'")
        if self.hyperparameters.packing:
            raise ValueError(
                "packing joins plain texts, and preference has pairs of answers: drop one"
            )
        if self.hyperparameters.label_smoothing:
            raise ValueError(
                "hyperparameters.label_smoothing is of single tokens: with preference set "
                "preference.label_smoothing"
            )
        return self

    @property
    def reads(self) -> tuple[str, ...]:
        """The columns that a row may have, by the names that ``data.columns`` gives them."""
        return PREFERENCE_COLUMNS if self.preference is not None else TASK_COLUMNS[self.task]

    @property
    def not_in_shards(self) -> str | None:
        """Why the model cannot be trained in shards, if so."""
        if self.resources.most == 1:
            return "resources.devices is 1: there is nothing to divide the model among"
        if self.hyperparameters.optimizer == "adafactor":
            return "adafactor sums over rows and columns of whole weights: choose another optimizer"
        return None

    @model_validator(mode="after")
    def _can_be_in_shards(self) -> Self:
        if self.parallelism == "fsdp" and self.not_in_shards is not None:
            raise ValueError(f"parallelism 'fsdp' does not apply: {self.not_in_shards}")
        return self

    @property
    def labels_needed(self) -> int:
        """Different labels without which there is nothing to tell apart; 0 for a task without labels."""
        if self.task == "token-classification":
            return 2
        if self.task != "text-classification":
            return 0
        return {"single-label": 2, "multi-label": 1, "regression": 0}[self.problem]

    @property
    def reads_plain_text(self) -> bool:
        """Whether a line of text can be a row."""
        return self.task in PLAIN_TEXT_TASKS and self.preference is None

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
        reads, what = self.reads, f"task '{self.task}'"
        if self.preference is not None:
            what += " with preference"
        if self.data.format == "text" and not self.reads_plain_text:
            raise ValueError(
                f"data.format 'text' does not apply to {what}, which reads the columns "
                f"{', '.join(reads)}"
            )
        for name, field in Columns.model_fields.items():
            # Not what is set: a spec that was stored has every field set.
            if name not in reads and getattr(self.data.columns, name) != field.default:
                raise ValueError(
                    f"data.columns.{name} does not apply to {what}, which reads {', '.join(reads)}"
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

    @property
    def elastic(self) -> bool:
        """Whether attempts may run on different numbers of devices."""
        return self.resources.least < self.resources.most

    @property
    def world_sizes(self) -> WorldSizes:
        """How the global batch is cut, and the numbers of devices that it can be cut for."""
        options, resources = self.hyperparameters, self.resources
        batch, micro = options.batch_size, options.micro_batch_size
        if self.elastic:
            return world_sizes(batch, micro, resources.least, resources.most)
        return fixed_world_size(batch, micro, resources.most)

    @model_validator(mode="after")
    def _batch_splits_over_ranks(self) -> Self:
        together = self.world_sizes.micro_batch  # raises where it does not
        if self.task == "embeddings" and together < 2:
            raise ValueError(
                "embeddings learn to tell a pair from the others of its micro-batch: "
                f"hyperparameters.batch_size {self.hyperparameters.batch_size} over "
                f"resources.devices {self.resources.most}"
                + (" and micro_batch_size 1" if self.hyperparameters.micro_batch_size == 1 else "")
                + " leaves one pair alone; a rank needs 2 or more at once"
            )
        return self

    @model_validator(mode="after")
    def _precision_fits_the_devices(self) -> Self:
        precision = self.hyperparameters.precision
        if precision not in ("auto", "bf16") and "bf16" in self.resources.features:
            raise ValueError(f"precision '{precision}' and the required feature 'bf16' contradict")
        if precision == "tf32" and self.resources.accelerator == "cpu":
            raise ValueError(
                "precision 'tf32' is of CUDA devices: set accelerator 'cuda', or 'fp32'"
            )
        return self
