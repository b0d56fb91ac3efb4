"""How much memory a rank needs: arithmetic on the model's shape, for admission within microseconds.

Training is a sum of what PyTorch keeps: weights, the optimizer's state, and gradients or what backward
needs of each layer, whichever is more (gradients come as the rest goes; see ``training_bytes``). Its
coefficients were fitted to what ``workers/ranks/footprint`` counts, over sizes of each family of models;
docs/performance.md has what the sums come to against real trainings. Generation is weights, keys and
values of every row, and logits. Everything is in bytes. Nothing is read here:
``scheduler/submission/models.py`` reads ``config.json`` and the headers of the weight files into a
``ModelShape``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fnmatch import fnmatchcase

from shared.footprint import RUNTIME, Configuration
from shared.specs import GENERATIVE, PACKED_LENGTH, SEQ2SEQ, InferSpec, TrainSpec

MIB = 1024**2
FP32, BF16 = 4, 2
WIDENED = 8 * 1024 * MIB
SCORED_BYTES = 64 * MIB
"""Logits that scoring computes at once."""
BYTES_PER_TOKEN = 3
"""UTF-8 bytes of text a token stands for, on the low side: English has about 4.5."""
SPECIAL_TOKENS = 8
ROWS_WITH_ROOM = 32
"""Rows of a batch job that the device must have room for together, at most: where memory is shorter than
for all that may be computed together, the engine takes fewer."""
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
    attention_dropout: bool = False

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


@dataclass(frozen=True, slots=True)
class _Kept:
    """What backward keeps of a layer, for each token: so many tensors of the hidden size, of the MLP's
    inner size and, where attention is not fused, of heads times length. Those of one layer that exist
    for a moment are in it. Of an encoder-decoder it is the mean over both."""

    hidden: float
    inner: float
    attention: float


_WHOLE = {
    "encoder": _Kept(9.5, 2.4, 3.0),
    "decoder": _Kept(9.4, 5.3, 3.0),
    "gated": _Kept(8.4, 4.3, 3.0),
    "t5": _Kept(16.0, 3.0, 4.5),
    "seq2seq": _Kept(14.0, 2.1, 4.5),
}
_FROZEN = {
    "encoder": _Kept(6.0, 1.5, 3.0),
    "decoder": _Kept(6.7, 4.75, 3.0),
    "gated": _Kept(3.6, 3.75, 3.0),
    "t5": _Kept(10.5, 2.15, 4.5),
    "seq2seq": _Kept(9.5, 1.5, 4.5),
}
"""With LoRA: a layer whose weights are frozen need not know what it was given."""
_T5 = frozenset({"t5", "mt5", "umt5", "longt5", "switch_transformers"})
"""Their attention has a bias of its own and is never fused."""
_LAYER = re.compile(r".*?\.\d+\.")
"""The beginning of the names of a layer's weights."""
_EMBEDDED = 4.5
"""Tensors of the hidden size outside of the layers, for each token."""
_BF16_HIDDEN = 1.6
"""A layer's hidden-sized tensors in bf16 take so many times half: norms and residuals stay fp32."""
_TEACHING = 4.8
"""Further tensors of the size of the logits: a teacher's, softened, and their gradient."""
EVALUATED_TOGETHER = 16
"""Rows of an evaluation's batch, at least."""


def training_bytes(
    shape: ModelShape, asked: Configuration, teacher: ModelShape | None = None
) -> int:
    """Peak of one rank: ``4P`` weights, ``8T`` for the two moments of AdamW (or what another optimizer
    keeps), a teacher's weights, runtime; and the most of what comes and goes.

    ``P`` is all parameters and ``T`` the trainable ones. What comes and goes is activations, until
    backward has made ``4T`` of gradients of them: the larger of both, or their sum where the gradients
    stay from one micro-batch to the next, or in DDP's buckets. Precision ``auto`` counts as what takes
    more.
    """
    trainable = lora_elements(shape, asked.spec) or shape.trainable(
        asked.spec.hyperparameters.freeze
    )
    kept, passing = _optimizer_bytes(shape, asked.spec.hyperparameters.optimizer, trainable)
    gradients = FP32 * trainable
    kept += gradients * asked.waiting_sums
    halves = _halves(asked.spec.hyperparameters.precision)
    passes = max(_activations(shape, asked, half=half) for half in halves)
    if asked.gradients_stay:
        passing += gradients
        comes_and_goes = max(gradients + passes, passing)
    else:
        comes_and_goes = max(passes, gradients + passing)
    if asked.evaluates:
        comes_and_goes = max(comes_and_goes, _evaluation(shape, asked))
    taught = 0 if teacher is None else FP32 * teacher.parameters
    return round(FP32 * shape.parameters + kept + taught + comes_and_goes) + RUNTIME


