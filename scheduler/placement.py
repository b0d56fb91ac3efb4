"""Placement: on which devices? Pure: the fleet and the ordered jobs in, a decision for each out.

The least capable class that fits is taken first, so that the rare devices stay for those who need
them. A gang gets all of its devices or none; one that may have different sizes starts on the most that
are free now, and does not wait for more than the fewest. Within a class, hosts are filled up tightly, so that
large holes stay whole for the next gang. A batch job takes the device that has its model warm, where
there is a choice within the class; where no device is free it joins other batch jobs on one that they
compute on (``join``). A job that could run once busy devices are free withholds
the free ones that it would use from all jobs after it: otherwise small jobs would starve it.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from scheduler.matching import eligible_devices, unsatisfiable, usable_memory
from shared.capability import SEATS, device_queue
from shared.resolved import Requirements
from shared.store.snapshot import DeviceState, Tenant, WaitingJob

_Class = tuple[tuple[int, int, int], bool, str]
"""Orders the classes: rank of the capability, whether simulated, name."""


@dataclass(frozen=True, slots=True)
class Placement:
    """``devices[r]`` and ``queues[r]`` are for rank r: where it runs and where its hint goes."""

    devices: tuple[str, ...]
    queues: tuple[str, ...]
    reason: str
    shared: bool = False
    """Others compute on the device, and go on."""


@dataclass(frozen=True, slots=True)
class Waiting:
    reason: str
    withheld: tuple[str, ...] = ()
    """Free devices that nobody after this job may take."""


@dataclass(frozen=True, slots=True)
class Plan:
    """One decision for each job, by its id, in the order of the jobs."""

    decisions: dict[str, Placement | Waiting]

    @property
    def placements(self) -> dict[str, Placement]:
        return {id: d for id, d in self.decisions.items() if isinstance(d, Placement)}

    @property
    def waiting(self) -> dict[str, str]:
        """The reason of each job that waits."""
        return {id: d.reason for id, d in self.decisions.items() if isinstance(d, Waiting)}


def place(devices: Sequence[DeviceState], jobs: Iterable[WaitingJob]) -> Plan:
    """Decide for ``jobs`` in their order, which is admission's. Same input, same plan."""
    round = _Round(tuple(sorted(devices, key=_device_order)))
    return Plan({job.id: round.decide(job) for job in jobs})


@dataclass(slots=True)
class _Options:
    """What the fleet has for one kind of requirements."""

    never: str | None
    """Why the known fleet cannot run it, whatever becomes free."""
    live: tuple[DeviceState, ...]
    silent: int
    groups: list[tuple[DeviceState, ...]]
    """The sets of live devices to choose from, best first."""
    classes: frozenset[_Class]


