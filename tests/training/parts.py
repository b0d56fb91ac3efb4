"""Models that are loaded to be cut, by one rank of several: run by ``in_another_process``."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from shared.specs import Lora
from workers.ranks import loading
from workers.ranks.promises import Promise
from workers.ranks.train.device import Compute
from workers.ranks.train.gang import Gang
from workers.ranks.train.lora import add_lora
from workers.ranks.train.parallel import Parallel
from workers.ranks.train.sharding import local
from workers.ranks.train.state import sample_weights

LABELS = ("one", "two", "three")
LOADS: dict[str, Callable[[Path], PreTrainedModel]] = {
    "classifier": lambda f: loading.load_sequence_classifier(f, labels=LABELS, seed=3).model,
    "masked-lm": lambda f: loading.load_masked_lm(f, allow_fresh_head=True, seed=3),
    "causal-lm": lambda f: loading.load_causal_lm(f, torch.float32),
    "seq2seq": lambda f: loading.load_seq2seq(f, dtype=torch.float32),
    "encoder": lambda f: loading.load_encoder(f, dtype=torch.float32),
}


def differences(
    cases: list[tuple[str, Path, bool]], store: Path, rank: int, ranks: int
) -> list[tuple[list[str], int, list[str]]]:
    """Of each case (kind, folder, with LoRA): what this rank has of the model differs, by the names of
    its tensors, from what it has of one that was loaded whole; how many parameters were promised;
    and what was told."""
    parallel, gang = _join(store, rank, ranks)
    found = []
    for kind, folder, lora in cases:
        cut, told, count = [], [], 0
        for promise in (True, False):
            with parallel.loading(told.append) if promise else nullcontext():
                model = LOADS[kind](folder)
            count += sum(isinstance(p, Promise) for p in model.parameters())
            if lora:
                add_lora(model, Lora(), seed=7, train_head=kind == "classifier")
            parallel.divide(model)
            cut.append((model, sample_weights(model, gang)))
        (model, samples), (whole, theirs) = cut
        found.append((_differing(model, whole) + _unequal(samples, theirs), count, told))
    return found


def _differing(model: PreTrainedModel, whole: PreTrainedModel) -> list[str]:
    names: list[str] = []
    for kind in ("parameters", "buffers"):
        own, theirs = (dict(getattr(each, f"named_{kind}")()) for each in (model, whole))
        assert list(own) == list(theirs)
        for name, tensor in theirs.items():
            same = torch.equal(local(own[name].detach()), local(tensor.detach()))
            alike = own[name].dtype == tensor.dtype and own[name].shape == tensor.shape
            trained = own[name].requires_grad == tensor.requires_grad
            if not (same and alike and trained):
                names.append(name)
    configs = [each.config.to_json_string() for each in (model, whole)]
    if model.can_generate():
        configs += [each.generation_config.to_json_string() for each in (model, whole)]
    return names + ["config"] * (configs[::2] != configs[1::2])


def _unequal(samples: dict[str, bytes], theirs: dict[str, bytes]) -> list[str]:
    return [f"sample of {name}" for name in theirs if samples.get(name) != theirs[name]]


def memory_taken(
    small: Path, folder: Path, store: Path, rank: int, ranks: int, promise: bool
) -> int:
    """Bytes of its own memory that a rank takes at most while it loads and cuts a language model. The
    ``small`` one goes before it, as what is imported meanwhile does not count."""
    parallel, _ = _join(store, rank, ranks)
    told: list[str] = []
    for each in (small, folder):
        with _watched() as most:
            with parallel.loading(told.append) if promise else nullcontext():
                model = LOADS["causal-lm"](each)
            parallel.divide(model)
    assert not told, told
    return most[1] - most[0]


def _join(store: Path, rank: int, ranks: int) -> tuple[Parallel, Gang]:
    torch.set_num_threads(1)
    shared = dist.FileStore(str(store), ranks)
    dist.init_process_group("gloo", store=shared, rank=rank, world_size=ranks)
    compute = Compute(torch.device("cpu"), "gloo", None)
    gang = Gang(rank, ranks, compute.device, shared, sharded=True)
    return Parallel(compute, gang), gang


@contextmanager
def _watched() -> Iterator[list[int]]:
    """[at the beginning, at most], as of now; the most is known at the end."""
    most, over = [_own_memory()] * 2, threading.Event()

    def watch() -> None:
        while not over.wait(0.001):
            most[1] = max(most[1], _own_memory())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield most
    finally:
        over.set()
        thread.join()
        most[1] = max(most[1], _own_memory())


def _own_memory() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024