def _optimizer_bytes(shape: ModelShape, optimizer: str, trainable: int) -> tuple[int, int]:
    """(what it keeps, what it holds for a moment)."""
    passing = 0
    if optimizer == "adafactor":
        largest = max((elements for _, elements in shape.tensors), default=0)
        passing = ADAFACTOR_PASSING * FP32 * min(largest, trainable)
    return STATE_BYTES[optimizer] * trainable, passing


def _activations(shape: ModelShape, asked: Configuration, *, half: bool) -> float:
    """What a micro-batch leaves for backward, at the moment at which it is most."""
    spec = asked.spec
    tokens = asked.rows * asked.length
    if _pairs(spec):
        tokens *= 2
    element = BF16 if half else FP32
    kept = (_FROZEN if spec.method == "lora" else _WHOLE)[_family(shape, spec.task)]
    hidden = kept.hidden * (_BF16_HIDDEN if half else 1)
    layer = hidden * shape.hidden + kept.inner * shape.intermediate
    if not _fused(shape, asked):
        layer += kept.attention * shape.heads * asked.length
    layers = shape.layers * layer * element
    answers = FP32 * shape.vocabulary * _logits(asked)
    if spec.hyperparameters.gradient_checkpointing:
        layers, answers = recomputed(shape, layer * element, answers), 0
    total = tokens * (layers + answers + _EMBEDDED * shape.hidden * FP32)
    if half:  # copies of the matrices, kept for backward
        total += BF16 * max(0, shape.parameters - shape.vocabulary * shape.hidden)
    return total


def recomputed(shape: ModelShape, layer: float, answers: float) -> float:
    """Bytes a token where layers keep their input alone. One of them at a time, of ``layer`` bytes, is
    computed again, when what the loss is made of, ``answers``, is gone."""
    inputs = shape.layers * shape.hidden * FP32
    return min(inputs + max(layer, answers), shape.layers * layer + answers)


def sharded_bytes(
    shape: ModelShape, asked: Configuration, ranks: int, teacher: ModelShape | None = None
) -> int:
    """Peak of one of ``ranks`` that have the model in shards: of weights, gradients and the optimizer's
    state its part; what belongs to no layer, whole, with its gradients; the layer that is computed,
    the next one, which is gathered meanwhile, and the gradients of one; and activations. A teacher is
    whole on every rank.
    """
    options = asked.spec.hyperparameters
    trainable = lora_elements(shape, asked.spec) or shape.trainable(options.freeze)
    kept, _ = _optimizer_bytes(shape, options.optimizer, trainable)
    gradients = FP32 * trainable * (1 + asked.waiting_sums)
    own = (FP32 * shape.parameters + kept + gradients) / ranks
    outside, largest = _outside_and_largest_layer(shape)
    gathered = FP32 * (2 * outside + 3 * largest)
    passes = max(_activations(shape, asked, half=half) for half in _halves(options.precision))
    if asked.evaluates:
        passes = max(passes, _evaluation(shape, asked))
    taught = 0 if teacher is None else FP32 * teacher.parameters
    return round(own + gathered + passes + taught) + RUNTIME


def _outside_and_largest_layer(shape: ModelShape) -> tuple[int, int]:
    """Elements in none of the repeated layers, and in the largest of these."""
    layers: dict[str, int] = {}
    for name, elements in shape.tensors:
        if (numbered := _LAYER.match(name)) is not None:
            layers[numbered[0]] = layers.get(numbered[0], 0) + elements
    return shape.parameters - sum(layers.values()), max(layers.values(), default=0)


def _halves(precision: str) -> tuple[bool, ...]:
    """Whether matrix products may be in half precision: ``auto`` leaves it to the device."""
    return (False, True) if precision == "auto" else (precision == "bf16",)


def _logits(asked: Configuration) -> float:
    """Tensors of the size of the vocabulary, for each token: logits, their log-softmax, gradients."""
    taught = _TEACHING if asked.spec.method == "distillation" else 0.0
    return _predicted(asked.spec) * (3 + taught)


def _predicted(spec: TrainSpec) -> float:
    """The share of the tokens that logits are computed for, at most."""
    if spec.task in GENERATIVE:
        return 1
    return spec.hyperparameters.mask_probability if spec.task == "fill-mask" else 0


