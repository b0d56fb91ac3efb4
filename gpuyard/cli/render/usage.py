"""What was used, as a table."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from gpuyard.cli.render.layout import Column, table
from gpuyard.cli.render.words import duration
from shared.views import UsageReport, UsageView


def usage(console: Console, report: UsageReport) -> Table:
    """A line a key, project or day, and one for all of them."""
    numbers = ("JOBS", "DEVICE TIME", "ROWS", "ROW ERRORS", "INPUT TOKENS", "OUTPUT TOKENS")
    columns = [
        Column((report.group or "").upper(), whole=True),
        *(Column(name, whole=True, right=True) for name in numbers),
    ]
    items = report.items if report.group else []
    rows = [_row(_name(item, report.group), item) for item in items]
    return table(console, columns, [*rows, _row("all", report.total)])


def _name(item: UsageView, group: str | None) -> str:
    if item.day is not None:
        return item.day.isoformat()
    if group == "project" and item.project is not None:
        return item.project
    return item.key_name or item.key or "without a key"


def _row(name: str, item: UsageView) -> tuple[str, ...]:
    counts = (item.rows, item.row_errors, item.input_tokens, item.output_tokens)
    return (
        name,
        f"{item.jobs:,}",
        duration(item.device_seconds),
        *(f"{count:,}" for count in counts),
    )
