"""The pictures of the examples: how weights are distributed, what pruning costs, what α does."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import matplotlib

matplotlib.use("Agg")  # no window, on any machine

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter


class Layer(Protocol):
    """What `against_depth` asks of a layer."""

    mean: float
    mean_abs: float


# {what it is called: {layer: θ as one row of numbers}}
Weights = Mapping[str, Mapping[str, np.ndarray]]

BINS = 81
MOST_TICKS = 12  # that have room beside each other
MOST_COLUMNS = 6  # of layers; more begin a new line
ONE_SHOT = "One-shot pruning by magnitude, no training afterwards"


def theta_histograms(weights: Weights, path: Path, highlight: Collection[str] = ()) -> None:
    """Histograms of θ per layer, all networks over each other, to the file ``path``.

    Above θ itself, below log10|θ|, which shows how far below the pruning thresholds the small
    weights lie. All networks share a layer's bins; counts are on a log scale.

    Args:
        weights: θ by network and layer; the networks in an order, such as that of their exponents.
        path: where the PNG goes.
        highlight: the networks that stand out in red.
    """
    layers = list(next(iter(weights.values())))
    shades = colours(weights, highlight)
    columns = min(len(layers), MOST_COLUMNS)
    bands = -(-len(layers) // columns)
    figure, axes = plt.subplots(
        2 * bands, columns, figsize=(1.2 + 4.4 * columns, 0.4 + 6.4 * bands), squeeze=False
    )
    for place in range(bands * columns):
        band, column = divmod(place, columns)
        above, below = axes[2 * band : 2 * band + 2, column]
        if place >= len(layers):
            above.axis("off")
            below.axis("off")
            continue
        rows = {network: by_layer[layers[place]] for network, by_layer in weights.items()}
        _draw_theta(above, rows, shades)
        _draw_magnitude(below, rows, shades)
        above.set_title(f"{layers[place]}: {next(iter(rows.values())).size:,} weights")
        if column == 0:
            above.set_ylabel("weights per bin")
            below.set_ylabel("weights per bin")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    # What is left of the width: six names of a legend need two layers' columns.
    figure.legend(
        handles,
        labels,
        loc="outside upper center",
        ncols=min(len(labels), 2 * columns),
        frameon=False,
    )
    save(figure, path)


def accuracy_against_kept(
    kept: Sequence[float],
    curves: Mapping[str, np.ndarray],
    tested_on: str,
    path: Path,
    *,
    largest_of: str = "the whole network",
    title: str = ONE_SHOT,
    highlight: Collection[str] = (),
    dashed: Mapping[str, np.ndarray] | None = None,
    dashed_as: str = "",
) -> None:
    """Test accuracy against the share of weights that pruning keeps, to the file ``path``.

    Args:
        kept: the shares, from 0 to 1.
        curves: for each network the accuracies, [seeds, len(kept)]; several seeds get a band of ±1
            standard deviation.
        tested_on: the name of the test images, for the axis.
        path: where the PNG goes.
        largest_of: of what pruning keeps the largest |θ|, for the axis.
        title: how the networks were pruned.
        highlight: the networks that stand out in red.
        dashed: for some of the networks other accuracies, which get dashed lines of their colour.
        dashed_as: what was done to the networks of the dashed lines.
    """
    figure, axis = plt.subplots(figsize=(7.2, 4.8))
    percents = 100 * np.asarray(kept)
    shades = colours(curves, highlight)
    for label, accuracies in curves.items():
        _draw_with_band(axis, percents, 100 * accuracies, shades[label], label)
    for label, accuracies in (dashed or {}).items():
        name = f"{label}, {dashed_as}"
        _draw_with_band(axis, percents, 100 * accuracies, shades[label], name, "s--")
    axis.set_xscale("log")
    ticks = percents if len(percents) <= MOST_TICKS else [1, 2, 3, 5, 10, 20, 30, 50, 100]
    axis.set_xticks(ticks, [f"{percent:g}" for percent in ticks])
    axis.minorticks_off()
    axis.set_xlabel(f"share of weights kept, % (the largest |θ| of {largest_of})")
    axis.set_ylabel(f"accuracy on {tested_on}, %")
    axis.grid(alpha=0.3)
    axis.legend(loc="lower right")
    axis.set_title(title)
    save(figure, path)


def against_depth(
    networks: Mapping[str, Sequence[Sequence[Layer]]], names: Sequence[str], path: Path
) -> None:
    """Mean θ and mean |θ| of each layer, from the first to the last, to the file ``path``.

    Args:
        networks: for each kind of network the layers of each seed, in the order of ``names``;
            several seeds get a band of ±1 standard deviation.
        names: of the layers.
        path: where the PNG goes.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(max(10, 0.9 * len(names)), 4.8))
    for label, colour in colours(networks).items():
        for axis, values in (
            (left, [[layer.mean for layer in layers] for layers in networks[label]]),
            (right, [[layer.mean_abs for layer in layers] for layers in networks[label]]),
        ):
            _draw_with_band(axis, range(len(names)), np.array(values), colour, label)
    left.axhline(0, color="0.5", linestyle=":", linewidth=1)
    left.set_ylabel("mean θ")
    right.set_ylabel("mean |θ|")
    right.set_ylim(bottom=0)
    for axis in (left, right):
        axis.set_xticks(range(len(names)), names, rotation=90 if len(names) > 8 else 0)
        axis.set_xlabel("layer, from the image to the output")
        axis.grid(alpha=0.3)
    right.legend()
    save(figure, path)


