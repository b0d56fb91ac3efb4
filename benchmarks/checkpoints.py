"""What a checkpoint costs training: against a save as Transformers' Trainer does it, and in all.

Two ranks over gloo hold a GPT-2 type with AdamW's state, some 300 MB together. In turn, several times:
rank 0 writes model and optimizer while the other waits at a barrier, and the ``Saver`` of the product
copies a share on each rank. Counted is the time until both ranks can go on.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RANKS = 2
ROOT = Path(__file__).resolve().parents[1]


def bench(rounds: int = 3, steps: int = 6) -> dict[str, float]:
    """Medians of ``rounds``: seconds that training waits for a checkpoint of either kind (``first``: the
    product's first one, whose memory is new), and seconds of a step with and without one written
    beside it."""
    with tempfile.TemporaryDirectory(prefix="gpuyard-bench-") as folder:
        port = _free_port()
        ranks = [
            subprocess.Popen(
                [
                    sys.executable, "-m", "benchmarks.checkpoints",
                    str(rank), str(port), folder, str(rounds), str(steps),
                ],
                cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(RANKS)
        ]  # fmt: skip
        try:
            answer, _ = ranks[0].communicate(timeout=300)
            if ranks[0].returncode or ranks[1].wait(60):
                raise RuntimeError("a rank of the benchmark failed; what it said is above")
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait()
    figures: dict[str, float] = json.loads(answer.strip().splitlines()[-1])
    return figures


def table(figures: dict[str, float]) -> str:
    """As Markdown."""
    sync, ours = figures["synchronous"], figures["gpuyard"]
    cost = ours + figures["slower"]
    return "\n".join(
        [
            f"| checkpoint of {figures['megabytes']:.0f} MB, 2 ranks | training waits | share |",
            "| --- | --- | --- |",
            f"| as Trainer saves (rank 0 writes, the other waits) | {sync * 1e3:.0f} ms | 1.00 |",
            f"| gpuyard, the first of an attempt | {figures['first'] * 1e3:.0f} ms "
            f"| {figures['first'] / sync:.2f} |",
            f"| gpuyard | {ours * 1e3:.0f} ms | {ours / sync:.2f} |",
            "",
            f"Steps of {figures['step']:.2f} s take {figures['slower']:.2f} s longer in all beside the "
            f"write, which syncs and digests on the same cores: one every ten minutes costs "
            f"{cost / 600:.2%} of the time, a synchronous one, without either, {sync / 600:.2%}.",
        ]
    )


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def _run_rank(rank: int, port: int, folder: Path, rounds: int, steps: int) -> dict[str, float]:
    # Imported here: ``bench`` needs none of it.
    import torch
    import torch.distributed as dist
    from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]
    from torch.nn.parallel import DistributedDataParallel
    from transformers import GPT2Config, GPT2LMHeadModel

    from shared.messages import ToRank
    from shared.specs import Checkpointing
    from workers.channel import Channel
    from workers.ranks.loading import quiet
    from workers.ranks.train.device import Compute
    from workers.ranks.train.gang import Gang
    from workers.ranks.train.reports import Reporter
    from workers.ranks.train.saving import Saver
    from workers.ranks.train.state import Position

    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = TCPStore("127.0.0.1", port, RANKS, is_master=rank == 0)
    dist.init_process_group("gloo", store=PrefixStore("group", store), rank=rank, world_size=RANKS)
    compute = Compute(device=torch.device("cpu"), backend="gloo", half=None)
    gang = Gang(rank, RANKS, compute.device, PrefixStore("gang", store))
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(
            n_layer=6, n_embd=512, n_head=8, vocab_size=12_000, n_positions=256,
            bos_token_id=None, eos_token_id=None,
        )
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    wrapped = DistributedDataParallel(model)
    tokens = torch.randint(0, 12_000, (1, 32), generator=torch.Generator().manual_seed(rank))
    ours, worker = socket.socketpair()
    saver = Saver(
        rules=Checkpointing(every_seconds=None),
        best_model=lambda _position: None,
        model=model,
        optimizer=optimizer,
        fingerprint={},
        compute=compute,
        gang=gang,
        reporter=Reporter(Channel(ours, ToRank)),
        folder=folder / "checkpoints",
        best=None,
        device_mtbf=1e6,
    )
    position = Position()

    def step() -> float:
        began = time.perf_counter()
        wrapped(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        gang.sum([0.0])
        position.step += 1
        return time.perf_counter() - began

    def synchronous() -> None:
        if rank == 0:
            target = folder / "trainer"
            shutil.rmtree(target, ignore_errors=True)
            with quiet():
                model.save_pretrained(target)
            torch.save(optimizer.state_dict(), target / "optimizer.pt")
        dist.barrier()

    def copied() -> None:
        saver.save(position)
        dist.barrier()

    def timed(save: Any) -> float:
        dist.barrier()
        began = time.perf_counter()
        save()
        return time.perf_counter() - began

    step()
    first = timed(copied)
    saver.close()
    waits: dict[str, list[float]] = {"synchronous": [], "gpuyard": []}
    longer: list[float] = []
    for _ in range(rounds):
        alone = [step() for _ in range(steps)]
        waits["synchronous"].append(timed(synchronous))
        step()
        waits["gpuyard"].append(timed(copied))
        beside = []
        while gang.sum([float(saver.writing)])[0]:
            beside.append(step())
        longer.append(sum(beside) - len(beside) * statistics.median(alone))
        saver.close()
        shutil.rmtree(folder / "checkpoints" / f"step-{position.step:08d}", ignore_errors=True)
    worker.close()
    size = sum(p.nbytes for p in model.parameters()) + sum(
        value.nbytes for kept in optimizer.state.values() for value in kept.values()
    )
    return {
        "megabytes": size / 1e6,
        "first": first,
        "step": statistics.median(alone),
        "slower": max(0.0, statistics.median(longer)),
        **{name: statistics.median(took) for name, took in waits.items()},
    }


if __name__ == "__main__":
    number, port, folder, rounds, steps = sys.argv[1:]
    figures = _run_rank(int(number), int(port), Path(folder), int(rounds), int(steps))
    if number == "0":
        print(json.dumps(figures), flush=True)
    # What gloo and the store still hold is of no use to anyone.
    os._exit(0)
