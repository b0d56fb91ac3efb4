"""Capability classes: what a device can do, in steps, and the Celery queue that is named by it.

A class is accelerator, compute capability and memory: ``cpu``, ``cuda.sm75.16g``, ``cuda.sm80.80g``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from shared.errors import ConfigurationError

GIB = 1024**3
SEATS = 8
"""Batch jobs that one device computes at once, at most."""
_STEPS = (4, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 64, 80, 96, 141, 180, 288)
"""Memory steps of a class in GiB, as cards are sold; a class promises at least its step less 8%."""

KNOWN_GPUS: dict[str, tuple[int, int]] = {
    "T4": (75, 16),
    "V100": (70, 32),
    "RTX3090": (86, 24),
    "RTX4090": (89, 24),
    "A10": (86, 24),
    "L4": (89, 24),
    "A40": (86, 48),
    "L40S": (89, 48),
    "A100": (80, 80),
    "H100": (90, 80),
    "H200": (90, 141),
    "B200": (100, 180),
}
"""Model: (compute capability times ten, usual memory in GiB), for simulated devices."""


@dataclass(frozen=True, slots=True)
class Capability:
    """What one device can do. ``compute_capability`` is times ten (sm80 is 80), 0 on CPU."""

    accelerator: Literal["cpu", "cuda"]
    compute_capability: int
    memory_bytes: int

    @property
    def memory_step(self) -> int:
        """The class's memory in GiB. A card of 80 GB reports a little less than it is sold as."""
        gib = self.memory_bytes / GIB
        fitting = [step for step in _STEPS if gib >= step * 0.92]
        return fitting[-1] if fitting else max(1, int(gib))

    @property
    def features(self) -> frozenset[str]:
        """bf16 from sm80 (CPUs emulate it: slow but right), fp8 from sm89."""
        if self.accelerator == "cpu":
            return frozenset({"bf16"})
        found = {name for name, at in (("bf16", 80), ("fp8", 89)) if self.compute_capability >= at}
        return frozenset(found)

    @property
    def queue(self) -> str:
        """The name of the class and of its Celery queue."""
        if self.accelerator == "cpu":
            return "cpu"
        return f"cuda.sm{self.compute_capability}.{self.memory_step}g"

    @property
    def rank(self) -> tuple[int, int, int]:
        """Orders classes from the least to the most capable: memory first, then compute capability."""
        cuda = int(self.accelerator == "cuda")
        return (cuda, self.memory_step if cuda else 0, self.compute_capability)


def device_queue(device_id: str) -> str:
    """The queue that only this device reads. Ranks of a gang go here: its members are chosen, and
    another device of the class that took the hint would leave the chosen one reserved and idle."""
    return f"device.{device_id}"


@dataclass(frozen=True, slots=True)
class SimulatedDevice:
    """A device that registers as the model it is named after and computes on the CPU."""

    model: str
    capability: Capability


_SIMULATED = re.compile(r"(?:(\d+)x)?([A-Za-z0-9]+?)(?:-(\d+)GB)?", re.IGNORECASE)


def parse_simulated(text: str) -> tuple[SimulatedDevice, ...]:
    """``2xA100-80GB,1xT4-16GB`` as devices.

    Raises:
        ConfigurationError: an unknown model or a malformed part.
    """
    devices: list[SimulatedDevice] = []
    for part in filter(None, (p.strip() for p in text.split(","))):
        match = _SIMULATED.fullmatch(part)
        name = match[2].upper() if match else ""
        if match is None or name not in KNOWN_GPUS or int(match[1] or 1) not in range(1, 257):
            raise ConfigurationError(
                f"--simulate: cannot read '{part}'",
                param="simulate",
                hint=f"Write for instance 2xA100-80GB,1xT4-16GB. Known: {', '.join(KNOWN_GPUS)}.",
            )
        compute, memory = KNOWN_GPUS[name]
        gib = int(match[3] or memory)
        if gib not in range(1, 1025):
            raise ConfigurationError(
                f"--simulate: no device has {gib} GB, as '{part}' says", param="simulate"
            )
        capability = Capability("cuda", compute, gib * GIB)
        devices += [SimulatedDevice(f"{name}-{gib}GB", capability)] * int(match[1] or 1)
    if not devices:
        raise ConfigurationError("--simulate names no device", param="simulate")
    return tuple(devices)
