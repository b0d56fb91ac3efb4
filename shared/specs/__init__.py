"""What a user asks for: job specs as data, never code.

A spec is validated whole before anything is stored; unknown fields are refused, so that a typo
never becomes a silent default. Everything here is pure: whether a model or a file exists is
checked by ``scheduler/submission``.
"""

from shared.specs.common import (
    GENERATIVE,
    INFERENCE_ONLY,
    MODEL,
    MODEL_NAME,
    MODELS,
    SEQ2SEQ,
    Accelerator,
    BatchResources,
    DeviceRange,
    Feature,
    JobFields,
    Precision,
    Resources,
    Retry,
    Strict,
    Task,
    TrainPrecision,
)
from shared.specs.data import (
    ARCHITECTURE_TASKS,
    PACKED_LENGTH,
    PLAIN_TEXT_TASKS,
    PREFERENCE_COLUMNS,
    TASK_COLUMNS,
    TASK_OPTIONS,
    Architecture,
    Columns,
    DataFormat,
    InstalledDataset,
    TrainData,
)
from shared.specs.hyperparameters import (
    OPTIMIZER_OPTIONS,
    TEACHABLE,
    Checkpointing,
    Distilling,
    EarlyStopping,
    Hyperparameters,
    Lora,
    Preference,
)
from shared.specs.inference import (
    OF_A_ROW,
    OPTIONS_OF_A_TASK,
    Embedding,
    Generation,
    InferSpec,
)
from shared.specs.parsing import (
    JobSpec,
    parse_spec,
)
from shared.specs.training import (
    Problem,
    TrainSpec,
)

__all__ = [
    "ARCHITECTURE_TASKS",
    "GENERATIVE",
    "INFERENCE_ONLY",
    "MODEL",
    "MODELS",
    "MODEL_NAME",
    "OF_A_ROW",
    "OPTIMIZER_OPTIONS",
    "OPTIONS_OF_A_TASK",
    "PACKED_LENGTH",
    "PLAIN_TEXT_TASKS",
    "PREFERENCE_COLUMNS",
    "SEQ2SEQ",
    "TASK_COLUMNS",
    "TASK_OPTIONS",
    "TEACHABLE",
    "Accelerator",
    "Architecture",
    "BatchResources",
    "Checkpointing",
    "Columns",
    "DataFormat",
    "DeviceRange",
    "Distilling",
    "EarlyStopping",
    "Embedding",
    "Feature",
    "Generation",
    "Hyperparameters",
    "InferSpec",
    "InstalledDataset",
    "JobFields",
    "JobSpec",
    "Lora",
    "Precision",
    "Preference",
    "Problem",
    "Resources",
    "Retry",
    "Strict",
    "Task",
    "TrainData",
    "TrainPrecision",
    "TrainSpec",
    "parse_spec",
]
