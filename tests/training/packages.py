"""Installs a small package into a folder, as pip would: a module, and a dist-info that declares its
entry points."""

from __future__ import annotations

from pathlib import Path

from workers.ranks.train.datasets import GROUP


def install(folder: Path, module: str, code: str, **datasets: str) -> Path:
    """``datasets`` are names of entry points and what they name in the module."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{module}.py").write_text(code)
    info = folder / f"{module}-1.0.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
    declared = "".join(f"{name} = {module}:{what}\n" for name, what in datasets.items())
    (info / "entry_points.txt").write_text(f"[{GROUP}]\n{declared}")
    return folder
