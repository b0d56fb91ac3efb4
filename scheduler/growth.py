"""Growth and shrinking: which running batch job gets one device more, and which gives one back? Pure.

A batch job starts on one device. Once all waiting jobs have had their turn, devices that are free and
kept for nobody go to the batch jobs that run. Where a waiting job lacks devices that batch jobs of no
higher priority have beside their first, as many ranks as it lacks are asked back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scheduler.matching import eligible_devices
from scheduler.placement import Placement, Plan, Waiting, groups_of, least_capable_first
from shared.capability import device_queue
from shared.store.batches import BatchRank, BatchWork, RunningBatch
from shared.store.snapshot import DeviceState, WaitingJob

YOUNGEST = 2.0
"""Seconds that an attempt runs before it is given more: a small job is over by then."""
SHORTEST_REST = 4.0
"""Seconds of work that must be left: below, a rank would come to load the model and to leave."""

TRIES = 3
"""Ranks that an attempt may lose on one device before it is given that no more: it may be broken."""


@dataclass(frozen=True, slots=True)
class Growth:
    """One rank more for a batch job."""

    batch: RunningBatch
    device_id: str
    queue: str
    reason: str


@dataclass(frozen=True, slots=True)
class AskBack:
    """A rank whose device another job waits for."""

    batch: RunningBatch
    rank: int
    reason: str


def free_devices(devices: Sequence[DeviceState], plan: Plan) -> list[DeviceState]:
    """The devices that nobody has after ``plan``, and that are kept for nobody."""
    given: set[str] = set()
    for decision in plan.decisions.values():
        given.update(decision.devices if isinstance(decision, Placement) else decision.withheld)
    return [d for d in devices if d.live and not d.busy and d.id not in given]


def may_grow(batch: RunningBatch) -> bool:
    """As far as can be told without looking at what is left of it."""
    most = batch.requirements.most
    return batch.seconds_running >= YOUNGEST and (most is None or len(batch.ranks) < most)


def grow(
    devices: Sequence[DeviceState],
    free: Sequence[DeviceState],
    batches: Sequence[RunningBatch],
    work: Mapping[str, BatchWork],
) -> list[Growth]:
    """Give ``free`` devices to ``batches``, one after the other: the highest priority first, then the
    fewest ranks; each the device that has its model warm, else the least capable that fits."""
    left = list(free)
    ranks = {batch.id: len(batch.ranks) for batch in batches}
    growing = [b for b in batches if may_grow(b) and _worth_it(b, work.get(b.id))]
    found: list[Growth] = []
    while growing and left:
        batch = min(growing, key=lambda b: (-b.priority, ranks[b.id], b.id))
        device = _best(batch, devices, left)
        if device is None or not _has_work(batch, work[batch.id], ranks[batch.id]):
            growing.remove(batch)
            continue
        ranks[batch.id] += 1
        left.remove(device)
        warm = ", which has the model warm" if batch.model in device.warm else ""
        reason = f"it is free{warm}; {ranks[batch.id]} ranks share the rows"
        found.append(Growth(batch, device.id, device_queue(device.id), reason))
    return found


def _worth_it(batch: RunningBatch, work: BatchWork | None) -> bool:
    """Whether so much is left that another rank is of use."""
    if work is None:
        return False
    if not work.rows_done:
        return True  # it has only begun
    return work.rows_left * batch.seconds_running / work.rows_done >= SHORTEST_REST


def _has_work(batch: RunningBatch, work: BatchWork, ranks: int) -> bool:
    """Whether one rank more would find a shard, those considered that are on their way."""
    held = sum(rank.held for rank in batch.ranks)
    most = batch.requirements.most
    return work.unleased > ranks - held and (most is None or ranks < most)


def _best(
    batch: RunningBatch, devices: Sequence[DeviceState], free: Sequence[DeviceState]
) -> DeviceState | None:
    """Of the kind that the job runs on: results of simulated and real ones, of CPU and CUDA, may differ."""
    mine = {rank.device_id for rank in batch.ranks}
    kinds = {_kind(device) for device in devices if device.id in mine}
    eligible = eligible_devices(batch.requirements, devices)
    fitting = {device.id for device in eligible if batch.lost.count(device.id) < TRIES}
    return min(
        (device for device in free if device.id in fitting and kinds == {_kind(device)}),
        key=lambda device: (batch.model not in device.warm, least_capable_first(device)),
        default=None,
    )


def _kind(device: DeviceState) -> tuple[str, bool]:
    return device.capability.accelerator, device.simulated


def ask_back(
    devices: Sequence[DeviceState],
    jobs: Sequence[WaitingJob],
    plan: Plan,
    batches: Sequence[RunningBatch],
) -> list[AskBack]:
    """Ranks to ask back for those of ``jobs`` (in their order) that wait: as many as each lacks, the
    newest first, of the least urgent batch jobs first; none where it would still lack devices then."""
    shrinking = _Shrinking(devices, batches)
    found: list[AskBack] = []
    for job in jobs:
        decision = plan.decisions[job.id]
        if not isinstance(decision, Waiting):
            continue
        live = [d for d in eligible_devices(job.requirements, devices) if d.live]
        for group in groups_of(job.requirements, live):
            ids = {device.id for device in group}
            if decision.withheld and not ids.issuperset(decision.withheld):
                continue
            lacking = job.requirements.devices - len(decision.withheld)
            asked = shrinking.ask(ids, lacking, job)
            if asked is not None:
                found += asked
                break
    return found


class _Shrinking:
    """The ranks that batch jobs could do without, fewer with each that is asked.

    What another job needs is a whole device: all that compute on it are asked, or none.
    """

    def __init__(self, devices: Sequence[DeviceState], batches: Sequence[RunningBatch]) -> None:
        self._tenants = {device.id: len(device.tenants) for device in devices}
        self._batches = batches
        self._staying: _Ranks = {
            batch.id: [rank for rank in batch.ranks if not rank.asked_back] for batch in batches
        }
        self._coming = {
            device.id for device in devices if device.tenants and self._comes(device.id)
        }
        """Devices that are asked back and that no job before has counted on."""

    def ask(self, ids: set[str], lacking: int, job: WaitingJob) -> list[AskBack] | None:
        """What to ask for a job that lacks so many of these devices; None: it could not run then."""
        coming = sorted(self._coming & ids)[:lacking]
        asked: list[AskBack] = []
        staying = {id: list(ranks) for id, ranks in self._staying.items()}
        for _ in range(lacking - len(coming)):
            chosen = self._next(ids, job, staying)
            if chosen is None:
                return None
            for batch, rank in chosen:
                staying[batch.id].remove(rank)
                asked.append(AskBack(batch, rank.rank, f"{job.id} waits for a device"))
        self._staying = staying
        self._coming.difference_update(coming)
        return asked

    def _next(self, ids: set[str], job: WaitingJob, staying: _Ranks) -> _Leaving | None:
        """The ranks that have to leave for one device of these to be free."""
        able = [
            leaving
            for device_id in ids
            if (leaving := self._leaving(device_id, staying))
            and all(batch.priority <= job.priority for batch, _ in leaving)
        ]
        return min(
            able,
            key=lambda leaving: (
                max(batch.priority for batch, _ in leaving),
                len(leaving),
                -min(len(staying[batch.id]) for batch, _ in leaving),
                -min(rank.rank for _, rank in leaving),
                leaving[0][1].device_id,
            ),
            default=None,
        )

    def _leaving(self, device_id: str, staying: _Ranks) -> _Leaving | None:
        """All that are there still and may leave, as others of their jobs go on; None: one may not, or
        is not known to run yet."""
        there = self._there(device_id)
        found = [(batch, rank) for batch, rank in there if rank in staying[batch.id]]
        if len(there) < self._tenants.get(device_id, 0) or not found:
            return None
        if all(any(o.held for o in staying[b.id] if o is not rank) for b, rank in found):
            return found
        return None

    def _comes(self, device_id: str) -> bool:
        """Whether all that are there have been asked, and may leave."""
        there = self._there(device_id)
        return len(there) == self._tenants[device_id] and all(
            rank.asked_back and any(other.held for other in self._staying[batch.id])
            for batch, rank in there
        )

    def _there(self, device_id: str) -> _Leaving:
        return [
            (batch, rank)
            for batch in self._batches
            for rank in batch.ranks
            if rank.device_id == device_id
        ]


_Ranks = dict[str, list[BatchRank]]
"""By the ids of their jobs."""
_Leaving = list[tuple[RunningBatch, BatchRank]]
