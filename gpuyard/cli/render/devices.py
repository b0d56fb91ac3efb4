"""The fleet."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from gpuyard.cli.render.layout import Column, state, table
from gpuyard.cli.render.words import clock, duration, size
from shared.views import DeviceView, WorkerView


def fleet(console: Console, devices: Sequence[DeviceView], workers: Sequence[WorkerView]) -> Table:
    """Devices with what serves them and what they run."""
    serving = {worker.device_id: worker for worker in workers}
    columns = [
        Column("DEVICE", whole=True),
        Column("STATE", whole=True),
        Column("RUNS", whole=True),
        Column("MODEL", 100),
        Column("CLASS (QUEUE)", 80),
        Column("MEMORY", 90, right=True),
        Column("WARM", 150),
        Column("WORKER", 120),
    ]
    rows = []
    for device in devices:
        worker = serving.get(device.id)
        model = f"{device.model} (simulated)" if device.simulated else device.model
        name = Text(device.id)
        if device.simulated:
            name.append(" sim" if console.width >= 100 else " (simulated)", style="yellow")
        shown = state(device.state)
        if device.state == "silent":
            shown.append(f" {duration(device.seconds_silent)}")
        runs = ", ".join(
            run.job_id + (f" rank {run.rank}" if run.rank else "") for run in device.runs
        )
        rows.append(
            (
                name, shown, runs or "-", model, device.queue,
                size(device.memory_bytes), ", ".join(device.warm),
                f"pid {worker.pid}, {worker.version}" if worker else "",
            )
        )  # fmt: skip
    return table(console, columns, rows)


def suspicion(device: DeviceView) -> str:
    """Why a device that is up gets no work."""
    said = f"{device.id} gets no work, it seems deaf: {device.suspect_reason}."
    if device.suspect_until is not None:
        said += f" From {clock(device.suspect_until)} on it is tried with one job."
    return f"{said} See whether its host reaches the broker; a restart of its worker clears it."
