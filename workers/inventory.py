"""What this host can offer: its GPUs by NVML, CPU slots, or devices that are only simulated.

NVML asks the driver and makes no CUDA context, so this may run in a process that forks. Nothing here
is remembered: the host manager takes stock once, when it starts.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from shared.capability import GIB, Capability, parse_simulated
from shared.errors import ConfigurationError
from shared.messages import DeviceHandle
from shared.store.devices import DeviceFacts

log = logging.getLogger(__name__)

MAX_DEVICES = 256
_PART = re.compile(r"(?P<kind>cpu|gpu):(?P<count>all|\d+)")


@dataclass(frozen=True, slots=True)
class LocalDevice:
    """A device of this host, with what its worker process has to know beyond what it registers."""

    facts: DeviceFacts
    threads: int
    """CPU threads that a rank on it may use."""

    @property
    def id(self) -> str:
        return self.facts.id

    @property
    def is_gpu(self) -> bool:
        """Whether ranks compute on CUDA: simulated devices register as GPUs and compute on CPU."""
        return self.facts.capability.accelerator == "cuda" and not self.facts.simulated

    @property
    def handle(self) -> DeviceHandle:
        """The device as a rank is told of it."""
        return DeviceHandle(
            id=self.id,
            kind="cuda" if self.is_gpu else "cpu",
            uuid=self.facts.uuid,
            memory_bytes=self.facts.capability.memory_bytes,
            threads=self.threads,
            bf16=self.is_gpu and "bf16" in self.facts.capability.features,
        )

    @property
    def environment(self) -> dict[str, str]:
        """What makes a rank see this device and no other."""
        return {"CUDA_VISIBLE_DEVICES": (self.facts.uuid or "") if self.is_gpu else ""}

    def to_json(self) -> str:
        return _ADAPTER.dump_json(self).decode()

    @classmethod
    def from_json(cls, text: str) -> LocalDevice:
        return _ADAPTER.validate_json(text)


_ADAPTER: TypeAdapter[LocalDevice] = TypeAdapter(LocalDevice)


def take_stock(host: str, devices: str = "auto", simulate: str | None = None) -> list[LocalDevice]:
    """The devices that ``devices`` (or, with preference, ``simulate``) asks for, in order.

    ``devices``: ``auto`` (all GPUs, CPU slots where there is none), or parts of ``gpu:all``,
    ``gpu:N`` (the first N) and ``cpu:N`` with commas between them.

    Raises:
        ConfigurationError: it cannot be read, or asks for GPUs that are not there.
    """
    if simulate:
        found = simulated(host, simulate)
    elif devices == "auto":
        found = gpus(host) or cpu_slots(host, default_slots())
    else:
        found = [device for part in devices.split(",") for device in _part(host, part.strip())]
    if not found or len({device.id for device in found}) != len(found):
        raise ConfigurationError(
            f"--devices {devices}: names no device, or one twice",
            param="devices",
            hint="Write for instance auto, cpu:2, gpu:all, or gpu:all,cpu:1.",
        )
    return _share_threads(found)


def gpus(host: str) -> list[LocalDevice]:
    """The GPUs of this host, none where there is no driver. UUIDs name them for CUDA: indexes of
    NVML and of CUDA may differ."""
    found: list[LocalDevice] = []
    with _nvml() as nvml:
        if nvml is None:
            return []
        for index in range(nvml.nvmlDeviceGetCount()):
            device = nvml.nvmlDeviceGetHandleByIndex(index)
            model = _text(nvml.nvmlDeviceGetName(device))
            if _is_divided(nvml, device):
                log.warning("gpu%d (%s) is divided by MIG, which is not served yet", index, model)
                continue
            major, minor = nvml.nvmlDeviceGetCudaComputeCapability(device)
            memory = int(nvml.nvmlDeviceGetMemoryInfo(device).total)
            facts = DeviceFacts(
                id=f"gpu{index}@{host}",
                host=host,
                model=model,
                capability=Capability("cuda", 10 * major + minor, memory),
                uuid=_text(nvml.nvmlDeviceGetUUID(device)),
            )
            found.append(LocalDevice(facts, threads=1))
    return found


def cpu_slots(host: str, count: int) -> list[LocalDevice]:
    """``count`` equal shares of this host's processors and memory."""
    if not 1 <= count <= MAX_DEVICES:
        raise ConfigurationError(f"cpu:{count}: from 1 to {MAX_DEVICES} slots", param="devices")
    capability = Capability("cpu", 0, max(GIB // 4, host_memory() // count))
    name = processor_name()
    facts = [DeviceFacts(f"cpu{i}@{host}", host, name, capability) for i in range(count)]
    return [LocalDevice(each, threads=1) for each in facts]


def simulated(host: str, text: str) -> list[LocalDevice]:
    """Devices that register as GPUs, say that they are simulated, and compute on the CPU."""
    return [
        LocalDevice(
            DeviceFacts(
                id=f"gpu{index}@{host}",
                host=host,
                model=f"{device.model} (simulated)",
                capability=device.capability,
                simulated=True,
            ),
            threads=1,
        )
        for index, device in enumerate(parse_simulated(text))
    ]


def default_slots() -> int:
    """CPU slots of a host that nobody configured: two at least, so that DDP can be tried."""
    return min(8, max(2, processors() // 4))


def processors() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0))


def host_memory() -> int:
    """Bytes of memory, or what the control group allows of it."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            limit = Path(path).read_text().strip()
        except OSError:
            continue
        if limit.isdecimal():
            total = min(total, int(limit))
    return total


def processor_name() -> str:
    for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return "CPU"


def _part(host: str, part: str) -> list[LocalDevice]:
    match = _PART.fullmatch(part)
    if match is None or part == "cpu:all":
        raise ConfigurationError(
            f"--devices: cannot read '{part}'",
            param="devices",
            hint="Write for instance auto, cpu:2, gpu:all, or gpu:all,cpu:1.",
        )
    if match["kind"] == "cpu":
        return cpu_slots(host, int(match["count"]))
    found = gpus(host)
    wanted = len(found) if match["count"] == "all" else int(match["count"])
    if not found or wanted > len(found):
        raise ConfigurationError(
            f"--devices {part}: this host has {len(found)} usable GPUs",
            param="devices",
            hint="See that the NVIDIA driver works (nvidia-smi), or use cpu:N.",
        )
    return found[:wanted]


def _share_threads(devices: list[LocalDevice]) -> list[LocalDevice]:
    # More threads than processors is not only useless: ranks that wait for each other in a
    # collective then wait for threads that do not run.
    threads = max(1, processors() // len(devices))
    return [dataclasses.replace(device, threads=threads) for device in devices]


@contextmanager
def _nvml() -> Iterator[Any]:
    """The library, initialised; None where there is no driver."""
    try:
        import pynvml
    except ImportError:
        yield None
        return
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        missing = (
            pynvml.NVML_ERROR_LIBRARY_NOT_FOUND,
            pynvml.NVML_ERROR_DRIVER_NOT_LOADED,
            pynvml.NVML_ERROR_NO_PERMISSION,
        )
        if error.value not in missing:
            log.warning("NVML does not work, so no GPU is served: %s", error)
        yield None
        return
    try:
        yield pynvml
    finally:
        pynvml.nvmlShutdown()


def _is_divided(nvml: Any, device: Any) -> bool:
    try:
        current, _ = nvml.nvmlDeviceGetMigMode(device)
    except nvml.NVMLError:  # not supported: most cards
        return False
    return bool(current == nvml.NVML_DEVICE_MIG_ENABLE)


def _text(value: str | bytes) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else value
