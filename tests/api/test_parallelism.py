"""Whole models or shards: what is chosen, why, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import pytest

from scheduler.footprint import ModelShape, sharded_bytes, training_bytes
from scheduler.submission.parallelism import Choice, choose_parallelism, in_shards
from scheduler.submission.requirements import asked
from shared.capability import GIB
from shared.errors import InvalidSpec
from shared.footprint import RUNTIME, Configuration, configuration
from shared.resolved import Requirements
from shared.specs import TrainSpec, parse_spec
from tests.scheduler.fleets import fleet

Spec = Callable[..., dict[str, Any]]
LAYER, LAYERS, OUTSIDE = 200_000_000, 32, 260_000_000
BILLIONS = ModelShape(
    tensors=(
        ("model.embed_tokens.weight", OUTSIDE),
        *(
            (f"model.layers.{n}.{part}.weight", LAYER // 2)
            for n in range(LAYERS)
            for part in ("attention", "mlp")
        ),
    ),
    weight_bytes=2 * 6_660_000_000, model_type="llama", hidden=4096, layers=LAYERS, heads=32,
    kv_heads=32, head_dim=128, intermediate=11008, vocabulary=32000, positions=4096, gated_mlp=True,
)  # fmt: skip


def spec(**changes: Any) -> TrainSpec:
    parsed = parse_spec(
        {
            "kind": "train", "task": "text-classification", "model": "m", "data": {"train": "x"},
            "resources": {"devices": 8}, "hyperparameters": {"batch_size": 8}, **changes,
        }
    )  # fmt: skip
    assert isinstance(parsed, TrainSpec)
    return parsed


def question(of: TrainSpec) -> Configuration:
    return configuration(of, {}, None, labels=2, length=128, device="cuda")


def whole(of: TrainSpec) -> Requirements:
    return asked(of).model_copy(update={"memory_bytes": training_bytes(BILLIONS, question(of))})


def choose(of: TrainSpec, devices: str) -> Choice:
    part = sharded_bytes(BILLIONS, question(of), whole(of).devices)
    return choose_parallelism(of, whole(of), part, fleet(devices) if devices else [])


def test_a_part_of_the_state_one_layer_and_what_is_outside_of_all() -> None:
    of = spec(hyperparameters={"batch_size": 8, "precision": "fp32"})
    activations = sharded_bytes(BILLIONS, question(of), 10**12) - RUNTIME
    gathered = 4 * (2 * OUTSIDE + 3 * LAYER)
    assert gathered < activations < gathered + 1.5 * GIB
    state = 16 * (LAYERS * LAYER + OUTSIDE)
    for ranks in (2, 8):
        part = sharded_bytes(BILLIONS, question(of), ranks)
        assert part == pytest.approx(state / ranks + activations + RUNTIME, rel=1e-6)


def test_gradient_checkpointing_takes_less() -> None:
    plain = {"batch_size": 256, "micro_batch_size": 8, "precision": "fp32"}
    less = {**plain, "gradient_checkpointing": True}
    for estimate in (training_bytes, lambda *of: sharded_bytes(*of, 4)):
        saved = estimate(BILLIONS, question(spec(hyperparameters=plain))) - estimate(
            BILLIONS, question(spec(hyperparameters=less))
        )
        assert saved > 0.7 * 8 * 128 * LAYERS * 8 * 4096 * 4


@pytest.mark.parametrize(
    ("devices", "chosen", "says"),
    [
        ("8xA100-40GB", "fsdp", "no device of the fleet has the"),
        ("8xA100-40GB,1xH200-288GB", "ddp", "a device of the fleet has the"),
        ("8xT4-16GB", "ddp", "in shards it would not run either: no device of the fleet fits"),
        ("4xA100-40GB", "ddp", "needs 8 devices, the fleet has 4"),
        ("", "ddp", "in shards it would not run either"),
    ],
)
def test_auto_divides_only_what_fits_in_no_other_way(devices: str, chosen: str, says: str) -> None:
    choice = choose(spec(), devices)
    assert (choice.parallelism, says in choice.reason) == (chosen, True), choice


def test_what_the_user_says_counts() -> None:
    assert choose(spec(parallelism="ddp"), "8xA100-40GB").parallelism == "ddp"
    assert choose(spec(parallelism="fsdp"), "8xH200-288GB").parallelism == "fsdp"
    of = spec(resources={"devices": 8, "memory_gb": 30})
    assert choose(of, "8xA100-40GB").parallelism == "ddp"
    assert in_shards(asked(of), 1).memory_bytes == 30 * GIB
    adafactor = {"batch_size": 8, "optimizer": "adafactor"}
    assert choose(spec(hyperparameters=adafactor), "8xA100-40GB").parallelism == "ddp"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"resources": {"devices": 1}}, "nothing to divide the model among"),
        (
            {"hyperparameters": {"optimizer": "adafactor", "batch_size": 8}},
            "choose another optimizer",
        ),
    ],
)
def test_what_cannot_be_in_shards_is_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidSpec, match=says):
        spec(parallelism="fsdp", **changes)


def test_the_choice_is_told(client: httpx.Client, train_spec: Spec) -> None:
    divided = train_spec(parallelism="fsdp", resources={"devices": 4})
    answer = client.post("/v1/jobs", json=divided)
    assert answer.status_code == 201, answer.text
    job = answer.json()["id"]
    [told] = client.get(f"/v1/jobs/{job}/events", params={"format": "json"}).json()
    assert "the model in shards (FSDP), as asked for" in told["message"]
    alone = client.get(f"/v1/jobs/{job}").json()["requirements"]["memory_bytes"]
    answer = client.post("/v1/jobs", json=train_spec(resources={"devices": 4}))
    with_all = client.get(f"/v1/jobs/{answer.json()['id']}").json()["requirements"]["memory_bytes"]
    assert 0 < alone < with_all
