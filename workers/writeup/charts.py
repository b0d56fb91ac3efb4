"""Line charts as inline SVG. Colours are the page's own variables, so they follow light and dark.

By Okabe and Ito's palette, which those see apart who do not see all colours; lines differ in their dashes
and marks as well, and carry their names at their ends.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from markupsafe import Markup, escape

from workers.writeup.figures import decades, shown, tick_labels, ticks

_WIDTH, _HEIGHT = 560.0, 250.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 58.0, 96.0, 14.0, 40.0
_LINE = 15.0
"""Height of a line of text."""
_LONGEST_NAME = 14
_MOST_MARKED = 40
"""Values of a sparse line up to which each is marked."""


@dataclass(frozen=True, slots=True)
class Series:
    """``points`` are (x, y) in the order of x; a y of None is a gap. ``sparse``: measured now and then, so
    that each value is marked, unless they are many. The only line of a chart needs no ``name``."""

    name: str
    points: Sequence[tuple[float, float | None]]
    colour: int = 1
    sparse: bool = False

    @property
    def known(self) -> list[tuple[float, float]]:
        return [(x, y) for x, y in self.points if y is not None and math.isfinite(y)]


@dataclass(frozen=True, slots=True)
class Chart:
    """``marks``: labels of events, by x. ``from_zero``: the axis of y begins there. ``log``: it is one of
    decades where the values spread over more than two."""

    title: str
    unit: str
    series: Sequence[Series]
    marks: Mapping[float, str] = field(default_factory=dict)
    from_zero: bool = False
    log: bool = False

    def svg(self) -> Markup:
        """Empty where no series has a value."""
        shown_series = [each for each in self.series if each.known]
        if not shown_series:
            return Markup()
        xs = [x for each in shown_series for x, _ in each.known]
        ys = [y for each in shown_series for _, y in each.known]
        across = Axis.over(0.0, max(*xs, *self.marks, 1.0), _LEFT, _WIDTH - _RIGHT)
        log = self.log and min(ys) > 0 and max(ys) / min(ys) > 100
        low = 0.0 if self.from_zero else min(ys)
        up = Axis.over(low, max(ys), _HEIGHT - _BOTTOM, _TOP, log=log, padded=True)
        parts = [_frame(across, up), *(_mark(x, text, across) for x, text in self.marks.items())]
        parts += [_line(each, across, up) for each in shown_series]
        parts.append(_names(shown_series, across, up))
        what = escape(f"{self.title}{f' ({self.unit})' if self.unit else ''} by step")
        return Markup('<svg viewBox="0 0 {:g} {:g}" role="img" aria-label="{}">{}</svg>').format(
            _WIDTH, _HEIGHT, what, Markup().join(parts)
        )


@dataclass(frozen=True, slots=True)
class Axis:
    """Places of values between two pixels."""

    low: float
    high: float
    begin: float
    end: float
    log: bool = False

    @classmethod
    def over(
        cls,
        low: float,
        high: float,
        begin: float,
        end: float,
        *,
        log: bool = False,
        padded: bool = False,
    ) -> Axis:
        """From ``low`` to ``high``, or around them where they are one."""
        if log:
            return cls(low / 1.3, high * 1.3, begin, end, log=True)
        if low == high == 0:
            return cls(0.0, 1.0, begin, end)
        if high - low <= 1e-9 * max(abs(low), abs(high)):
            room = abs(high) * 0.1 or 1.0
            return cls(low - room, high + room, begin, end)
        room = (high - low) * 0.06 if padded else 0.0
        return cls(low if low == 0 else low - room, high + room, begin, end)

    def place(self, value: float) -> float:
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return self.begin + (value - low) / (high - low) * (self.end - self.begin)

    def ticks(self, most: int) -> list[float]:
        if self.log and (found := decades(self.low, self.high, most)):
            return found
        return ticks(self.low, self.high, most)


def _frame(across: Axis, up: Axis) -> Markup:
    """Grid lines, and what they stand for."""
    parts = []
    values = up.ticks(6)
    labels = [f"{v:g}" for v in values] if up.log else tick_labels(values)
    for value, label in zip(values, labels, strict=True):
        y = up.place(value)
        parts.append(
            f'<path class="grid" d="M{across.begin:.1f} {y:.1f}H{across.end:.1f}"/>'
            f'<text class="tick" x="{across.begin - 8:.1f}" y="{y + 4:.1f}" text-anchor="end">{label}</text>'
        )
    steps = [tick for tick in across.ticks(6) if tick == int(tick)]
    for value, label in zip(steps, tick_labels(steps), strict=True):
        x = across.place(value)
        parts.append(
            f'<path class="axis" d="M{x:.1f} {up.begin:.1f}v4"/>'
            f'<text class="tick" x="{x:.1f}" y="{up.begin + 17:.1f}" text-anchor="middle">{label}</text>'
        )
    parts.append(
        f'<path class="axis" d="M{across.begin:.1f} {up.begin:.1f}H{across.end:.1f}"/>'
        f'<text class="tick" x="{(across.begin + across.end) / 2:.1f}" y="{up.begin + 34:.1f}" '
        'text-anchor="middle">step</text>'
    )
    return Markup("".join(parts))  # noqa: S704  made of numbers alone


def _mark(x: float, text: str, across: Axis) -> Markup:
    place = across.place(x)
    return Markup(
        '<path class="mark" d="M{:.1f} {:.1f}V{:.1f}"><title>{}</title></path>'
        '<path class="flag" d="M{:.1f} {:.1f}l-4 -7h8z"><title>{}</title></path>'
    ).format(place, _TOP, _HEIGHT - _BOTTOM, text, place, _TOP, text)


def _line(series: Series, across: Axis, up: Axis) -> Markup:
    """One stroke for each run of values without a gap; a dot for one that stands alone."""
    strokes, dots = [], []
    run: list[str] = []
    for x, y in [*series.points, (0.0, None)]:
        if y is not None and math.isfinite(y):
            run.append(f"{across.place(x):.1f} {up.place(y):.1f}")
            continue
        if len(run) > 1:
            strokes.append("M" + "L".join(run))
        elif run:
            dots.append(run[0])
        run = []
    kind = f"line c{series.colour}" + (" sparse" if series.sparse else "")
    parts = [Markup('<path class="{}" d="{}"/>').format(kind, "".join(strokes))] if strokes else []
    if series.sparse and len(series.known) <= _MOST_MARKED:
        parts += [
            Markup(
                '<circle class="dot c{}" cx="{:.1f}" cy="{:.1f}" r="3.2"><title>{}</title></circle>'
            ).format(
                series.colour,
                across.place(x),
                up.place(y),
                f"{series.name} {shown(y)} at step {x:,.0f}",
            )
            for x, y in series.known
        ]
    else:
        parts += [
            Markup('<circle class="dot c{}" cx="{}" cy="{}" r="2.4"/>').format(
                series.colour, *dot.split()
            )
            for dot in dots
        ]
    return Markup().join(parts)


def _names(series: Sequence[Series], across: Axis, up: Axis) -> Markup:
    """Each name and last value where its line ends, moved apart where they would meet."""
    height = 2 * _LINE
    ends = sorted((up.place(each.known[-1][1]), i) for i, each in enumerate(series))
    places: list[float] = []
    for y, _ in ends:
        places.append(max(y, places[-1] + height) if places else max(y, up.end + 6))
    overhang = places[-1] + _LINE - up.begin
    if overhang > 0:
        places = [max(up.end + 6, place - overhang) for place in places]
    parts = []
    for place, (_, index) in zip(places, ends, strict=True):
        each = series[index]
        x = across.end + 8
        name = (
            each.name if len(each.name) <= _LONGEST_NAME else each.name[: _LONGEST_NAME - 1] + "…"
        )
        parts.append(
            Markup(
                '<text class="name c{}" x="{:.1f}" y="{:.1f}">{}'
                '<tspan class="value" x="{:.1f}" dy="{:g}">{}</tspan></text>'
            ).format(
                each.colour, x, place + 4, name, x, _LINE if name else 0, shown(each.known[-1][1])
            )
        )
    return Markup().join(parts)
