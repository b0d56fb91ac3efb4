"""What specs of all kinds share."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator


class Strict(BaseModel):
    """Refuses unknown fields. A number may come as a string: YAML reads ``1e-4`` as one."""

    model_config = ConfigDict(extra="forbid", frozen=True)


Accelerator = Literal["auto", "cpu", "cuda"]
Feature = Literal["bf16", "fp8"]
Precision = Literal["auto", "fp32", "bf16", "int8"]
TrainPrecision = Literal["auto", "fp32", "tf32", "bf16", "fp16"]
Task = Literal[
    "text-classification",
    "token-classification",
    "text2text",
    "summarization",
    "text-generation",
    "fill-mask",
    "embeddings",
    "scoring",
    "reranking",
]
"""As Transformers names them. ``summarization`` is ``text2text`` by the name its users look for."""
INFERENCE_ONLY: dict[str, str] = {
    "scoring": "it scores with a model of text-generation: train that",
    "reranking": "it takes a cross-encoder, which is not trained here",
}
"""Tasks of batch jobs alone, and what to do about that."""
SEQ2SEQ: frozenset[str] = frozenset({"text2text", "summarization"})
GENERATIVE: frozenset[str] = SEQ2SEQ | {"text-generation"}


class DeviceRange(Strict):
    """An attempt starts on as many devices as are free, between these two."""

    min: int = Field(ge=1, le=1024)
    max: int = Field(ge=1, le=1024)

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.min > self.max:
            raise ValueError(f"resources.devices.min {self.min} is above max {self.max}")
        return self


def _form(value: Any) -> str:
    return "[range]" if isinstance(value, dict | DeviceRange) else "[number]"


Devices = Annotated[
    Annotated[int, Field(ge=1, le=1024), Tag("[number]")] | Annotated[DeviceRange, Tag("[range]")],
    Discriminator(_form),
]


class DeviceNeeds(Strict):
    """What a job *needs* of each device; placement takes the least capable devices that have it.

    Left empty, ``memory_gb`` comes from the footprint estimate of the model.
    """

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


class Resources(DeviceNeeds):
    """What a training needs."""

    devices: Devices = Field(
        1,
        description="World size: one rank per device. With {min, max} each attempt runs on as many as "
        "are free then.",
        examples=[2, {"min": 2, "max": 8}],
    )

    @property
    def least(self) -> int:
        """Devices that must be free for the job to start."""
        return self.devices.min if isinstance(self.devices, DeviceRange) else self.devices

    @property
    def most(self) -> int:
        return self.devices.max if isinstance(self.devices, DeviceRange) else self.devices


class BatchResources(DeviceNeeds):
    """What a batch job needs. It starts on one device and is given more while it runs."""

    devices: Devices | None = Field(
        None,
        description="The most devices that it may have at once: a number, or {min: 1, max}. Left out: as "
        "many as are free.",
        examples=[4, {"min": 1, "max": 4}],
    )

    @model_validator(mode="after")
    def _starts_on_one(self) -> Self:
        if isinstance(self.devices, DeviceRange) and self.devices.min != 1:
            raise ValueError(
                f"a batch job starts on one device and is given more while it runs: "
                f"resources.devices.min must be 1, not {self.devices.min}"
            )
        return self

    @property
    def most(self) -> int | None:
        """None: as many as are free."""
        return self.devices.max if isinstance(self.devices, DeviceRange) else self.devices


class Retry(Strict):
    """How often a job is tried again after failures that are not the user's."""

    max_attempts: int = Field(
        4,
        ge=1,
        le=100,
        description="Failures in a row that a job may have, at most: an attempt that made a further checkpoint "
        "or gave results begins a new row. What costs none: preemption, and memory that ran out in a training "
        "that goes on with fewer rows at once.",
    )
    backoff_seconds: float = Field(
        2.0,
        ge=0,
        le=3600,
        description="What a second failure in a row waits; doubles with each more, up to 300 s. A first one is "
        "tried again at once, and so is one of an attempt that made a further checkpoint or gave results.",
    )


MODEL = (
    "A model folder below the service's model roots (by name or absolute path), `job:<id>` for the "
    "model that a training job made (`adapter:<id>` for its LoRA adapter on the base), `name@version` of a "
    "published one (also `name@latest` and `name@production`), or a hub id where the hub is enabled."
)
MODELS = ["minilm", "job:job_01JD2V5N0W8R4QK7T9Y3ZB6XEM", "topics@2"]
MODEL_NAME = r"[a-z0-9][a-z0-9._-]{0,63}"
"""What a published model may be called."""


class JobFields(Strict):
    name: str | None = Field(None, max_length=200, description="A label of your own.")
    priority: int = Field(0, ge=-100, le=100, description="Higher goes first; equal: older first.")
    retry: Retry = Retry()
    timeout_seconds: float | None = Field(
        None, gt=0, description="Time limit for one attempt; none by default."
    )
    fail_fast: bool = Field(
        False, description="Refuse at submission what the fleet of this moment cannot run."
    )
