"""gpuyard: your GPUs as your own fine-tuning and batch-inference service. This is its client."""

from gpuyard.client import Client
from gpuyard.errors import CorruptDownload, JobFailed, WaitTimedOut
from shared.errors import GpuyardError
from shared.specs import InferSpec, TrainSpec, parse_spec

__all__ = [
    "Client",
    "CorruptDownload",
    "GpuyardError",
    "InferSpec",
    "JobFailed",
    "TrainSpec",
    "WaitTimedOut",
    "parse_spec",
]
