"""Which devices could run a job? Pure, and shared by submission and placement."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from shared.capability import GIB, Capability
from shared.resolved import Requirements
from shared.store.snapshot import DeviceState


def fits(requirements: Requirements, capability: Capability) -> str | None:
    """None if a device of this capability can run a rank; else why not, in words for people.

    For instance ``needs 40 GB, has 16 GB`` or ``needs bf16, sm75 has none``. The number of devices
    is not looked at: see ``unsatisfiable``.
    """
    found = misses(requirements, capability)
    return "; ".join(found) or None


def misses(requirements: Requirements, capability: Capability) -> list[str]:
    """Everything that the device lacks, one phrase each."""
    if requirements.accelerator not in ("auto", capability.accelerator):
        return [f"needs {requirements.accelerator}, is {capability.accelerator}"]
    found: list[str] = []
    needed, has = requirements.compute_capability, capability.compute_capability
    if needed > has:
        what = "a CPU has none" if capability.accelerator == "cpu" else f"has {has / 10:.1f}"
        found.append(f"needs compute capability {needed / 10:.1f}, {what}")
    name = "a CPU" if capability.accelerator == "cpu" else f"sm{has}"
    missing = [f for f in requirements.features if f not in capability.features]
    found += [f"needs {feature}, {name} has none" for feature in missing]
    usable = usable_memory(requirements, capability)
    if requirements.memory_bytes > usable:
        about = "about " if requirements.memory_is_estimate else ""
        found.append(
            f"needs {about}{gigabytes(requirements.memory_bytes)}, has {gigabytes(usable, up=False)}"
        )
    return found


def usable_memory(requirements: Requirements, capability: Capability) -> int:
    """What the requirement is compared with, in bytes.

    A user who asks for 16 GB means a card that is sold as such, and a T4 reports 15: the step of the
    class counts. An estimate means bytes: what the device reports counts.
    """
    if requirements.memory_is_estimate:
        return capability.memory_bytes
    return max(capability.memory_bytes, capability.memory_step * GIB)


def gigabytes(size: int, *, up: bool = True) -> str:
    """``40 GB``, ``2.5 GB``; binary, as cards are sold. Needs are rounded up and what is there down,
    so that a need never looks met when it is not."""
    tenths = -(-size * 10 // GIB) if up else size * 10 // GIB
    return f"{tenths // 10} GB" if tenths % 10 == 0 else f"{tenths / 10:.1f} GB"


def eligible_devices(
    requirements: Requirements, devices: Iterable[DeviceState]
) -> tuple[DeviceState, ...]:
    """The devices of the known fleet, busy and silent ones included, that a rank could run on.

    ``auto`` means CUDA devices where the fleet has any that fit, else CPU slots: never both, because
    a gang cannot span them.
    """
    fitting = [d for d in devices if d.known and fits(requirements, d.capability) is None]
    if requirements.accelerator == "auto" and any(_is_cuda(d) for d in fitting):
        fitting = [d for d in fitting if _is_cuda(d)]
    return tuple(fitting)


def unsatisfiable(requirements: Requirements, devices: Sequence[DeviceState]) -> str | None:
    """Why the known fleet cannot run the job even when all of it is free; None if it can."""
    known = [d for d in devices if d.known]
    if not known:
        return "the fleet has no devices: no worker has registered"
    eligible = eligible_devices(requirements, known)
    if not eligible:
        return f"no device of the fleet fits: {nearest_miss(requirements, known)}"
    # Ranks on simulated and on real devices speak different backends: no gang spans them.
    most = max(sum(d.simulated is kind for d in eligible) for kind in (False, True))
    if most < requirements.devices:
        fitting = "" if len(eligible) == len(known) else " that fit"
        has = str(most) if most == len(eligible) else f"at most {most} of one kind"
        return f"needs {requirements.devices} devices{fitting}, the fleet has {has}"
    return None


def nearest_miss(requirements: Requirements, devices: Sequence[DeviceState]) -> str:
    """The reason of the device that lacks least; of equals, of the most capable."""
    nearest = min(
        devices,
        key=lambda d: (
            requirements.accelerator not in ("auto", d.capability.accelerator),
            len(misses(requirements, d.capability)),
            tuple(-part for part in d.capability.rank),
            d.id,
        ),
    )
    return f"{fits(requirements, nearest.capability)} ({nearest.capability.queue})"


def _is_cuda(device: DeviceState) -> bool:
    return device.capability.accelerator == "cuda"
