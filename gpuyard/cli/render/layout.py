"""Tables and lists that fit a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gpuyard.cli.render.words import one_line

STYLES = {
    "queued": "yellow",
    "dispatched": "cyan",
    "running": "cyan",
    "cancelling": "magenta",
    "succeeded": "green",
    "failed": "red",
    "lost": "red",
    "cancelled": "magenta",
    "up": "green",
    "draining": "yellow",
    "silent": "red",
    "suspect": "red",
    "gone": "dim",
}

_GAP = 2

_NARROWEST = 4
"""Of a column that is cut."""


@dataclass(frozen=True, slots=True)
class Column:
    """``from_width``: terminals narrower than that do without it. ``whole``: never cut."""

    title: str
    from_width: int = 0
    whole: bool = False
    right: bool = False


def table(console: Console, columns: Sequence[Column], rows: Iterable[Sequence[Any]]) -> Table:
    """A table that fits: columns leave before what identifies a row is cut."""
    shown = [i for i, column in enumerate(columns) if console.width >= column.from_width]
    result = Table(box=None, pad_edge=False, padding=(0, _GAP, 0, 0), header_style="bold")
    cells = [[r[i] if isinstance(r[i], Text) else one_line(r[i]) for i in shown] for r in rows]
    wanted = [
        max([cell_len(columns[i].title), *(cell_len(str(row[place])) for row in cells)])
        for place, i in enumerate(shown)
    ]
    room = console.width - _GAP * (len(shown) - 1)
    widths = fit(wanted, [columns[i].whole for i in shown], room)
    for i, width in zip(shown, widths, strict=True):
        column = columns[i]
        result.add_column(
            column.title,
            width=width,
            no_wrap=not column.whole,
            overflow="fold" if column.whole else "ellipsis",
            justify="right" if column.right else "left",
        )
    for row in cells:
        result.add_row(*row)
    return result


def fit(wanted: Sequence[int], whole: Sequence[bool], room: int) -> list[int]:
    """Widths of columns within ``room``: the widest of those that may be cut gives way first. Rich by
    itself takes from all alike, and leaves nothing of a narrow column beside a very wide one."""
    widths = list(wanted)
    while (excess := sum(widths) - room) > 0:
        cut = [i for i, keep in enumerate(whole) if not keep and widths[i] > _NARROWEST]
        if not cut:
            break  # Rich makes it fit
        widest = max(cut, key=lambda i: widths[i])
        rest = [widths[i] for i in cut if i != widest]
        widths[widest] = max(
            widths[widest] - excess, min(max(rest, default=0), widths[widest] - 1), _NARROWEST
        )
    return widths


def fields(pairs: Iterable[tuple[str, Any]]) -> Table:
    """Names and values one below the other; what is empty is left out."""
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in pairs:
        if value not in (None, "", [], {}):
            grid.add_row(name, value if isinstance(value, Text) else one_line(value))
    return grid


def state(value: str) -> Text:
    return Text(str(value), style=STYLES.get(str(value), ""))
