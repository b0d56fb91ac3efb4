"""From ids and references to addresses of the service and paths here, with nothing that leads elsewhere."""

from __future__ import annotations

import re
from pathlib import PurePosixPath

from shared.errors import InvalidRequest
from shared.specs import MODEL_NAME


def segment(id: str) -> str:
    """An id as one piece of a path: what is no id must not lead elsewhere.

    Raises:
        InvalidRequest: it is none.
    """
    if not id.isascii() or not id.replace("_", "").isalnum():
        raise InvalidRequest(f"{id!r} is no id", param="id", hint="`gpuyard jobs` lists the ids.")
    return id


def reference_of(reference: str) -> tuple[str, str]:
    """(name, version) of ``name@version``; without a version the latest."""
    name, _, version = reference.partition("@")
    return name, version or "latest"


def models_at(name: str, *version: str) -> str:
    """Raises InvalidRequest: what is no name or version must not lead elsewhere."""
    for part in (name, *version):
        if re.fullmatch(MODEL_NAME, part) is None:
            raise InvalidRequest(
                f"{'@'.join((name, *version))!r} is no model reference",
                param="model",
                hint="It is name@version, such as topics@2; `gpuyard models` lists them.",
            )
    return "/".join(["/v1/models", name, *version])


def at(kind: str, id: str, *rest: str) -> str:
    return "/".join(["/v1", kind, segment(id), *rest])


def suffix_of(name: str) -> str:
    return PurePosixPath(name).suffix.lower()


def inside(name: str) -> PurePosixPath:
    """An artifact's name as a path below the folder of the download, whatever the service says."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts:
        raise InvalidRequest(f"the artifact {name!r} would lie outside the folder", param="name")
    return path
