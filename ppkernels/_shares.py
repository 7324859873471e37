"""From a share to a number of entries."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any


def entries_of(share: float, entries: int, op: str = "entries_of", name: str = "share") -> int:
    """⌊share · entries⌋, as the share was meant: 0.29 of 100 are 29.

    0.29 is not a float, and the nearest float times 100 lies below 29. So a product within 1e-12 of
    itself, and within a quarter of an entry, below a whole number counts as that number. A NumPy
    float narrower than float64 means the decimal that it prints as. What such a number or a
    float32 tensor becomes by ``.item()`` or float() cannot be told from a float64 that was meant:
    ``torch.tensor(0.29).item()`` is 0.28999999165534973, of 100 are 28.

    Args:
        share: from 0 to 1.
        entries: ≥ 0.
        op, name: what errors call the caller and the share.

    Raises:
        TypeError, ValueError: a share that is no number from 0 to 1; entries that are no whole
            number, or negative.
    """
    if not isinstance(entries, Integral) or isinstance(entries, bool):
        raise TypeError(f"{op}: entries must be a whole number, got {entries!r}")
    if entries < 0:
        raise ValueError(f"{op}: entries must be a whole number >= 0, got {entries}")
    product = check_share(op, name, share) * int(entries)
    return min(math.floor(product + min(product * 1e-12, 0.25)), int(entries))


def check_share(op: str, name: str, share: Any) -> float:
    """``share`` as a float from 0 to 1, a narrow NumPy float by its decimal (`entries_of`)."""
    if not isinstance(share, Real) or isinstance(share, bool):
        raise TypeError(f"{op}: {name} must be a number from 0 to 1, got {share!r}")
    is_narrow = getattr(share, "itemsize", 8) < 8
    number = float(str(share)) if is_narrow else float(share)
    if not 0 <= number <= 1:
        raise ValueError(f"{op}: {name} must be a number from 0 to 1, got {share}")
    return number