@dataclass(slots=True)
class _Round:
    devices: tuple[DeviceState, ...]
    taken: set[str] = field(default_factory=set)
    joined: dict[str, tuple[Tenant, ...]] = field(default_factory=dict)
    """Batch jobs that were given a device or a seat of one in this round."""
    withheld: set[str] = field(default_factory=set)
    blocked: Counter[frozenset[_Class]] = field(default_factory=Counter)
    """Jobs that wait for devices, by the classes that they could run on."""
    options: dict[Requirements, _Options] = field(default_factory=dict)

    def decide(self, job: WaitingJob) -> Placement | Waiting:
        needs = job.requirements
        if needs not in self.options:
            self.options[needs] = self._find_options(needs)
        options = self.options[needs]
        if options.never is not None:
            return Waiting(options.never)
        found = [self._free(group) for group in options.groups]
        # The first of those that give the most: `max` keeps to the order.
        free = max(found, key=lambda free: needs.most_of(len(free)), default=[])
        if size := needs.most_of(len(free)):
            chosen = _spread(free, size)
            if warm := self._warm(job, chosen, free):
                chosen = [warm]
            self.taken.update(d.id for d in chosen)
            if job.shares:
                self._note_tenant(job, chosen[0])
            return self._placement(needs, chosen, free, warm=warm is not None)
        return self._join(job, options) or self._wait(needs, options)

    def _warm(
        self, job: WaitingJob, chosen: Sequence[DeviceState], free: Iterable[DeviceState]
    ) -> DeviceState | None:
        """The free device that has a batch job's model, of the class of the one that is chosen for it."""
        if not job.shares or len(chosen) != 1:
            return None
        alike = [d for d in free if _class_of(d) == _class_of(chosen[0]) and job.model in d.warm]
        return min(alike, key=least_capable_first, default=None)

    def _join(self, job: WaitingJob, options: _Options) -> Placement | None:
        """A seat beside other batch jobs: beside those with the same model first, then where it is warm,
        then where the fewest are. None where no seat is left that it may take:

        - Jobs of a higher priority are not slowed down.
        - The models must fit together into the device's memory.
        - Where a job that is ahead of this one waits for such a device, nobody joins who would keep
          it busy for longer.
        """
        if not job.shares or job.requirements.devices != 1:
            return None
        waiting = {each for classes in self.blocked for each in classes}
        able = [
            device
            for device in options.live
            if _class_of(device) not in waiting and has_seat(job, device, self._tenants(device))
        ]
        best = min(able, key=lambda device: self._welcome(job, device), default=None)
        if best is None:
            return None
        tenants = self._tenants(best)
        beside = "another batch job" if len(tenants) == 1 else f"{len(tenants)} other batch jobs"
        same = any(tenant.model == job.model for tenant in tenants)
        how = ", with the same model" if same else ", which has the model warm"
        if not same and job.model not in best.warm:
            how = ""
        self._note_tenant(job, best)
        return Placement(
            devices=(best.id,),
            queues=(device_queue(best.id),),
            reason=f"no device is free, it joins {beside} on this one{how}",
            shared=True,
        )

    def _welcome(self, job: WaitingJob, device: DeviceState) -> tuple[object, ...]:
        tenants = self._tenants(device)
        other_model = all(tenant.model != job.model for tenant in tenants)
        cold = job.model not in device.warm
        return other_model, cold, len(tenants), least_capable_first(device)

    def _tenants(self, device: DeviceState) -> tuple[Tenant, ...]:
        return device.tenants + self.joined.get(device.id, ())

    def _note_tenant(self, job: WaitingJob, device: DeviceState) -> None:
        tenant = Tenant(job.id, job.priority, job.model, job.requirements.memory_bytes)
        self.joined[device.id] = (*self.joined.get(device.id, ()), tenant)

    def _find_options(self, needs: Requirements) -> _Options:
        eligible = eligible_devices(needs, self.devices)
        live = tuple(d for d in eligible if d.live)
        return _Options(
            never=unsatisfiable(needs, self.devices),
            live=live,
            silent=len(eligible) - len(live),
            groups=groups_of(needs, live),
            classes=frozenset(_class_of(d) for d in eligible),
        )

    def _free(self, group: Iterable[DeviceState]) -> list[DeviceState]:
        return [d for d in group if not self._occupied(d) and d.id not in self.withheld]

    def _occupied(self, device: DeviceState) -> bool:
        return device.busy or device.id in self.taken

    def _placement(
        self,
        needs: Requirements,
        chosen: Sequence[DeviceState],
        free: Sequence[DeviceState],
        *,
        warm: bool,
    ) -> Placement:
        names = sorted({_class_of(d) for d in chosen})
        where = f"{' and '.join(name for _, _, name in names)}, the least capable that fits"
        if len(chosen) > 1:
            hosts = len({d.host for d in chosen})
            where += ", on one host" if hosts == 1 else f", over {hosts} hosts"
        if needs.world_sizes:
            size, most = len(chosen), needs.world_sizes[-1]
            where = f"{size} of {needs.devices} to {most} devices, {len(free)} being free; {where}"
        if warm:
            where += ", which has the model warm"
        # Of the devices that are free another one, which is cold, could take the hint of a class.
        others = any(d not in chosen and _class_of(d) == _class_of(chosen[0]) for d in free)
        any_of_class = len(chosen) == 1 and not (warm and others)
        return Placement(
            devices=tuple(d.id for d in chosen),
            queues=tuple(self._queue(needs, d, alone=any_of_class) for d in chosen),
            reason=where,
        )

    def _queue(self, needs: Requirements, device: DeviceState, *, alone: bool) -> str:
        """The queue of the class, where any device of it may take the rank: see ``device_queue``.

        A class promises its step only, and a job may need more than that: then the hint goes to the
        chosen device alone.
        """
        queue = device.capability.queue
        fitting = {d.id for d in eligible_devices(needs, self.devices)} if alone else set()
        others = (d for d in self.devices if d.known and d.capability.queue == queue)
        return queue if alone and all(d.id in fitting for d in others) else device_queue(device.id)

    def _wait(self, needs: Requirements, options: _Options) -> Waiting:
        ahead = sum(n for classes, n in self.blocked.items() if classes & options.classes)
        self.blocked[options.classes] += 1
        # The group that lacks fewest; of equals, the best. What is withheld stays free, so the lack
        # only shrinks from one round to the next: the job's turn comes.
        best = min(
            (self._free(group) for group in options.groups),
            key=lambda free: max(0, needs.devices - len(free)),
            default=[],
        )
        kept = _spread(best, min(needs.devices, len(best)))
        free = len(self._free(options.live))
        self.withheld.update(d.id for d in kept)
        return Waiting(self._explain(needs, options, free, ahead), tuple(d.id for d in kept))

    def _explain(self, needs: Requirements, options: _Options, free: int, ahead: int) -> str:
        names = list(dict.fromkeys(name for _, _, name in sorted(options.classes)))
        one_class = f"class {names[0]}" if len(names) == 1 else f"class {names[0]} or better"
        if needs.devices > 1 and len(names) > 1:
            one_class = f"one class, {names[0]} or better"
        busy = sum(self._occupied(d) for d in options.live)
        held_back = len(options.live) - busy - free
        parts = [f"{free} free", f"{busy} busy"]
        if held_back:
            parts.append(f"{held_back} kept for jobs ahead")
        if options.silent:
            parts.append(f"{options.silent} silent, draining or suspect")
        lacking = "a device"
        if needs.devices > 1:
            lacking = f"{max(1, needs.devices - free)} of {needs.devices} devices"
        reason = f"waits for {lacking} of {one_class}: {', '.join(parts)}"
        if ahead:
            reason += f"; {ahead} {'job is' if ahead == 1 else 'jobs are'} ahead"
        return reason


