"""Which engine computes a job. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from shared.errors import UnsupportedModel
from shared.messages import InferAssignment

EngineName = Literal["gpuyard", "vllm"]
VLLM_PYTHON = "GPUYARD_VLLM_PYTHON"
"""The variable by which the operator names the interpreter of vLLM's own environment."""


@dataclass(frozen=True, slots=True)
class Choice:
    name: EngineName
    reason: str


def choose_engine(assignment: InferAssignment, environment: Mapping[str, str]) -> Choice:
    """The engine that the spec asks for; ``auto`` is vLLM for text-generation on a CUDA device whose worker
    has it, and gpuyard's own for everything else.

    Raises:
        UnsupportedModel: vLLM is asked for and is not installed here.
    """
    spec, device = assignment.spec, assignment.device
    python = environment.get(VLLM_PYTHON)
    if spec.engine == "gpuyard":
        return Choice("gpuyard", "the spec asks for it")
    if spec.engine == "vllm":
        if assignment.adapter_path is not None:
            raise UnsupportedModel(
                "engine vllm is given no adapter",
                param="engine",
                hint="Use engine auto, or the model with the adapter merged into it.",
            )
        if not python:
            raise _not_installed(f"its worker has no {VLLM_PYTHON}", device.id)
        if not Path(python).is_file():
            raise _not_installed(f"{VLLM_PYTHON} names '{python}', which is not there", device.id)
        return Choice("vllm", "the spec asks for it")
    if spec.task != "text-generation":
        return Choice("gpuyard", f"{spec.task} is computed by it alone")
    if device.kind != "cuda":
        return Choice("gpuyard", "the device is a CPU")
    if not python or not Path(python).is_file():
        return Choice("gpuyard", "vLLM is not installed here")
    own = assignment.adapter_path is not None or spec.sampling.json_schema is not None
    if own or spec.precision == "int8":
        return Choice("gpuyard", "the spec asks for what vLLM is not given")
    return Choice("vllm", "text-generation on a GPU")


def _not_installed(why: str, device: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"engine vllm is not installed on device '{device}': {why}",
        param="engine",
        hint="Use engine auto, or have the operator install it; see docs/engines.md.",
        code="engine_not_installed",
    )
