"""The estimate against sums done by hand, and what it must never do."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.footprint import (
    ROWS_WITH_ROOM,
    ModelShape,
    inference_bytes,
    infers_in_bf16,
    sequence_length,
    training_bytes,
    training_length,
)
from scheduler.submission.requirements import requirements
from shared.capability import GIB
from shared.footprint import RUNTIME, configuration
from shared.specs import InferSpec, TrainSpec, parse_spec

MINILM = ModelShape(
    tensors=(("embeddings.word_embeddings.weight", 11_720_448), ("encoder.weight", 10_993_152)),
    weight_bytes=4 * 22_713_600, model_type="bert", hidden=384, layers=6, heads=12, kv_heads=12,
    head_dim=32, intermediate=1536, vocabulary=30522, positions=512,
)  # fmt: skip
LLAMA_7B = ModelShape(
    tensors=(("w", 6_738_415_616),), weight_bytes=2 * 6_738_415_616, model_type="llama",
    hidden=4096, layers=32, heads=32, kv_heads=32, head_dim=128, intermediate=11008,
    vocabulary=32000, positions=4096, gated_mlp=True,
)  # fmt: skip


def train(**hyperparameters: Any) -> TrainSpec:
    spec = parse_spec(
        {
            "kind": "train", "task": "text-classification", "model": "m", "data": {"train": "x"},
            "resources": hyperparameters.pop("resources", {"devices": 2}),
            "hyperparameters": hyperparameters,
        }
    )  # fmt: skip
    assert isinstance(spec, TrainSpec)
    return spec


def trains(shape: ModelShape, spec: TrainSpec, longest: int | None, device: str = "cpu") -> int:
    """Bytes of a rank of this training."""
    asked = configuration(
        spec, {}, None, labels=2, length=training_length(shape, spec, longest), device=device
    )  # type: ignore[arg-type]
    return training_bytes(shape, asked)


def generate(**changes: Any) -> InferSpec:
    fields = {"kind": "infer", "task": "text-generation", "model": "m", "input": "x", **changes}
    spec = parse_spec(fields)
    assert isinstance(spec, InferSpec)
    return spec


def test_training_by_hand() -> None:
    # 16 rows a rank, 32 tokens: 96 bytes of text / 3 = 32, less nothing, and 8 special ones.
    length = 96 // 3 + 8
    layers = 6 * 16 * length * (9.5 * 384 + 2.4 * 1536) * 4
    embeddings = 16 * length * 384 * 4.5 * 4
    # Two ranks: the gradients lie in DDP's buckets, beside all else.
    expected = 16 * 22_713_600 + layers + embeddings + RUNTIME
    assert abs(trains(MINILM, train(batch_size=32, precision="fp32"), 96) - expected) <= 1


def test_gradients_come_as_activations_go() -> None:
    one = {"resources": {"devices": 1}, "precision": "fp32"}
    weights_and_moments = 12 * 22_713_600 + RUNTIME
    small, large = (trains(MINILM, train(batch_size=n, **one), 96) for n in (4, 64))
    assert small - weights_and_moments == 4 * 22_713_600, "few activations: the gradients"
    half = trains(MINILM, train(batch_size=32, **one), 96)
    assert abs((large - weights_and_moments) - 2 * (half - weights_and_moments)) <= 2
    accumulated = trains(MINILM, train(batch_size=64, micro_batch_size=32, **one), 96)
    assert accumulated - half == 4 * 22_713_600, "from one micro-batch to the next they stay"


def test_frozen_parameters_need_no_gradient_and_no_moments() -> None:
    whole = trains(MINILM, train(), 96)
    for pattern in ("bert.embeddings.*", "embeddings.*"):
        assert whole - trains(MINILM, train(freeze=[pattern]), 96) == 12 * 11_720_448


def test_attention_with_dropout_takes_more_on_a_cpu_alone() -> None:
    drops = replace(MINILM, attention_dropout=True)
    spec = train(precision="fp32")
    assert trains(drops, spec, 900, "cuda") == trains(MINILM, spec, 900) < trains(drops, spec, 900)
    none = train(precision="fp32", dropout=0.0)
    assert trains(drops, none, 900) == trains(MINILM, spec, 900)


def test_packed_blocks_are_full_however_short_the_texts() -> None:
    def needs(**hyperparameters: Any) -> int:
        spec = parse_spec(
            {
                "kind": "train", "task": "text-generation", "model": "m", "data": {"train": "x"},
                "hyperparameters": {"batch_size": 4, **hyperparameters},
            }
        )  # fmt: skip
        assert isinstance(spec, TrainSpec)
        return trains(LLAMA_7B, spec, 30)

    assert needs(packing=True) == needs(packing=True, max_length=2048) > needs()
    # Of 4 blocks of 1,024: the logits of 32,000 words in fp32, thrice.
    assert needs(packing=True) - needs(packing=True, max_length=1024) > 4 * 1024 * 32000 * 12


def test_each_optimizer_keeps_what_it_keeps() -> None:
    adamw = trains(MINILM, train(), 96)
    assert trains(MINILM, train(optimizer="adam"), 96) == adamw
    assert adamw - trains(MINILM, train(optimizer="sgd"), 96) == 4 * 22_713_600
    long = train(optimizer="adafactor", precision="fp32")
    adamw, adafactor = trains(MINILM, train(precision="fp32"), 1500), trains(MINILM, long, 1500)
    assert adamw - adafactor == 8 * 22_713_600, "what passes is less than activations"


def test_generation_by_hand() -> None:
    spec = generate(batch_size=8, precision="bf16", generation={"max_new_tokens": 100})
    length = 300 // 3 + 8
    cache = 8 * (length + 100) * 2 * 32 * 32 * 128 * 2
    working = 8 * length * (10 * 4096 + 3 * 11008) * 2
    expected = 2 * 6_738_415_616 + cache + 8 * 2 * 4 * 32000 + working + RUNTIME
    assert inference_bytes(LLAMA_7B, spec, 300) == expected


def test_a_large_model_in_16_bits_needs_a_device_that_has_them() -> None:
    needs = requirements(generate(), LLAMA_7B, inference_bytes(LLAMA_7B, generate(), 300))
    assert needs.features == ("bf16",)
    assert 13 * GIB < needs.memory_bytes < 24 * GIB
    assert not infers_in_bf16(LLAMA_7B, generate(precision="fp32"))
    small = replace(LLAMA_7B, tensors=(("w", 135_000_000),), weight_bytes=270_000_000)
    assert requirements(generate(), small, 5).features == ()


def test_int8_takes_a_byte_for_a_weight_once_it_is_loaded() -> None:
    """What it is loaded from is fp32, and gone when rows come."""
    few = {"batch_size": 1, "max_length": 8, "generation": {"max_new_tokens": 8}}
    many = {"batch_size": 64, "generation": {"max_new_tokens": 500}}

    def needs(precision: str, rows: dict[str, Any]) -> int:
        return inference_bytes(LLAMA_7B, generate(precision=precision, **rows), 4000)

    parameters, embedded = LLAMA_7B.parameters, 4 * 32000 * 4096
    assert needs("int8", few) == 4 * parameters + RUNTIME
    assert needs("fp32", many) - needs("int8", many) == 3 * parameters - embedded


def test_the_figures_of_the_user_replace_the_estimate() -> None:
    spec = generate(resources={"memory_gb": 40, "min_compute_capability": 8.6})
    needs = requirements(spec, LLAMA_7B, 5)
    assert (needs.memory_bytes, needs.memory_from) == (40 * GIB, "user")
    assert needs.compute_capability == 86


@settings(max_examples=100, deadline=None)
@given(
    rows=st.integers(1, 64),
    longest=st.none() | st.integers(0, 100_000),
    limit=st.none() | st.integers(4, 10_000),
)
def test_more_is_never_less(rows: int, longest: int | None, limit: int | None) -> None:
    """A larger batch or longer texts never need less, and the length stays within the model's."""
    assert 1 <= sequence_length(MINILM, longest, limit) <= MINILM.positions

    def needs(rows: int, longest: int | None) -> tuple[int, int]:
        training = train(batch_size=2 * rows, max_length=limit)
        spec = generate(batch_size=rows, max_length=limit)
        return (
            trains(MINILM, training, longest),
            inference_bytes(MINILM, spec, longest),
        )

    now, more = needs(rows, longest), needs(rows + 1, longest)
    assert more[0] > now[0] > 16 * MINILM.parameters
    # Beyond so many rows the engine takes what there is room for.
    assert more[1] > now[1] if rows < ROWS_WITH_ROOM else more[1] == now[1]
    assert now[1] > 4 * MINILM.parameters
    unknown = needs(rows, None)
    assert unknown[0] >= now[0] and unknown[1] >= now[1]
