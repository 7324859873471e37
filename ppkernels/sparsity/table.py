"""A report as text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ppkernels._text import bytes_text, percent_text, shape_text, table
from ppkernels.sparsity.seen import epsilon_text

if TYPE_CHECKING:
    from ppkernels.sparsity.report import LayerReport, Report


def report_table(report: Report) -> str:
    """A row for each layer and one for all, and what the columns mean."""
    headings = ["layer", "shape", "α", "kept", "frozen"]
    headings += [f"|θ|<{epsilon_text(epsilon)}" for epsilon in report.epsilons]
    headings += ["dense", "packed"]
    rows = [_cells(layer) for layer in report.layers]
    total = [*_cells(report.total)]
    total[1] = f"{report.total.entries:,}"
    parts = [*table(headings, rows, total, words=("shape",)), "", *_LEGEND]
    if report.other_parameters:
        parts += [
            f"Not listed: {report.other_parameters:,} entries of other parameters (biases, norms, "
            "embeddings,",
            "recurrent weights, input projections of attention, a subclass's own).",
        ]
    return "\n".join(parts)


_LEGEND = (
    "θ is the weight as the network sees it. kept: θ ≠ 0. frozen: no step moves it.",
    "packed: the kept values and a mask of 1 bit an entry, or dense where that is less.",
    "Under shape, the last row has the number of all entries.",
)


def _cells(layer: LayerReport) -> list[str]:
    found = layer.statistics
    return [
        " = ".join((layer.name, *layer.tied)),
        "" if layer.shape is None else shape_text(layer.shape),
        "-" if layer.alpha is None else f"{layer.alpha:.4g}",
        percent_text(layer.share_kept),
        percent_text(layer.share_frozen),
        *(percent_text(found.share_below(epsilon)) for epsilon in found.below),
        bytes_text(layer.bytes_dense),
        bytes_text(layer.bytes_packed),
    ]
