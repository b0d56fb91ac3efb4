"""How many bytes of tensors a rank holds while it trains: run by ``in_another_process``.

Not what the process takes: how much of what is freed the allocator gives back is its own affair.
"""

from __future__ import annotations

import gc
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import BertForSequenceClassification

from shared.specs import Hyperparameters
from workers.ranks.train.device import Compute
from workers.ranks.train.gang import Gang
from workers.ranks.train.optimizer import make_optimizer
from workers.ranks.train.parallel import Parallel


def bytes_held(folder: Path, store: Path, rank: int, ranks: int, sharded: bool) -> tuple[int, int]:
    """(at the end of a backward pass, between two steps), of a training of the model in ``folder``."""
    torch.set_num_threads(1)
    shared = dist.FileStore(str(store), ranks)
    dist.init_process_group("gloo", store=shared, rank=rank, world_size=ranks)
    compute = Compute(torch.device("cpu"), "gloo", None)
    gang = Gang(rank, ranks, compute.device, shared, sharded=sharded)
    parallel = Parallel(compute, gang)
    model = BertForSequenceClassification.from_pretrained(folder)
    parallel.place(model)
    parallel.divide(model)
    optimizer = make_optimizer(model, Hyperparameters())
    found = (0, 0)
    for _ in range(2):
        tokens = torch.randint(4, 20, (2, 8))
        model(input_ids=tokens, labels=torch.tensor([0, 1])).loss.backward()
        behind = _held()
        parallel.clip([p.grad for p in model.parameters() if p.grad is not None], 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        found = (behind, _held())
    return found


def _held() -> int:
    gc.collect()
    tensors = [each for each in gc.get_objects() if issubclass(type(each), torch.Tensor)]
    tensors += [each.grad for each in tensors if each.is_leaf and each.grad is not None]
    parts = [each.to_local() if isinstance(each, DTensor) else each for each in tensors]
    storages = [part.untyped_storage() for part in parts]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
