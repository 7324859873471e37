"""The pictures of the controller and of the report. matplotlib is imported by the first one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ppkernels._text import shortened
from ppkernels.sparsity.seen import epsilon_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ppkernels.sparsity.adaptive_alpha import AlphaRecord
    from ppkernels.sparsity.report import LayerReport, Report


# Histograms in a row.
_COLUMNS = 4
# Layers that a picture of a report shows: the largest. Drawing takes time for each.
_MOST = 24
# Colours that matplotlib has before they begin again.
_COLORS = 10
# Characters of a name that fit over a histogram, or beside a bar.
_NAME = 30


def alpha_history(history: Sequence[AlphaRecord], epsilon: float, path: str | Path) -> None:
    """α and the share of small weights over the epochs, to the file ``path``."""
    if not history:
        raise ValueError("AdaptiveAlpha.plot: there is no history yet; call step() first")
    layers = list(dict.fromkeys(record.layer for record in history))
    # As many names stand in a column of the legend, and as wide it is.
    columns = math.ceil(len(layers) / _MOST) if len(layers) > 1 else 0
    figure = _figure("AdaptiveAlpha.plot", 7.2 + 2.4 * columns, 6.0)
    above, below = figure.subplots(2, 1, sharex=True)
    if len(layers) > _COLORS:
        above.set_prop_cycle(color=_colors(len(layers)))
    for layer in layers:
        records = [record for record in history if record.layer == layer]
        epochs = [record.epoch for record in records]
        (line,) = above.step(
            epochs, [r.next_alpha for r in records], where="post", label=_label(layer)
        )
        # Where α changes the share jumps, with no training: two points of one epoch.
        points = [
            (record.epoch, 100 * share)
            for record in records
            for share in (record.sparsity, record.next_sparsity)
        ]
        below.plot(*zip(*points, strict=True), color=line.get_color(), linewidth=1)
        below.plot(
            epochs, [100 * r.sparsity for r in records], "o", color=line.get_color(), markersize=4
        )
    above.set_ylabel("α")
    below.set_ylabel(f"share of |θ| < {epsilon_text(epsilon)}, %")
    below.set_xlabel("epochs trained")
    below.xaxis.get_major_locator().set_params(integer=True)
    for axis in (above, below):
        axis.grid(alpha=0.3)
    if len(layers) > 1:
        figure.legend(
            *above.get_legend_handles_labels(),
            loc="outside right upper",
            ncols=columns,
            fontsize="small",
            frameon=False,
        )
    figure.savefig(path, dpi=140)


def _label(layer: str) -> str:
    text = _escaped(shortened(layer, _NAME))
    # matplotlib leaves names with a leading underscore out of the legend.
    return f" {text}" if text.startswith("_") else text


def _colors(count: int) -> list[tuple[float, ...]]:
    """As many colours, from first to last in an order that the eye sees."""
    from matplotlib import colormaps

    # The last ones are too light on white.
    return [tuple(colormaps["viridis"](0.92 * place / (count - 1))) for place in range(count)]


def report_picture(report: Report, path: str | Path) -> None:
    """A histogram of each layer's θ, and below them the shares of all, to the file ``path``."""
    layers = _largest(report.layers)
    columns = min(len(layers), _COLUMNS)
    rows = math.ceil(len(layers) / columns)
    heights = [2.9 * rows, 1.2 + 0.17 * (1 + len(report.epsilons)) * (len(layers) + 1)]
    figure = _figure("Report.plot", max(7.2, 3.6 * columns), sum(heights))
    above, below = figure.subfigures(2, 1, squeeze=False, height_ratios=heights)[:, 0]
    axes = above.subplots(rows, columns, squeeze=False)
    for axis, layer in zip(axes.flat, layers, strict=False):
        _draw_histogram(axis, layer)
    for axis in axes.flat[len(layers) :]:
        axis.set_visible(False)
    for axis in axes[:, 0]:
        axis.set_ylabel("entries per bin")
    _draw_shares(below.subplots(), [*layers, report.total], report.epsilons)
    if len(layers) < len(report.layers):
        figure.suptitle(
            f"the largest {len(layers)} of {len(report.layers)} layers, and all together"
        )
    figure.savefig(path, dpi=140)


def _draw_histogram(axis: Axes, layer: LayerReport) -> None:
    found = layer.statistics
    alpha = "" if layer.alpha is None else f", α = {layer.alpha:.4g}"
    title = f"{shortened(layer.name, _NAME)}\n{shortened(layer.kind, _NAME - len(alpha))}{alpha}"
    axis.set_title(_escaped(title), fontsize="small")
    axis.stairs(found.histogram, found.edges, fill=True, color="C0")
    if layer.entries:
        axis.set_yscale("log")
        axis.set_ylim(bottom=0.7)
    axis.set_xlabel("θ")
    axis.grid(alpha=0.3)


def _draw_shares(
    axis: Axes, drawn_layers: Sequence[LayerReport], epsilons: Sequence[float]
) -> None:
    layers = [layer for layer in drawn_layers if layer.entries]
    bars = {"kept": [layer.share_kept for layer in layers]}
    for epsilon in epsilons:
        shares = [layer.statistics.share_below(epsilon) for layer in layers]
        bars[f"|θ| < {epsilon_text(epsilon)}"] = shares
    height = 0.8 / len(bars)
    for index, (label, shares) in enumerate(bars.items()):
        places = [row + (index - (len(bars) - 1) / 2) * height for row in range(len(layers))]
        drawn = axis.barh(places, [100 * share for share in shares], height, label=label)
        axis.bar_label(drawn, fmt="%.1f", padding=2, fontsize="x-small")
    axis.set_yticks(range(len(layers)), [_escaped(shortened(each.name, _NAME)) for each in layers])
    axis.set_ylim(len(layers) - 0.5, -0.5)
    axis.set_xlim(0, 107)
    axis.set_xlabel("share of entries, %")
    axis.set_axisbelow(True)
    axis.grid(alpha=0.3, axis="x")
    axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=len(bars), frameon=False)


def _largest(layers: Sequence[LayerReport]) -> list[LayerReport]:
    """Those with the most entries, in the model's order; of equal ones the first."""
    order = sorted(range(len(layers)), key=lambda place: -layers[place].entries)
    return [layers[place] for place in sorted(order[:_MOST])]


def _escaped(text: str) -> str:
    """``text`` with no formula in it."""
    return text.replace("$", r"\$")


def _figure(caller: str, width: float, height: float) -> Figure:
    """A figure that belongs to no window system, whatever backend is set."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"{caller}: pictures need matplotlib; pip install matplotlib") from error
    return Figure(figsize=(width, height), layout="constrained")
