"""Settings of the server side, read from the environment once and validated at construction.

``DATABASE_URL`` and ``BROKER_URL`` go by their usual names; everything else is ``GPUYARD_…``.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from shared.errors import ConfigurationError

PathList = Annotated[tuple[Path, ...], NoDecode]


class Settings(BaseSettings):
    """All durations are seconds, all sizes bytes."""

    model_config = SettingsConfigDict(env_prefix="GPUYARD_", extra="ignore", frozen=True)

    database_url: str = Field(validation_alias="DATABASE_URL")
    broker_url: str = Field(validation_alias="BROKER_URL")

    data: Path = Path("gpuyard-data")
    """Folder of files, checkpoints and artifacts. One folder for all hosts: every worker and the API
    see the same (a local disk on one machine; NFS or the like on a fleet)."""
    model_roots: PathList = ()
    """Folders whose subfolders are models that a spec may name; ``<data>/models`` always is one."""
    data_roots: PathList = ()
    """Folders whose files a spec may name by path; uploaded files need none."""
    hub: bool = False
    """Whether a spec may name a model of the Hugging Face hub. Workers then download it."""
    max_upload_bytes: int = Field(2 * 1024**3, gt=0)
    max_scan_bytes: int = Field(256 * 1024**2, gt=0)
    """How much of a training file is checked row by row at submission; the rank checks the rest."""
    auth: bool = True
    """Whether the API asks for a key. Switch off only behind something that does."""

    lease_ttl: float = Field(60, gt=0)
    """After so long without renewal an attempt may be rescued."""
    lease_renew_every: float = Field(5, gt=0)
    abandon_after: float = Field(900, gt=0)
    """A worker that could not renew for so long ends its ranks. Longer than the lease, so that an
    outage of Postgres, in which nobody can rescue either, harms no healthy run; fencing keeps a
    worker that was only cut off from writing."""
    claim_timeout: float = Field(60, gt=0)
    """An attempt that is not claimed whole for so long is taken back."""
    rering_every: float = Field(5, gt=0)
    """A dispatched rank that nobody claimed gets its hint again after so long."""
    heartbeat_every: float = Field(3, gt=0)
    device_timeout: float = Field(20, gt=0)
    """A device without heartbeat for so long gets no new work."""
    suspect_for: float = Field(600, gt=0)
    """A device that takes nothing of what it is sent, while others do, gets no work for so long."""
    tick_every: float = Field(1.0, gt=0)
    """The scheduler also looks without a wake-up, this often."""
    leader_ttl: float = Field(6, gt=0)
    end_grace: float = Field(10, ge=0)
    """What a rank gets between the request to end and SIGKILL."""
    drain_grace: float = Field(30, ge=0)
    """What running attempts get on SIGTERM to the worker, to make a checkpoint or to end, before they
    are ended and tried again."""
    hung_after: float = Field(60, ge=0)
    """A rank of a training that gives no sign of life for so long, while others wait for it, hangs; so
    does one that is alive and takes so long for its part of a step, and many times as long as usual.
    The attempt then ends and is tried again. 0: none is ever taken to hang (to stop one in a debugger)."""
    engine_hang: float = Field(600, ge=0)
    """An engine of batch jobs that takes so long for one step (three times as long to load a model) hangs: it is
    ended, and its rows are computed again as after a crash. 0: none is ever taken to hang."""
    rank_host: str | None = None
    """Address of this host for the ranks of a gang on several hosts; by default the one from which
    it reaches the broker."""
    max_log_bytes: int = Field(16 * 1024**2, gt=0)
    """Log kept in the store, per rank of an attempt; the whole stays in the attempt's folder."""

    mlflow_tracking_uri: str | None = None
    """Where workers tell an MLflow of trainings (needs ``mlflow-skinny`` or ``mlflow``)."""
    mlflow_experiment: str = "gpuyard"
    wandb: bool = False
    """Whether workers tell Weights & Biases of trainings (needs ``wandb``), as its own variables say."""

    @field_validator("model_roots", "data_roots", mode="before")
    @classmethod
    def _split_paths(cls, value: object) -> object:
        return tuple(p for p in value.split(os.pathsep) if p) if isinstance(value, str) else value

    @field_validator("database_url")
    @classmethod
    def _psycopg_url(cls, value: str) -> str:
        for scheme in ("postgres://", "postgresql://"):
            if value.startswith(scheme):
                return "postgresql+psycopg://" + value.removeprefix(scheme)
        if not value.startswith("postgresql+psycopg://"):
            raise ValueError("must be a postgresql:// URL: the store is Postgres only")
        return value

    @field_validator("broker_url")
    @classmethod
    def _redis_url(cls, value: str) -> str:
        if not value.startswith(("redis://", "rediss://", "redis+socket://", "unix://")):
            raise ValueError("must be a redis:// URL")
        return value

    @model_validator(mode="after")
    def _absolute_and_ordered(self) -> Self:
        if self.lease_renew_every * 2 > self.lease_ttl:
            raise ValueError("GPUYARD_LEASE_TTL must be at least twice GPUYARD_LEASE_RENEW_EVERY")
        if self.heartbeat_every * 2 > self.device_timeout:
            raise ValueError(
                "GPUYARD_DEVICE_TIMEOUT must be at least twice GPUYARD_HEARTBEAT_EVERY"
            )
        object.__setattr__(self, "data", self.data.expanduser().resolve())
        roots = (self.data / "models", *self.model_roots)
        object.__setattr__(self, "model_roots", tuple(p.expanduser().resolve() for p in roots))
        object.__setattr__(
            self, "data_roots", tuple(p.expanduser().resolve() for p in self.data_roots)
        )
        return self


def load_settings() -> Settings:
    """Read the environment.

    Raises:
        ConfigurationError: names the variable and what is wrong with it.
    """
    try:
        return Settings()
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = str(first["loc"][0]).upper() if first["loc"] else ""
        if name and name not in ("DATABASE_URL", "BROKER_URL"):
            name = f"GPUYARD_{name}"
        what = "is not set" if first["type"] == "missing" else first["msg"]
        raise ConfigurationError(
            f"{name} {what}".strip(),
            param=name or None,
            hint="Set it in the environment, or start everything with `gpuyard up`.",
        ) from None