def over_epochs(
    networks: Mapping[str, Sequence[Sequence[object]]],
    panels: Mapping[str, str],
    path: Path,
    highlight: Collection[str] = (),
) -> None:
    """Numbers after each epoch, a panel below the other, to the file ``path``.

    Args:
        networks: for each kind of network the epochs of each seed; several seeds get a band of ±1
            standard deviation.
        panels: which attributes of an epoch are drawn, and what the axis says; where that ends in
            "%" the attribute is a share.
        path: where the PNG goes.
        highlight: the networks that stand out in red.
    """
    figure, axes = plt.subplots(
        len(panels), 1, figsize=(7.2, 0.8 + 2.8 * len(panels)), sharex=True, squeeze=False
    )
    shades = colours(networks, highlight)
    for axis, (name, heading) in zip(axes[:, 0], panels.items(), strict=True):
        for label, seeds in networks.items():
            values = np.array([[getattr(epoch, name) for epoch in epochs] for epochs in seeds])
            values = values * (100 if heading.endswith("%") else 1)
            # Where two of the highlighted lie on each other, both are seen.
            style = "--" if label in list(highlight)[1:] else "-"
            epochs = range(1, values.shape[1] + 1)
            _draw_with_band(axis, epochs, values, shades[label], label, style)
        axis.set_ylabel(heading)
        axis.grid(alpha=0.3)
    axes[-1, 0].set_xlabel("epoch")
    axes[-1, 0].xaxis.get_major_locator().set_params(integer=True)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    columns = min(len(labels), 4)
    figure.legend(handles, labels, loc="outside upper center", ncols=columns, frameon=False)
    save(figure, path)


def stages(
    names: Sequence[str],
    bars: Mapping[str, Sequence[Sequence[float]]],
    points: Mapping[str, Sequence[Sequence[float]]],
    path: Path,
    highlight: Collection[str] = (),
) -> None:
    """What a network is at each stage of its way, a row for each, to the file ``path``.

    Args:
        names: of the stages, from the first to the last.
        bars: panels of bars that begin at 0: by heading, for each stage the numbers of a mean and a
            standard deviation; a stage without numbers has no bar.
        points: panels of points likewise, for numbers far from 0.
        path: where the PNG goes.
        highlight: the stages that stand out in red.
    """
    panels = {**bars, **points}
    figure, axes = plt.subplots(
        1, len(panels), figsize=(2 + 4 * len(panels), 1 + 0.4 * len(names)), sharey=True
    )
    for axis, (heading, panel) in zip(np.atleast_1d(axes), panels.items(), strict=True):
        shown = {row: np.array(values) for row, values in enumerate(panel) if len(values)}
        for row, values in shown.items():
            shade = "tab:red" if names[row] in highlight else "0.6"
            error = values.std(ddof=1) if len(values) > 1 else None
            if heading in bars:
                drawn = axis.barh(row, values.mean(), xerr=error, color=shade)
                axis.bar_label(drawn, fmt="%.3g", padding=4)
            else:
                axis.errorbar(values.mean(), row, xerr=error, fmt="o", color=shade)
        axis.margins(x=0.15)
        axis.set_xlabel(heading)
        axis.grid(axis="x", alpha=0.3)
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    save(figure, path)


