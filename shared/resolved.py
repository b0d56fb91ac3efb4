"""What submission found out about a spec, kept beside it: paths that exist, needs in numbers."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from shared.footprint import Configuration
from shared.specs import Accelerator, DataFormat, Feature


class Requirements(BaseModel):
    """What each device of the job must have. The question that placement answers."""

    model_config = ConfigDict(frozen=True)

    devices: int
    """The fewest that an attempt can run on."""
    world_sizes: tuple[int, ...] = ()
    """Ascending, where there is a choice: all numbers of devices that it can run on."""
    most: int | None = None
    """Of a batch job: the most devices that it may have at once, as it starts on one and is given more
    while it runs; None: as many as are free."""
    accelerator: Accelerator
    memory_bytes: int = 0
    compute_capability: int = 0
    """Times ten: 80 for sm80; 0 for any."""
    features: tuple[Feature, ...] = ()
    memory_is_estimate: bool = True
    """Whether the footprint gave ``memory_bytes``, not the user."""
    memory_from: Literal["user", "estimate", "measured", "remembered"] = "estimate"
    """How it was found: what the user asked, arithmetic, a measurement without weights, or the peaks of
    earlier trainings."""

    def most_of(self, free: int) -> int:
        """The most devices, of so many that are free, that an attempt can run on; 0: too few."""
        return max((s for s in self.world_sizes or (self.devices,) if s <= free), default=0)


Parallelism = Literal["ddp", "fsdp"]
"""Whether each rank of a training has the whole model, or a part of it."""


class ResolvedModel(BaseModel):
    model_config = ConfigDict(frozen=True)

    source: Literal["folder", "job", "hub", "scratch"]
    path: str
    """Absolute folder, or the id on the hub; empty for a model from scratch."""
    label: str
    """Short, for people: Flower shows it."""
    parameters: int | None = None
    adapter: str | None = None
    """Absolute folder of the LoRA adapter that is applied to it."""


class RepeatedIds(BaseModel):
    """Rows of a batch job whose id an earlier row has as well."""

    model_config = ConfigDict(frozen=True)

    rows: int
    first_row: int
    """The number of the first of them."""
    first_id: str
    """Its id as JSON, cut where it is long."""
    compared: int
    """Ids that were looked at; those of later rows were not."""
    all: bool
    """Whether that is all of them."""


class ResolvedInput(BaseModel):
    model_config = ConfigDict(frozen=True)

    path: str
    size: int
    format: DataFormat = "jsonl"
    """As its user wrote it. The rows of a batch job lie at ``path`` as JSONL in any case."""
    rows: int | None = None
    repeated_ids: RepeatedIds | None = None


class Resolved(BaseModel):
    model_config = ConfigDict(frozen=True)

    model: ResolvedModel
    teacher: ResolvedModel | None = None
    requirements: Requirements
    parallelism: Parallelism = "ddp"
    parallelism_reason: str = ""
    configuration: Configuration | None = Field(None, exclude=True)
    """Of a training, as far as its memory goes. Kept with what is known about it, not in the job."""
    estimated_bytes: int | None = Field(None, exclude=True)
    """What arithmetic says to it."""
    inputs: dict[str, ResolvedInput]
    """``train`` and ``validation``, or ``input``; none of a dataset that is made where the job runs."""
