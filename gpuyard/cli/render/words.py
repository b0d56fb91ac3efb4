"""Figures and times in words, and other people's text on one line."""

from __future__ import annotations

from datetime import datetime
from typing import Any


def one_line(value: Any) -> str:
    """Other people's text without what would move the cursor."""
    text = "" if value is None else str(value)
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def size(count: int) -> str:
    """Bytes for people, in binary units."""
    amount = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < 1024 or unit == "GiB":
            return f"{amount:.0f} {unit}" if amount.is_integer() else f"{amount:.1f} {unit}"
        amount /= 1024
    raise AssertionError


def duration(seconds: float) -> str:
    """42 s, 3 m 05 s, 2 h 07 m, 3 d 04 h."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} m {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes:02d} m"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours:02d} h"


def age(then: datetime) -> str:
    return duration((datetime.now(then.tzinfo) - then).total_seconds())


def clock(then: datetime) -> str:
    return then.astimezone().strftime("%H:%M:%S")


def date(then: datetime | None) -> str:
    return then.astimezone().strftime("%Y-%m-%d %H:%M:%S") if then else ""


def number(value: Any) -> str:
    """Four significant digits for a float; whole numbers as they are."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
