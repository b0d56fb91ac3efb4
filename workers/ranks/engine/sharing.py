"""Which attempts share a computation, and which computation is next."""

from __future__ import annotations

import time
from collections.abc import Hashable
from dataclasses import dataclass, field
from pathlib import Path

from shared.messages import InferAssignment
from shared.specs import GENERATIVE, OPTIONS_OF_A_TASK, InferSpec
from workers.ranks.engine.adapters import state_of
from workers.ranks.engine.computation import Computation, Step
from workers.ranks.engine.models import LoadedModel
from workers.ranks.engine.tasks import choose_computation


@dataclass(slots=True, eq=False)
class Shared:
    """A computation and the attempts that use it."""

    key: Hashable
    loaded: LoadedModel
    computation: Computation
    owners: set[str] = field(default_factory=set)
    seconds: float = 0.0
    """Computed lately, as against the others: the one with least is next."""

    def step(self) -> tuple[Step, float]:
        """Compute a little; and how many seconds it took."""
        started = time.monotonic()
        step = self.computation.step()
        spent = time.monotonic() - started
        self.seconds += spent
        return step, spent


class Computations:
    """Those of one engine."""

    def __init__(self) -> None:
        self._shared: dict[Hashable, Shared] = {}

    def join(self, assignment: InferAssignment, loaded: LoadedModel) -> Shared:
        """The computation for an attempt: one that others use already, if it is the same.

        Raises:
            UnsupportedModel: the model cannot do what the spec asks of it.
        """
        adapter = assignment.adapter_path and (
            assignment.adapter_path,
            state_of(Path(assignment.adapter_path)),
        )
        key = (loaded.key, adapter, _particular(assignment.spec))
        shared = self._shared.get(key)
        if shared is None:
            computation = choose_computation(assignment, loaded)
            # A new one gets its share from now on, and nothing for the time before it came.
            least = min((each.seconds for each in self._shared.values()), default=0.0)
            shared = self._shared[key] = Shared(key, loaded, computation, seconds=least)
        shared.computation.join(assignment.attempt_id, assignment.spec.batch_size)
        shared.owners.add(assignment.attempt_id)
        return shared

    def leave(self, shared: Shared, owner: str) -> None:
        """An attempt is over. With the last one the computation ends, and its memory is free."""
        shared.computation.leave(owner)
        shared.owners.discard(owner)
        if not shared.owners:
            self._shared.pop(shared.key, None)

    def next(self) -> Shared | None:
        """The one whose turn it is; None: there is nothing to compute."""
        busy = (shared for shared in self._shared.values() if shared.computation.busy)
        return min(busy, key=lambda shared: shared.seconds, default=None)

    @property
    def models(self) -> list[LoadedModel]:
        """Those in use."""
        return [shared.loaded for shared in self._shared.values()]


def _particular(spec: InferSpec) -> Hashable:
    """What jobs must have in common beside the model to share passes. Options of generation are those of
    each row."""
    if spec.task in GENERATIVE:
        return None
    options = (getattr(spec, name) for name in OPTIONS_OF_A_TASK)
    return (spec.top_k_labels, spec.embedding, *options)
