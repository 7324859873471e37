"""A report as text."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ppkernels.sparsity.seen import epsilon_text

if TYPE_CHECKING:
    from ppkernels.sparsity.report import LayerReport, Report

# What a terminal shows without breaking lines.
_WIDTH = 100
# Names are shortened to fit, but not below this.
_LEAST = 12
# Columns whose cells are words; the others are numbers and stand on the right.
_WORDS = ("layer", "shape")


def report_table(report: Report) -> str:
    """A row for each layer and one for all, and what the columns mean."""
    headings = ["layer", "shape", "α", "kept", "frozen"]
    headings += [f"|θ|<{epsilon_text(epsilon)}" for epsilon in report.epsilons]
    headings += ["dense", "packed"]
    rows = [_cells(layer) for layer in report.layers]
    total = [*_cells(report.total)]
    total[1] = f"{report.total.entries:,}"
    widths = [max(map(len, column)) for column in zip(headings, *rows, total, strict=True)]
    others = sum(len(_GAP) + width for width in widths[1:])
    widths[0] = min(widths[0], max(_WIDTH - others, _LEAST))

    def line(cells: list[str]) -> str:
        cells = [shortened(cells[0], widths[0]), *cells[1:]]
        placed = [
            cell.ljust(width) if heading in _WORDS else cell.rjust(width)
            for cell, width, heading in zip(cells, widths, headings, strict=True)
        ]
        return _GAP.join(placed).rstrip()

    rule = "-" * (widths[0] + others)
    parts = [line(headings), rule, *map(line, rows), rule, line(total), "", *_LEGEND]
    if report.other_parameters:
        parts += [
            f"Not listed: {report.other_parameters:,} entries of other parameters (biases, norms, "
            "embeddings,",
            "recurrent weights, input projections of attention, a subclass's own).",
        ]
    return "\n".join(parts)


_GAP = "  "
_LEGEND = (
    "θ is the weight as the network sees it. kept: θ ≠ 0. frozen: no step moves it.",
    "packed: the kept values and a mask of 1 bit an entry, or dense where that is less.",
    "Under shape, the last row has the number of all entries.",
)


def shortened(name: str, width: int) -> str:
    """``name``, with … in its middle where it is longer than ``width``."""
    if len(name) <= width:
        return name
    end = width // 2
    return f"{name[: width - 1 - end]}…{name[len(name) - end :]}"


def _cells(layer: LayerReport) -> list[str]:
    found = layer.statistics
    return [
        " = ".join((layer.name, *layer.tied)),
        "" if layer.shape is None else "x".join(map(str, layer.shape)),
        "-" if layer.alpha is None else f"{layer.alpha:.4g}",
        _percent(layer.share_kept),
        _percent(layer.share_frozen),
        *(_percent(found.share_below(epsilon)) for epsilon in found.below),
        _bytes(layer.bytes_dense),
        _bytes(layer.bytes_packed),
    ]


def _percent(share: float) -> str:
    if math.isnan(share):
        return "-"
    text = f"{100 * share:.2f}%"
    # Rounding must not say that all are kept, or none, where it is not so.
    if share > 0 and text == "0.00%":
        return "<0.01%"
    if share < 1 and text == "100.00%":
        return ">99.99%"
    return text


def _bytes(count: int) -> str:
    size, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while size >= 1023.95 and len(units) > 1:
        size /= 1024
        del units[0]
    return f"{count} B" if units[0] == "B" else f"{size:.1f} {units[0]}"
