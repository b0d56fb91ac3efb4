"""The confusion matrix: how often each class was taken for each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

_LARGEST_CELL = 46.0
_WIDTH = 640.0
_NUMBERED = 14
"""Classes up to which each cell says its number."""
_NAMED = 40
"""Classes up to which rows and columns say their names."""
_LONGEST_NAME = 20
_LETTER = 6.6
"""Width of one, about."""
_SHADES = 10
_MOST_CONFUSIONS = 15


@dataclass(frozen=True, slots=True)
class Confusion:
    """``count`` examples of class ``truth`` were taken for ``guess``: ``share`` of all of that class."""

    truth: str
    guess: str
    count: int
    share: float


def confusions(counts: Sequence[Sequence[int]], labels: Sequence[str]) -> list[Confusion]:
    """The most frequent mistakes, at most 15."""
    found = [
        Confusion(labels[t], labels[g], count, count / sum(row))
        for t, row in enumerate(counts)
        for g, count in enumerate(row)
        if count and t != g
    ]
    return sorted(found, key=lambda c: (-c.count, -c.share))[:_MOST_CONFUSIONS]


def matrix(counts: Sequence[Sequence[int]], labels: Sequence[str]) -> Markup:
    """Rows are what is right and columns what was predicted; a cell is as dark as its share of its row."""
    classes = len(labels)
    named, numbered = classes <= _NAMED, classes <= _NUMBERED
    margin = 40.0 + (max(len(short(label)) for label in labels) * _LETTER if named else 0.0)
    cell = min(_LARGEST_CELL, (_WIDTH - margin) / classes)
    side = cell * classes
    width, height = margin + side + 8, margin + side + 8
    parts = [
        _axis_title("predicted", margin + side / 2, 14, upright=True),
        _axis_title("right", 12, margin + side / 2, upright=False),
        _cells(counts, margin, cell),
        Markup('<rect class="frame" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"/>').format(
            margin, margin, side, side
        ),
    ]
    if numbered:
        parts.append(_numbers(counts, margin, cell))
    if named:
        parts += [_name(label, i, margin, cell) for i, label in enumerate(labels)]
    return Markup(
        '<svg class="matrix" viewBox="0 0 {:.0f} {:.0f}" style="max-width:{:.0f}px" role="img" '
        'aria-label="Confusion matrix">{}</svg>'
    ).format(width, height, width, Markup().join(parts))


def _cells(counts: Sequence[Sequence[int]], margin: float, cell: float) -> Markup:
    """One path for all cells of a shade: a hundred classes have ten thousand."""
    shades: dict[int, list[str]] = {}
    for t, row in enumerate(counts):
        total = sum(row)
        for g, count in enumerate(row):
            if count:
                shade = max(1, round(_SHADES * count / total))
                corner = f"M{margin + g * cell:.1f} {margin + t * cell:.1f}"
                shades.setdefault(shade, []).append(f"{corner}h{cell:.1f}v{cell:.1f}h-{cell:.1f}z")
    paths = [
        f'<path class="cell" fill-opacity="{shade / _SHADES:g}" d="{"".join(cells)}"/>'
        for shade, cells in sorted(shades.items())
    ]
    return Markup("".join(paths))  # noqa: S704  made of numbers alone


def _numbers(counts: Sequence[Sequence[int]], margin: float, cell: float) -> Markup:
    parts = []
    for t, row in enumerate(counts):
        total = max(1, sum(row))
        for g, count in enumerate(row):
            if count:
                kind = "count dark" if count / total > 0.5 else "count"
                x, y = margin + (g + 0.5) * cell, margin + (t + 0.5) * cell + 4
                parts.append(f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}">{count:,}</text>')
    return Markup("".join(parts))  # noqa: S704  made of numbers alone


def _name(label: str, index: int, margin: float, cell: float) -> Markup:
    middle = margin + (index + 0.5) * cell
    return Markup(
        '<text class="class" x="{:.1f}" y="{:.1f}" text-anchor="end">{}<title>{}</title></text>'
        '<text class="class" transform="translate({:.1f} {:.1f}) rotate(-90)">{}<title>{}</title></text>'
    ).format(
        margin - 6, middle + 4, short(label), label, middle + 4, margin - 6, short(label), label
    )


def _axis_title(text: str, x: float, y: float, *, upright: bool) -> Markup:
    turn = "" if upright else f"rotate(-90 {x:g} {y:g})"
    return Markup(
        '<text class="tick" x="{:.1f}" y="{:.1f}" transform="{}" text-anchor="middle">{}</text>'
    ).format(x, y, turn, text)


def short(label: str) -> str:
    return label if len(label) <= _LONGEST_NAME else label[: _LONGEST_NAME - 1] + "…"
