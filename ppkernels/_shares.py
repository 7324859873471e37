"""From a share to a number of entries."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any


def entries_of(share: float, entries: int) -> int:
    """⌊share · entries⌋, as the share was meant: 0.29 of 100 are 29.

    0.29 is not a float, and the nearest float times 100 lies below 29. So a product within 1e-12 of
    itself below a whole number counts as that number.

    Args:
        share: from 0 to 1.
        entries: ≥ 0.

    Raises:
        TypeError, ValueError: a share that is no number from 0 to 1.
    """
    product = check_share("entries_of", "share", share) * entries
    return min(math.floor(product * (1 + 1e-12)), entries)


def check_share(op: str, name: str, share: Any) -> float:
    """``share`` as a float from 0 to 1."""
    if not isinstance(share, Real) or isinstance(share, bool):
        raise TypeError(f"{op}: {name} must be a number from 0 to 1, got {share!r}")
    number = float(share)
    if not 0 <= number <= 1:
        raise ValueError(f"{op}: {name} must be a number from 0 to 1, got {share}")
    return number
