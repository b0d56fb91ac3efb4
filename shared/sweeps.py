"""A hyperparameter sweep: one training spec, and the fields that differ from trial to trial. Pure."""

from __future__ import annotations

import copy
import itertools
import math
import random
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, Discriminator, Field, Tag, ValidationError, model_validator

from shared.errors import InvalidSpec
from shared.explain import describe, explain
from shared.specs import Strict, TrainSpec, parse_spec

MAX_TRIALS = 1000


class Range(Strict):
    """Values between two bounds, for random search. ``log``: each order of magnitude alike."""

    min: float
    max: float
    log: bool = False
    whole: bool = Field(False, description="Only whole numbers.")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not (math.isfinite(self.min) and math.isfinite(self.max) and self.min < self.max):
            raise ValueError("min must be below max, and both finite")
        if self.log and self.min <= 0:
            raise ValueError("min must be above 0 where log is set")
        return self

    def draw(self, chance: random.Random) -> float | int:
        if self.log:
            value = math.exp(chance.uniform(math.log(self.min), math.log(self.max)))
        else:
            value = chance.uniform(self.min, self.max)
        value = min(self.max, max(self.min, value))
        # Four digits: what people would type, and equal wherever it is computed.
        return round(value) if self.whole else float(f"{value:.4g}")


def _form(value: Any) -> str:
    return _LIST if isinstance(value, list) else _RANGE


_LIST, _RANGE = "<list>", "<range>"
Values = Annotated[
    Annotated[list[Any], Tag(_LIST)] | Annotated[Range, Tag(_RANGE)], Discriminator(_form)
]


class SweepSpec(Strict):
    """Trials of one training: a grid over all values, or random draws."""

    name: str | None = Field(None, max_length=200, description="A label of your own.")
    spec: dict[str, Any] = Field(description="The training that the trials are variants of.")
    parameters: dict[str, Values] = Field(
        min_length=1,
        description="By field, with dots: a list of values, or {min, max, log, whole}.",
        examples=[{"hyperparameters.learning_rate": [1e-4, 3e-4], "hyperparameters.seed": [1, 2]}],
    )
    strategy: Literal["grid", "random"] = "grid"
    trials: int | None = Field(None, ge=1, le=MAX_TRIALS, description="random: how many.")
    seed: int = Field(0, ge=0, lt=2**63, description="random: what is drawn.")
    metric: str | None = Field(
        None, max_length=100, description="What the best trial is best in; default: the task's own."
    )
    goal: Literal["maximize", "minimize"] | None = Field(
        None, description="Default: as the task's metric has it; needed with a metric of yours."
    )

    @model_validator(mode="after")
    def _no_contradiction(self) -> Self:
        for field, values in self.parameters.items():
            if isinstance(values, list) and not values:
                raise ValueError(f"parameters.{field} has no values")
            if isinstance(values, Range) and self.strategy == "grid":
                raise ValueError(f"parameters.{field} is a range: a grid needs a list of values")
        if self.strategy == "grid" and self.trials is not None:
            raise ValueError("trials is for strategy 'random': a grid tries all combinations")
        if self.strategy == "random" and self.trials is None:
            raise ValueError("strategy 'random' needs trials, the number of draws")
        if (self.metric is None) != (self.goal is None):
            raise ValueError("metric and goal belong together: give both, or neither")
        return self


def parse_sweep(data: Any) -> SweepSpec:
    """Validate a sweep; its trials are looked at by ``plan``.

    Raises:
        InvalidSpec: names the field, what is wrong with it and what is allowed.
    """
    if not isinstance(data, dict):
        raise InvalidSpec(f"a sweep is an object, not {describe(data)}")
    try:
        return SweepSpec.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = [str(part) for part in first["loc"] if part not in (_LIST, _RANGE)]
        param = ".".join(place) or None
        raise InvalidSpec(explain(first, param or "the sweep"), param=param) from None


class Trial(BaseModel):
    """One variant. ``number`` counts from 1."""

    number: int
    parameters: dict[str, Any]
    spec: TrainSpec


def plan(sweep: SweepSpec) -> list[Trial]:
    """The trials of a sweep, the same for the same sweep.

    Raises:
        InvalidSpec: too many trials, or one of them is no training spec: names the values.
    """
    choices = _grid(sweep) if sweep.strategy == "grid" else _draws(sweep)
    return [_trial(number, sweep, chosen) for number, chosen in enumerate(choices, start=1)]


def _grid(sweep: SweepSpec) -> list[dict[str, Any]]:
    lists = {
        field: values for field, values in sweep.parameters.items() if isinstance(values, list)
    }
    count = math.prod(len(values) for values in lists.values())
    if count > MAX_TRIALS:
        raise InvalidSpec(
            f"the grid has {count} combinations, and {MAX_TRIALS} trials are allowed",
            param="parameters",
            hint="Give fewer values, or strategy random with a number of trials.",
        )
    return [dict(zip(lists, values, strict=True)) for values in itertools.product(*lists.values())]


def _draws(sweep: SweepSpec) -> list[dict[str, Any]]:
    chance = random.Random(sweep.seed)  # noqa: S311 - search, no secret
    return [
        {
            field: values.draw(chance) if isinstance(values, Range) else chance.choice(values)
            for field, values in sweep.parameters.items()
        }
        for _ in range(sweep.trials or 0)
    ]


def _trial(number: int, sweep: SweepSpec, chosen: Mapping[str, Any]) -> Trial:
    raw = {"kind": "train", **copy.deepcopy(sweep.spec)}
    for field, value in chosen.items():
        _put(raw, field, value)
    if "name" not in raw:
        raw["name"] = f"{sweep.name or 'sweep'} #{number}"
    try:
        spec = parse_spec(raw)
    except InvalidSpec as error:
        shown = ", ".join(f"{field}={value!r}" for field, value in chosen.items())
        raise InvalidSpec(
            f"trial {number} ({shown}): {error.message}", param=error.param, hint=error.hint
        ) from None
    if not isinstance(spec, TrainSpec):
        raise InvalidSpec(
            "a sweep is over a training: spec.kind must be 'train'", param="spec.kind"
        )
    return Trial(number=number, parameters=dict(chosen), spec=spec)


def _put(spec: dict[str, Any], field: str, value: Any) -> None:
    """Set ``a.b.c``, making what is missing on the way; a wrong field is found by ``parse_spec``."""
    *way, last = field.split(".")
    here = spec
    for part in way:
        inner = here.get(part)
        if not isinstance(inner, dict):
            inner = here[part] = {}
        here = inner
    here[last] = value


def best_of(values: Sequence[tuple[int, float | None]], goal: str) -> int | None:
    """The number of the best trial by (number, value); of equals the first. None: none has a value."""
    known = [(value, number) for number, value in values if value is not None]
    if not known:
        return None
    if goal == "minimize":
        return min(known)[1]
    return min(known, key=lambda entry: (-entry[0], entry[1]))[1]
