"""How sure a rate of so many pictures is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

Z95 = 1.959963984540054


def wilson_interval(successes: int, n: int) -> tuple[float, float]:
    """The 95% Wilson score interval of a rate; (0, 1) where nothing was counted."""
    if not 0 <= successes <= n:
        raise ValueError(f"successes={successes}, n={n}: give 0 <= successes <= n")
    if n == 0:
        return 0.0, 1.0
    rate, z2 = successes / n, Z95 * Z95
    centre = (rate + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 / (1 + z2 / n) * math.sqrt(rate * (1 - rate) / n + z2 / (4 * n * n))
    low = 0.0 if successes == 0 else max(0.0, centre - half)  # exact at the ends, not 1e-17
    return low, 1.0 if successes == n else min(1.0, centre + half)


def surely_lost(before: float | None, after: float | None, images: float | None) -> bool:
    """Whether Newcombe's 95% interval of the difference of two rates lies below zero."""
    if before is None or after is None or images is None or images < 1:
        return False
    n = int(images)
    if not (0 <= after < before <= 1):
        return False
    low_before, _ = wilson_interval(round(before * n), n)
    _, high_after = wilson_interval(round(after * n), n)
    return before - after > math.hypot(before - low_before, high_after - after)


def before_after(was: Sequence[bool], now: Sequence[bool]) -> dict[str, Any]:
    """Two rates of the same `images`, with Wilson's 95% intervals."""
    return {
        "before": share(was),
        "after": share(now),
        "images": len(now),
        "before_interval": list(wilson_interval(sum(map(bool, was)), len(was))),
        "after_interval": list(wilson_interval(sum(map(bool, now)), len(now))),
    }


def share(seen: Sequence[bool]) -> float | None:
    return sum(map(bool, seen)) / len(seen) if len(seen) else None
