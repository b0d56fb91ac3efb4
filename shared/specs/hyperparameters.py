"""How a training goes about it."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from shared.specs.common import Strict, TrainPrecision
from shared.specs.data import PACKED_LENGTH

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
    precision: TrainPrecision = Field(
        "auto",
        description="Of matrix products; weights, gradients and the optimizer stay fp32. auto: bf16 "
        "where the device has it, else fp32. fp16 scales the loss so that small gradients are not "
        "lost, for devices without bf16. tf32: fp32 with shorter factors, on CUDA from 8.0.",
    )
    gradient_checkpointing: bool = Field(
        False,
        description="Keep the input of each layer alone and compute the rest again for the backward "
        "pass: less memory for longer steps, same result.",
    )
    compile: bool = Field(
        False,
        description="Compile the layers (torch.compile) at the start of each attempt: a wait of a "
        "minute or more, for steps that may be faster; same result but for rounding. Where a host cannot, it is "
        "told, and done without.",
    )
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


class Preference(Strict):
    """Direct preference optimisation (Rafailov et al., 2023): of two answers, one is to be likelier."""

    beta: float = Field(
        0.1,
        gt=0,
        le=100,
        description="How strongly the model is held to what it said before training: more is closer.",
    )
    label_smoothing: float = Field(
        0.0,
        ge=0,
        lt=0.5,
        description="Share of the pairs whose preference is taken to be the wrong way round.",
    )


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
    every_seconds: Annotated[float, Field(gt=0)] | Literal["auto"] | None = Field(
        "auto",
        description="'auto': unless every_steps is given, by what a checkpoint costs and how often "
        "devices fail.",
    )
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