def has_seat(job: WaitingJob, device: DeviceState, tenants: Sequence[Tenant]) -> bool:
    """Whether a batch job may compute beside these on the device."""
    if not 0 < len(tenants) < SEATS or any(each.priority > job.priority for each in tenants):
        return False
    needs = job.requirements
    models = {each.model: each.memory_bytes for each in tenants}
    models[job.model] = max(needs.memory_bytes, models.get(job.model, 0))
    return len(models) == 1 or sum(models.values()) <= usable_memory(needs, device.capability)


def groups_of(
    needs: Requirements, eligible: Iterable[DeviceState]
) -> list[tuple[DeviceState, ...]]:
    """The sets of ``eligible`` devices that a gang may run on, busy ones included, best first.

    A gang runs at the pace of its slowest rank: classes are mixed only where no single one has devices
    enough. Simulated devices never mix with real ones.
    """
    by_class: dict[_Class, list[DeviceState]] = defaultdict(list)
    by_kind: dict[bool, list[DeviceState]] = defaultdict(list)
    for device in eligible:
        by_class[_class_of(device)].append(device)
        by_kind[device.simulated].append(device)
    groups = [tuple(g) for _, g in sorted(by_class.items()) if len(g) >= needs.devices]
    return groups or [tuple(g) for _, g in sorted(by_kind.items()) if len(g) >= needs.devices]


def _spread(free: Sequence[DeviceState], count: int) -> list[DeviceState]:
    """``count`` of the free devices on as few hosts as can be, leaving as little over on the last of
    them as can be; on a host the least capable first. There must be that many."""
    by_host: dict[str, list[DeviceState]] = defaultdict(list)
    for device in free:
        by_host[device.host].append(device)
    chosen: list[DeviceState] = []
    while len(chosen) < count:
        lacking = count - len(chosen)
        enough = [host for host, found in by_host.items() if len(found) >= lacking]
        if enough:
            host = min(enough, key=lambda h: (len(by_host[h]), h))
        else:
            host = min(by_host, key=lambda h: (-len(by_host[h]), h))
        chosen += sorted(by_host.pop(host), key=least_capable_first)[:lacking]
    return chosen


def _class_of(device: DeviceState) -> _Class:
    return (device.capability.rank, device.simulated, device.capability.queue)


def least_capable_first(device: DeviceState) -> tuple[_Class, int, tuple[str | int, ...]]:
    """A key that orders devices."""
    return (_class_of(device), device.capability.memory_bytes, _device_order(device))


def _device_order(device: DeviceState) -> tuple[str | int, ...]:
    """By name, gpu2 before gpu10."""
    return tuple(int(p) if p.isdigit() else p for p in re.split(r"(\d+)", device.id))
