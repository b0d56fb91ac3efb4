"""What the model thinks of the answers before training: the reference of preference optimisation.

No second model is held: the numbers are computed once, by all ranks together, before a weight changes,
and kept beside the token cache for attempts to come. Batches do not depend on how many ranks there are, so
an attempt that has to compute them anew gets the same to the bit on hardware of the same kind. An adapter
may be there already: a new one adds nothing, as one of its matrices is zero.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import secrets
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from torch import nn

from shared.messages import TrainAssignment
from workers.ranks.checkpoint import place
from workers.ranks.train.device import Compute
from workers.ranks.train.examples import Examples
from workers.ranks.train.gang import Gang
from workers.ranks.train.parallel import Parallel
from workers.ranks.train.reports import Reporter
from workers.ranks.train.sharding import local
from workers.ranks.train.state import require_agreement
from workers.ranks.train.tasks.preferences import REFERENCE, Preferences

KEPT_SECONDS = 14 * 24 * 3600.0
"""A file that nobody read for so long is deleted by who writes the next."""
PAIRS_TOGETHER = 8
_SUMMED_TOGETHER = 1 << 18
_POLL_SECONDS = 0.1
_ASIDE = ".writing-"
_OF_ADAPTER = ".lora_"
"""What is in the names of PEFT's matrices."""

Numbers = NDArray[np.float64]
"""[chosen and rejected, examples]"""


def add_reference(
    assignment: TrainAssignment,
    task: Preferences,
    training: Examples,
    validation: Examples | None,
    compute: Compute,
    gang: Gang,
    parallel: Parallel,
    reporter: Reporter,
) -> tuple[Examples, Examples | None]:
    """The examples with the log-likelihood of each answer beside them. ``task``'s model is untrained,
    and in ``eval`` mode afterwards.

    Raises:
        TrainingFailed: the ranks do not see the same data (infrastructure).
        Stopped: the worker ordered it, or is gone.
    """
    folder = None if assignment.cache_dir is None else Path(assignment.cache_dir) / "reference"
    micro = assignment.micro_batch or assignment.spec.hyperparameters.micro_batch_size
    together = min(PAIRS_TOGETHER, micro or PAIRS_TOGETHER)
    digests = {"training": training.digest()}
    if validation is not None:
        digests["validation"] = validation.digest()
    # What follows adds up arrays over the ranks: of unequal sizes they would wait for ever.
    require_agreement(gang, digests, "examples")
    model = task.loaded.model
    model.eval()  # type: ignore[no-untyped-call]
    identity = None
    if gang.share("reference/kept", folder is not None) and (gang.rank == 0 or gang.sharded):
        # Once: of a large model it takes a while.
        identity = _identity(model, gang)

    def added(examples: Examples, role: str) -> Examples:
        began, key = time.monotonic(), None
        if identity is not None and gang.rank == 0:
            key = _key(identity, examples, compute, together)
        numbers = _find(folder, key, len(examples))
        # Not by the store's own timeout: hashing a large model takes a while.
        if gang.rank != 0:
            gang.wait_for(f"reference/{role}", lambda: reporter.check_orders(wait=_POLL_SECONDS))
        if gang.share(f"reference/{role}", numbers is not None):
            how = "from the cache"
            numbers = _spread(numbers, len(examples), gang)
        else:
            how = "computed"
            numbers = _compute(
                task, examples, together, compute, gang, parallel, reporter.check_orders
            )
            _keep(folder, key, numbers, reporter)
        seconds = time.monotonic() - began
        reporter.say(f"reference of {len(examples):,} {role} pairs {how}, {seconds:.1f} s")
        return examples.beside(dict(zip(REFERENCE, numbers, strict=True)))

    return added(training, "training"), validation and added(validation, "validation")


def _compute(
    task: Preferences,
    examples: Examples,
    together: int,
    compute: Compute,
    gang: Gang,
    parallel: Parallel,
    check_orders: Callable[[], object],
) -> Numbers:
    """Each rank its share of the batches; all get all numbers."""
    numbers = np.zeros((2, len(examples)), np.float64)
    # The longest first: a lack of memory shows at once.
    by_length = np.argsort(-examples.lengths, kind="stable")
    starts = range(0, len(examples), together)
    with torch.no_grad(), parallel.evaluating(task.loaded.model):
        for start, counts in gang.deal(starts):
            check_orders()
            places = by_length[start : start + together]
            batch = task.batch(examples, places, 0).to(compute.device)
            with compute.autocast():
                likelihoods = task.likelihoods(task.loaded.model, batch)
            if counts:
                numbers[:, places] = likelihoods.double().cpu().numpy()
    flat = numbers.ravel()
    for start in range(0, len(flat), _SUMMED_TOGETHER):
        part = slice(start, start + _SUMMED_TOGETHER)
        flat[part] = gang.sum(flat[part].tolist())
    return numbers


def _spread(numbers: Numbers | None, count: int, gang: Gang) -> Numbers:
    """Rank 0's numbers, on every rank."""
    held = torch.zeros(2, count, dtype=torch.float64)
    if numbers is not None:
        held.copy_(torch.from_numpy(numbers))
    gang.spread([held])
    return held.numpy()


def _identity(model: nn.Module, gang: Gang) -> str:
    """A digest of all weights but those of an adapter, which moves some to other names. Ranks with a
    model in shards each make that of their part, so that it depends on their number as well."""
    sha = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        if _OF_ADAPTER in name:
            continue
        sha.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
        part = local(tensor.detach()).cpu().contiguous()
        sha.update(part.reshape(-1).view(torch.uint8).numpy().data)
    if not gang.sharded:
        return sha.hexdigest()
    words = np.frombuffer(sha.digest(), np.uint32)
    digests = np.zeros((gang.world_size, len(words)))
    digests[gang.rank] = words
    return json.dumps(gang.sum(digests.ravel().tolist()))


def _key(identity: str, examples: Examples, compute: Compute, together: int) -> str:
    """Of all that decides about the numbers, but the make of the device: any of one kind will do."""
    parts = {
        "weights": identity,
        "data": examples.digest(),
        "device": compute.device.type,
        "precision": compute.precision,
        "together": together,
        "versions": [torch.__version__, transformers.__version__],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _find(folder: Path | None, key: str | None, count: int) -> Numbers | None:
    if folder is None or key is None:
        return None
    path = folder / f"{key}.npy"
    try:
        numbers: Numbers = np.load(path, allow_pickle=False)
        path.touch()
    except (OSError, ValueError, EOFError):  # not there, or damaged
        return None
    return numbers if numbers.shape == (2, count) and numbers.dtype == np.float64 else None


def _keep(folder: Path | None, key: str | None, numbers: Numbers, reporter: Reporter) -> None:
    if folder is None or key is None:
        return
    aside = folder / f"{_ASIDE}{secrets.token_hex(8)}.npy"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _tidy(folder)
        np.save(aside, numbers)
        place(aside, folder / f"{key}.npy")
    except OSError as error:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
        reporter.say(f"note: the reference cannot be kept: {error.strerror or error}")


def _tidy(folder: Path) -> None:
    now = time.time()
    for path in folder.glob("*.npy"):
        with contextlib.suppress(OSError):
            if now - path.stat().st_mtime > KEPT_SECONDS:
                path.unlink()
