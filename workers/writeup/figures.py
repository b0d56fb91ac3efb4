"""Numbers as people read them, and the ticks of an axis."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

_BINARY = (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10))
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def shown(value: Any) -> str:
    """Whole numbers with separators, others with four digits that count."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int) or (value.is_integer() and abs(value) >= 1000):
        return f"{value:,.0f}"
    if value and not 1e-3 <= abs(value) < 1e6:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{mantissa} × 10{str(int(exponent)).translate(_SUPERSCRIPTS)}"
    return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def fixed(value: Any) -> str:
    """The same, with four decimals, for columns of a table."""
    if isinstance(value, float) and 1e-3 <= abs(value) < 1000:
        return f"{value:.4f}"
    return shown(value)


def size(count: float) -> str:
    """Bytes, in binary units."""
    for unit, factor in _BINARY:
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count:.0f} B"


def duration(seconds: float) -> str:
    """42.1 s, 3 min 05 s, 2 h 07 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def binary_unit(largest: float) -> tuple[str, float]:
    """The unit to show bytes in, and how many of them it has."""
    for unit, factor in _BINARY:
        if largest >= factor:
            return unit, factor
    return "bytes", 1


def power_of_ten(largest: float) -> tuple[str, float]:
    """What to divide very small or large numbers by, with its name: ("× 10⁻⁵", 1e-5)."""
    if largest == 0 or 1e-2 <= abs(largest) < 1e5:
        return "", 1.0
    exponent = math.floor(math.log10(abs(largest)))
    return f"× 10{str(exponent).translate(_SUPERSCRIPTS)}", 10.0**exponent


def ticks(low: float, high: float, most: int) -> list[float]:
    """At most ``most`` round numbers of equal distance, from ``low`` to ``high``."""
    rough = (high - low) / max(1, most - 1)
    base = 10.0 ** math.floor(math.log10(rough))
    for factor in (1, 2, 5, 10, 20, 50):
        step = factor * base
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        if last - first < most:
            return [0.0 if i == 0 else i * step for i in range(first, last + 1)]
    raise AssertionError


def decades(low: float, high: float, most: int) -> list[float]:
    """Powers of ten within the range, every one or every few."""
    first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
    every = max(1, math.ceil((last - first + 1) / most))
    return [10.0**exponent for exponent in range(first, last + 1, every)]


def tick_labels(values: Sequence[float]) -> list[str]:
    """All with the decimals that tell them apart; of one value alone, those that it needs."""
    distance = min((b - a for a, b in pairwise(values)), default=0.0)
    distance = distance or abs(values[0] if values else 0.0) / 10 or 1.0
    decimals = max(0, -math.floor(math.log10(distance) + 1e-9))
    return [f"{value:,.{decimals}f}" for value in values]
