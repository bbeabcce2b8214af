"""Numbers as people read them: three significant digits, never an exponent."""

from __future__ import annotations

import math


def three(value: float) -> str:
    """Three significant digits, or all of a whole number's: 0.0123, 1.52, 199, 1,600."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    places = max(0, 2 - math.floor(math.log10(abs(float(f"{value:.2e}")))))
    return f"{value:,.{places}f}"


def seconds(value: float) -> str:
    """Seconds, in ms below one."""
    return f"{three(value * 1000)} ms" if value < 0.9995 else f"{three(value)} s"
