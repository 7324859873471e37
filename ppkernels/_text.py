"""Tables as text, and the numbers in them."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

# What a terminal shows without breaking lines.
_WIDTH = 100
# Names are shortened to fit, but not below this.
_LEAST = 12
_GAP = "  "


def table(
    headings: Sequence[str],
    rows: Sequence[Sequence[str]],
    total: Sequence[str] | None = None,
    words: Collection[str] = (),
) -> list[str]:
    """The lines of a table: headings, a rule, ``rows`` and, under another rule, ``total``.

    The first column has the names, which are shortened where the table would be too wide. It and
    the columns headed by ``words`` begin on the left; all others are numbers and end on the right.
    A last column of words is a remark, and as long as it likes.
    """
    every = [*rows] if total is None else [*rows, total]
    widths = [max(map(len, column)) for column in zip(headings, *every, strict=True)]
    if headings[-1] in words:
        widths[-1] = len(headings[-1])
    others = sum(len(_GAP) + width for width in widths[1:])
    widths[0] = min(widths[0], max(_WIDTH - others, _LEAST))

    def line(cells: Sequence[str]) -> str:
        cells = [shortened(cells[0], widths[0]), *cells[1:]]
        placed = [
            cell.ljust(width) if column == 0 or headings[column] in words else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return _GAP.join(placed).rstrip()

    rule = "-" * (widths[0] + others)
    end = [] if total is None else [rule, line(total)]
    return [line(headings), rule, *map(line, rows), *end]


def shortened(name: str, width: int) -> str:
    """``name``, with … in its middle where it is longer than ``width``."""
    if len(name) <= width:
        return name
    end = width // 2
    return f"{name[: width - 1 - end]}…{name[len(name) - end :]}"


def shape_text(shape: Sequence[int]) -> str:
    """A shape as 256x128."""
    return "x".join(map(str, shape))


def percent_text(share: float) -> str:
    """A share in per cent, ``-`` for NaN."""
    if math.isnan(share):
        return "-"
    text = f"{100 * share:.2f}%"
    # Rounding must not say that all are kept, or none, where it is not so.
    if share > 0 and text == "0.00%":
        return "<0.01%"
    if share < 1 and text == "100.00%":
        return ">99.99%"
    return text


def bytes_text(count: int) -> str:
    """A number of bytes, in the unit that leaves less than 1024 of them."""
    size, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while size >= 1023.95 and len(units) > 1:
        size /= 1024
        del units[0]
    return f"{count} B" if units[0] == "B" else f"{size:.1f} {units[0]}"
