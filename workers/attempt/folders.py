"""Where an attempt keeps its files, below the data folder that all hosts share."""

from __future__ import annotations

import logging
import shutil
from dataclasses import dataclass
from pathlib import Path

from shared.messages import UNFINISHED

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class AttemptFolder:
    """``<data>/jobs/<job>/attempts/<number>/``: the ranks' logs, ``checkpoints/``, ``artifacts/``."""

    data: Path
    job_id: str
    number: int

    @property
    def path(self) -> Path:
        return self.data / "jobs" / self.job_id / "attempts" / str(self.number)

    def make(self) -> None:
        """The ranks of a gang on one host share it."""
        self.path.mkdir(parents=True, exist_ok=True)

    def sweep(self) -> None:
        """Delete what this attempt and those before it left half-written of checkpoints. Those are over
        (a newer attempt exists), so that nothing there will ever be finished."""
        for number in range(1, self.number + 1):
            checkpoints = self.path.parent / str(number) / "checkpoints"
            for unfinished in checkpoints.glob(f"{UNFINISHED}*"):
                log.info("deleted, as it was never finished: %s", unfinished)
                shutil.rmtree(unfinished, ignore_errors=True)

    def log(self, rank: int, device_id: str) -> Path:
        return self.path / f"rank{rank}{log_suffix(device_id)}"

    def relative(self, path: str) -> str:
        """A path that a rank reported, as the store keeps it: relative to the data folder.

        Raises:
            ValueError: it lies outside of this folder, or is not there.
        """
        found = Path(path).resolve()
        if not found.is_relative_to(self.path.resolve()):
            raise ValueError(f"{path} is not below {self.path}")
        if not found.exists():
            raise ValueError(f"{path} does not exist")
        return str(found.relative_to(self.data.resolve()))


def log_suffix(device_id: str) -> str:
    """How the logs of all processes on a device end. ``leftovers`` finds their processes by it."""
    return f".{device_id}.log"


def delete_checkpoint(data: Path, path: str) -> None:
    """Delete the folder of a checkpoint that the store forgot; nothing outside ``<data>/jobs``."""
    folder = (data / path).resolve()
    if not folder.is_relative_to((data / "jobs").resolve()) or "checkpoints" not in folder.parts:
        log.error("not deleted, as it is no checkpoint folder of this service: %s", folder)
        return
    try:
        shutil.rmtree(folder)
    except FileNotFoundError:
        return
    except OSError as error:
        log.warning("checkpoint %s could not be deleted: %s", folder, error)