def _evaluation(shape: ModelShape, asked: Configuration) -> float:
    """One layer's activations, or the logits twice, of the rows that are evaluated together."""
    tokens = max(EVALUATED_TOGETHER, asked.rows) * asked.length * (2 if _pairs(asked.spec) else 1)
    layer = 4 * shape.hidden + 2 * shape.intermediate
    if not _fused(shape, asked):
        layer += 2 * shape.heads * asked.length
    predicted = _predicted(asked.spec)
    answers = 2 * (shape.hidden + predicted * shape.vocabulary) if predicted else 0
    return tokens * FP32 * max(layer, answers)


def _pairs(spec: TrainSpec) -> bool:
    """Whether the two texts of an example go through the model together. The reference of preferences is
    computed before training."""
    return spec.task == "embeddings" or spec.preference is not None


def _fused(shape: ModelShape, asked: Configuration) -> bool:
    """Whether attention keeps nothing of the size of length times length. The CPU's fused kernel has no
    dropout."""
    if shape.model_type in _T5:
        return False
    dropout = asked.spec.hyperparameters.dropout
    drops = shape.attention_dropout if dropout is None else dropout > 0
    return asked.device == "cuda" or not drops


def _family(shape: ModelShape, task: str) -> str:
    if shape.model_type in _T5:
        return "t5"
    if task in SEQ2SEQ:
        return "seq2seq"
    if shape.gated_mlp:
        return "gated"
    return "decoder" if task in GENERATIVE else "encoder"


def lora_elements(shape: ModelShape, spec: TrainSpec) -> int:
    """Elements of the matrices that method 'lora' trains; 0 for others.

    Two projections a layer where the customary ones are taken, all seven linear layers at most.
    """
    if spec.method != "lora":
        return 0
    layers_named = min(7, len(spec.adaptation.targets) or 2)
    return 2 * spec.adaptation.r * shape.hidden * layers_named * shape.layers


def inference_bytes(shape: ModelShape, spec: InferSpec, longest_text: int | None) -> int:
    """Peak of an engine process: weights, ``2·layers·kv_heads·head_dim·bytes·rows·length`` of keys
    and values and ``rows·vocabulary`` of logits (generation) or a slice of them (scoring), one layer's
    activations, runtime. With int8 linear layers take a byte an element, once they are loaded.

    Args:
        shape: The model.
        spec: Gives batch size, lengths and precision.
        longest_text: Bytes of the longest input line; None: unknown.
    """
    element = BF16 if infers_in_bf16(shape, spec) else FP32
    weights = shape.parameters * element
    if spec.precision == "int8":
        kept = shape.parameters + FP32 * shape.vocabulary * shape.hidden
        loading, weights = weights, min(weights, kept)
    else:
        loading = weights
    length = sequence_length(shape, longest_text, spec.max_length)
    per_token = 10 * shape.hidden + 3 * shape.intermediate
    rows = min(spec.batch_size, ROWS_WITH_ROOM)
    working = rows * length * per_token * element
    total = weights + working + RUNTIME
    if spec.task in GENERATIVE:
        whole = min(length + spec.sampling.max_new_tokens, shape.positions)
        cache = 2 * shape.layers * shape.kv_heads * shape.head_dim * element
        # Logits are kept once as computed and once in fp32 for sampling.
        total += rows * (cache * whole + 2 * FP32 * shape.vocabulary)
    if spec.task == "scoring":
        total += 3 * SCORED_BYTES  # as computed, in fp32, and their log-softmax
    # What is quantised is loaded in fp32 first, when no row is there yet.
    return max(total, loading + RUNTIME)


def infers_in_bf16(shape: ModelShape, spec: InferSpec) -> bool:
    """Whether inference is meant to run in bf16, which the device must then have.

    ``auto`` uses bf16 where the device has it and fp32 elsewhere, so it counts as fp32; but a model
    that is stored in 16 bits and would be widened to more than ``WIDENED`` needs a device with bf16.
    """
    if spec.precision != "auto":
        return spec.precision == "bf16"
    narrow = shape.weight_bytes < 3 * shape.parameters
    return narrow and FP32 * shape.parameters > WIDENED


def training_length(shape: ModelShape, spec: TrainSpec, longest_text: int | None) -> int:
    """Tokens of the longest row of a training; of packed texts every block is full, however short they
    are. ``longest_text`` is in bytes; None: unknown, so the maximum."""
    options = spec.hyperparameters
    if options.packing:
        return sequence_length(shape, None, options.max_length or PACKED_LENGTH)
    return sequence_length(shape, longest_text, options.max_length)


def sequence_length(shape: ModelShape, longest_text: int | None, max_length: int | None) -> int:
    """Tokens of the longest row, as far as data, spec and model limit it."""
    length = min(shape.positions, max_length or shape.positions)
    if longest_text is not None:
        length = min(length, longest_text // BYTES_PER_TOKEN + SPECIAL_TOKENS)
    return max(1, length)