def colours(labels: Iterable[str], highlight: Collection[str] = ()) -> dict[str, np.ndarray]:
    """Dark to light along the labels, which have an order; red ones for ``highlight``."""
    ordinary = [label for label in labels if label not in highlight]
    shades = plt.get_cmap("viridis")(np.linspace(0.0, 0.85, len(ordinary)))
    reds = plt.get_cmap("autumn")(np.linspace(0.0, 0.6, len(highlight)))
    return {**dict(zip(ordinary, shades, strict=True)), **dict(zip(highlight, reds, strict=True))}


def save(figure: plt.Figure, path: Path) -> None:
    """Write ``figure`` to ``path`` as a PNG, and close it."""
    figure.set_layout_engine("constrained")
    figure.savefig(path, dpi=140)
    plt.close(figure)


def _draw_theta(
    axis: Axes, rows: Mapping[str, np.ndarray], shades: Mapping[str, np.ndarray]
) -> None:
    # The few largest weights would squeeze the rest into one bin: they are counted at the edges.
    edge = max(float(np.quantile(np.abs(theta), 0.999)) for theta in rows.values())
    bins = np.linspace(-edge, edge, BINS)
    for network, theta in rows.items():
        _draw(axis, np.clip(theta.astype(float), -edge, edge), bins, shades[network], network)
    axis.set_ylim(bottom=0.7)
    axis.set_xlabel("θ (the largest 0.1 % counted at the edges)")


def _draw_magnitude(
    axis: Axes, rows: Mapping[str, np.ndarray], shades: Mapping[str, np.ndarray]
) -> None:
    # In double precision: rounded, a value at the left edge would fall out of its bin.
    largest = max(float(np.abs(theta).max()) for theta in rows.values())
    bins = np.linspace(-6, max(np.log10(max(largest, 1e-6)), -1), BINS)
    for network, theta in rows.items():
        # A weight of 0 has no logarithm; it belongs to the smallest.
        magnitude = np.log10(np.maximum(np.abs(theta.astype(float)), 10.0 ** bins[0]))
        _draw(axis, np.minimum(magnitude, bins[-1]), bins, shades[network], network)
    axis.set_ylim(bottom=0.7)
    for threshold in (-3, -2):
        axis.axvline(threshold, color="0.5", linestyle=":", linewidth=1)
    axis.xaxis.set_major_formatter(FuncFormatter(lambda power, _: f"$10^{{{power:.0f}}}$"))
    axis.set_xlabel("|θ| (smaller ones counted at the left edge)")


def _draw_with_band(
    axis: Axes,
    x: Sequence[float] | np.ndarray,
    values: np.ndarray,
    colour: object,
    label: str,
    style: str = "o-",
) -> None:
    """The mean of ``values`` [seeds, len(x)], and where they are several ±1 deviation."""
    mean = values.mean(axis=0)
    axis.plot(x, mean, style, color=colour, markersize=4, label=label)
    if len(values) > 1:
        spread = values.std(axis=0, ddof=1)
        axis.fill_between(x, mean - spread, mean + spread, color=colour, alpha=0.15)


def _draw(axis: Axes, values: np.ndarray, bins: np.ndarray, colour: object, label: str) -> None:
    axis.hist(values, bins, histtype="step", log=True, color=colour, label=label, linewidth=1.4)
    axis.grid(alpha=0.3)
