"""A report as text."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ppkernels.sparsity.report import LayerReport, Report

# Columns whose cells are words; the others are numbers and stand on the right.
_WORDS = ("layer", "kind", "shape")


def report_table(report: Report) -> str:
    """A row for each layer and one for all, and what the columns mean."""
    headings = ["layer", "kind", "shape", "α", "stores", "entries", "kept", "frozen"]
    headings += [f"|θ|<{epsilon:g}" for epsilon in report.epsilons]
    headings += ["mean θ", "mean |θ|", "dense", "packed"]
    rows = [_cells(layer) for layer in (*report.layers, report.total)]
    widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]

    def line(cells: list[str]) -> str:
        placed = [
            cell.ljust(width) if heading in _WORDS else cell.rjust(width)
            for cell, width, heading in zip(cells, widths, headings, strict=True)
        ]
        return "  ".join(placed).rstrip()

    rule = "-" * len("  ".join("-" * width for width in widths))
    parts = [line(headings), rule, *map(line, rows[:-1]), rule, line(rows[-1]), "", *_LEGEND]
    if report.other_parameters:
        parts.append(
            f"Not listed: {report.other_parameters:,} entries of other parameters (biases, norms, "
            "embeddings)."
        )
    return "\n".join(parts)


_LEGEND = (
    "θ is the weight as the network sees it. kept: θ ≠ 0. frozen: no step moves it.",
    "packed: the kept values and a mask of 1 bit an entry, or dense where that is less.",
)


def _cells(layer: LayerReport) -> list[str]:
    found = layer.statistics
    return [
        " = ".join((layer.name, *layer.tied)),
        layer.kind,
        "" if layer.shape is None else "x".join(map(str, layer.shape)),
        "-" if layer.alpha is None else f"{layer.alpha:.6g}",
        layer.stores or "-",
        f"{layer.entries:,}",
        _percent(layer.share_kept),
        _percent(layer.share_frozen),
        *(_percent(found.share_below(epsilon)) for epsilon in found.below),
        _number(found.mean),
        _number(found.mean_abs),
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


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2e}"


def _bytes(count: int) -> str:
    size, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while size >= 1023.95 and len(units) > 1:
        size /= 1024
        del units[0]
    return f"{count} B" if units[0] == "B" else f"{size:.1f} {units[0]}"
