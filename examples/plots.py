"""The pictures of the examples: how weights are distributed, what pruning costs, what α does."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no window, on any machine

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

# {what it is called: {layer: θ as one row of numbers}}
Weights = Mapping[str, Mapping[str, np.ndarray]]

BINS = 81
MOST_TICKS = 12  # that have room beside each other
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
    figure, axes = plt.subplots(
        2, len(layers), figsize=(1.2 + 4.4 * len(layers), 6.8), squeeze=False
    )
    for column, layer in enumerate(layers):
        rows = {network: by_layer[layer] for network, by_layer in weights.items()}
        _draw_theta(axes[0, column], rows, shades)
        _draw_magnitude(axes[1, column], rows, shades)
        axes[0, column].set_title(f"{layer}: {next(iter(rows.values())).size:,} weights")
    axes[0, 0].set_ylabel("weights per bin")
    axes[1, 0].set_ylabel("weights per bin")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    # What is left of the width: six names of a legend need two layers' columns.
    figure.legend(
        handles,
        labels,
        loc="outside upper center",
        ncols=min(len(labels), 2 * len(layers)),
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
    once: Mapping[str, np.ndarray] | None = None,
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
        once: more curves of the same networks, dashed; what falls far below ``curves`` is cut off.
    """
    figure, axis = plt.subplots(figsize=(7.2, 4.8))
    percents = 100 * np.asarray(kept)
    shades = colours(curves, highlight)
    for label, accuracies in curves.items():
        mean = 100 * accuracies.mean(axis=0)
        axis.plot(percents, mean, "o-", color=shades[label], markersize=4, label=label)
        if len(accuracies) > 1:
            spread = 100 * accuracies.std(axis=0, ddof=1)
            axis.fill_between(
                percents, mean - spread, mean + spread, color=shades[label], alpha=0.15
            )
    if once is not None:
        low, high = axis.get_ylim()
        for label, accuracies in once.items():
            axis.plot(percents, 100 * accuracies.mean(axis=0), "--", color=shades[label])
        axis.set_ylim(low - 2 * (high - low), high)
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


def over_epochs(
    panels: Mapping[str, Mapping[str, np.ndarray]], path: Path, highlight: Collection[str] = ()
) -> None:
    """Numbers over the epochs of training, a panel below the other, to the file ``path``.

    Args:
        panels: for each panel, by what its axis says, the numbers of each network, [seeds, epochs];
            several seeds get a band of ±1 standard deviation.
        path: where the PNG goes.
        highlight: the networks that stand out in red.
    """
    figure, axes = plt.subplots(len(panels), 1, figsize=(7.2, 2.9 * len(panels)), sharex=True)
    shades = colours(next(iter(panels.values())), highlight)
    for axis, (heading, networks) in zip(axes, panels.items(), strict=True):
        for network, numbers in networks.items():
            epochs = np.arange(1, numbers.shape[1] + 1)
            mean = numbers.mean(axis=0)
            width = 2 if network in highlight else 1.2
            axis.plot(epochs, mean, color=shades[network], linewidth=width, label=network)
            if len(numbers) > 1:
                spread = numbers.std(axis=0, ddof=1)
                axis.fill_between(
                    epochs, mean - spread, mean + spread, color=shades[network], alpha=0.15
                )
        axis.set_ylabel(heading)
        axis.grid(alpha=0.3)
    axes[-1].set_xlabel("epoch")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4, frameon=False)
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


def _draw(axis: Axes, values: np.ndarray, bins: np.ndarray, colour: object, label: str) -> None:
    axis.hist(values, bins, histtype="step", log=True, color=colour, label=label, linewidth=1.4)
    axis.grid(alpha=0.3)
