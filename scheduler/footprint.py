"""How much memory a rank needs: arithmetic on the model's shape, for admission within microseconds.

Training follows the closed formula of what PyTorch keeps (weights, gradients, the optimizer's state,
what backward needs of each layer); measured against the truth it lies 11 to 15% high, which is the
right side. Generation is weights, keys and values of every row, and logits. Everything is in bytes.
Nothing is read here: ``scheduler/submission/models.py`` reads ``config.json`` and the headers of the
weight files into a ``ModelShape``.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase

from shared.specs import GENERATIVE, PACKED_LENGTH, InferSpec, TrainSpec

MIB = 1024**2
RUNTIME = 512 * MIB
"""What a process with torch takes before the first tensor: libraries, CUDA context, allocator."""
FP32, BF16 = 4, 2
WIDENED = 8 * 1024 * MIB
BYTES_PER_TOKEN = 3
"""UTF-8 bytes of text a token stands for, on the low side: English has about 4.5."""
SPECIAL_TOKENS = 8
STATE_BYTES = {"adamw": 8, "adam": 8, "sgd": 4, "adafactor": 0}
"""That an optimizer keeps of each trained element, in fp32: two moments, one, or only sums of rows and
columns, which are too few to count."""
ADAFACTOR_PASSING = 3
"""Tensors of the size of the largest that Adafactor holds while it updates that one."""


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What the estimate needs to know of a model; sizes in elements."""

    tensors: tuple[tuple[str, int], ...]
    """Name and number of elements of each weight."""
    weight_bytes: int
    """As stored."""
    model_type: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    positions: int
    """Tokens the model can see."""
    gated_mlp: bool = False

    @property
    def parameters(self) -> int:
        return sum(elements for _, elements in self.tensors)

    def trainable(self, freeze: tuple[str, ...]) -> int:
        """Elements that no pattern of ``freeze`` names (fnmatch, as the training rank reads them).

        Weight files of a bare encoder lack the prefix that its parameters have under a head, so a
        pattern may name a tensor with or without it.
        """
        return sum(
            elements
            for name, elements in self.tensors
            if not any(
                fnmatchcase(name, pattern) or fnmatchcase(f"{self.model_type}.{name}", pattern)
                for pattern in freeze
            )
        )


def training_bytes(shape: ModelShape, spec: TrainSpec, longest_text: int | None) -> int:
    """Peak of one rank: ``4P`` weights, ``4T`` gradients, ``8T`` for the two moments of AdamW (or what
    another optimizer keeps), activations, runtime.

    ``P`` is all parameters and ``T`` the trainable ones. Per token and layer, backward keeps about
    ten hidden-sized tensors (norms, q, k, v, attention, dropout, residuals) and two of the MLP's
    inner size, three where it is gated; attention itself is recomputed in blocks (SDPA). A language
    model also keeps what its loss is made of, for every token and word of its vocabulary.

    Args:
        shape: The model.
        spec: Gives optimizer, micro-batch, freezing, maximum length and precision.
        longest_text: Bytes of the longest text of the data; None: unknown, so the maximum length.
    """
    options = spec.hyperparameters
    rows, waiting = spec.world_sizes.micro_batch, spec.world_sizes.waiting_sums
    if spec.preference is not None:  # both answers; the reference is computed before training
        rows *= 2
    if options.packing:  # every block is full, however short the texts are
        length = sequence_length(shape, None, options.max_length or PACKED_LENGTH)
    else:
        length = sequence_length(shape, longest_text, options.max_length)
    element = BF16 if options.precision == "bf16" else FP32
    trainable = lora_elements(shape, spec) or shape.trainable(options.freeze)
    per_token = 10 * shape.hidden + (3 if shape.gated_mlp else 2) * shape.intermediate
    activations = shape.layers * rows * length * per_token * element
    embeddings = rows * length * shape.hidden * element * 2
    logits = rows * length * _logits_bytes(shape, spec.task)
    if spec.task == "embeddings":  # both texts of a pair go through the model together
        activations, embeddings = 2 * activations, 2 * embeddings
    updating = FP32 * trainable * (1 + waiting) + _optimizer_bytes(
        shape, options.optimizer, trainable
    )
    return FP32 * shape.parameters + updating + activations + embeddings + logits + RUNTIME


def _optimizer_bytes(shape: ModelShape, optimizer: str, trainable: int) -> int:
    kept = STATE_BYTES[optimizer] * trainable
    if optimizer == "adafactor":
        largest = max((elements for _, elements in shape.tensors), default=0)
        kept += ADAFACTOR_PASSING * FP32 * min(largest, trainable)
    return kept


def teaching_bytes(teacher: ModelShape) -> int:
    """What a teacher takes beside its student: its weights. Its activations are of one layer at a
    time, less than what the student's backward keeps."""
    return FP32 * teacher.parameters


def lora_elements(shape: ModelShape, spec: TrainSpec) -> int:
    """Elements of the matrices that method 'lora' trains; 0 for others.

    Two projections a layer where the customary ones are taken, all seven linear layers at most.
    """
    if spec.method != "lora":
        return 0
    layers_named = min(7, len(spec.adaptation.targets) or 2)
    return 2 * spec.adaptation.r * shape.hidden * layers_named * shape.layers


def _logits_bytes(shape: ModelShape, task: str) -> int:
    """For each token of a language model: logits in fp32, their log-softmax, and its gradient."""
    return 3 * FP32 * shape.vocabulary if task in (*GENERATIVE, "fill-mask") else 0


def inference_bytes(shape: ModelShape, spec: InferSpec, longest_text: int | None) -> int:
    """Peak of an engine process: weights, ``2·layers·kv_heads·head_dim·bytes·rows·length`` of keys
    and values and ``rows·vocabulary`` of logits (generation), one layer's activations, runtime.

    Args:
        shape: The model.
        spec: Gives batch size, lengths and precision.
        longest_text: Bytes of the longest input line; None: unknown.
    """
    element = BF16 if infers_in_bf16(shape, spec) else FP32
    length = sequence_length(shape, longest_text, spec.max_length)
    per_token = 10 * shape.hidden + 3 * shape.intermediate
    working = spec.batch_size * length * per_token * element
    total = shape.parameters * element + working + RUNTIME
    if spec.task in GENERATIVE:
        whole = min(length + spec.sampling.max_new_tokens, shape.positions)
        cache = 2 * shape.layers * shape.kv_heads * shape.head_dim * element
        # Logits are kept once as computed and once in fp32 for sampling.
        total += spec.batch_size * (cache * whole + 2 * FP32 * shape.vocabulary)
    return total


def infers_in_bf16(shape: ModelShape, spec: InferSpec) -> bool:
    """Whether inference is meant to run in bf16, which the device must then have.

    ``auto`` uses bf16 where the device has it and fp32 elsewhere, so it counts as fp32; but a model
    that is stored in 16 bits and would be widened to more than ``WIDENED`` needs a device with bf16.
    """
    if spec.precision != "auto":
        return spec.precision == "bf16"
    narrow = shape.weight_bytes < 3 * shape.parameters
    return narrow and FP32 * shape.parameters > WIDENED


def sequence_length(shape: ModelShape, longest_text: int | None, max_length: int | None) -> int:
    """Tokens of the longest row, as far as data, spec and model limit it."""
    length = min(shape.positions, max_length or shape.positions)
    if longest_text is not None:
        length = min(length, longest_text // BYTES_PER_TOKEN + SPECIAL_TOKENS)
    return max(1, length)
