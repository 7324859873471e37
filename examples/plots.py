"""The two pictures of a run: how the weights are distributed, and what pruning costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no window, on any machine

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

# {α: {layer: θ as one row of numbers}}
Weights = Mapping[float, Mapping[str, np.ndarray]]

BINS = 81


def theta_histograms(weights: Weights, path: Path) -> None:
    """Histograms of θ per layer, all exponents over each other, to the file ``path``.

    Above θ itself, below log10|θ|, which shows how far below the pruning thresholds the small
    weights lie. All exponents share a layer's bins; counts are on a log scale.
    """
    layers = list(next(iter(weights.values())))
    figure, axes = plt.subplots(
        2, len(layers), figsize=(1.2 + 4.4 * len(layers), 6.8), squeeze=False
    )
    for column, layer in enumerate(layers):
        rows = {alpha: by_layer[layer] for alpha, by_layer in weights.items()}
        _draw_theta(axes[0, column], rows)
        _draw_magnitude(axes[1, column], rows)
        axes[0, column].set_title(f"{layer}: {next(iter(rows.values())).size:,} weights")
    axes[0, 0].set_ylabel("weights per bin")
    axes[1, 0].set_ylabel("weights per bin")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    _save(figure, path)


def accuracy_against_kept(
    kept: Sequence[float], curves: Mapping[float, np.ndarray], tested_on: str, path: Path
) -> None:
    """Test accuracy against the share of weights that pruning keeps, to the file ``path``.

    Args:
        kept: the shares, from 0 to 1.
        curves: for each α the accuracies, [seeds, len(kept)]; several seeds get a band of ±1
            standard deviation.
        tested_on: the name of the test images, for the axis.
        path: where the PNG goes.
    """
    figure, axis = plt.subplots(figsize=(7.2, 4.8))
    percents = 100 * np.asarray(kept)
    for colour, (alpha, accuracies) in zip(_colours(len(curves)), curves.items(), strict=True):
        mean = 100 * accuracies.mean(axis=0)
        axis.plot(percents, mean, "o-", color=colour, markersize=4, label=f"α = {alpha:g}")
        if len(accuracies) > 1:
            spread = 100 * accuracies.std(axis=0, ddof=1)
            axis.fill_between(percents, mean - spread, mean + spread, color=colour, alpha=0.15)
    axis.set_xscale("log")
    axis.set_xticks(percents, [f"{percent:g}" for percent in percents])
    axis.minorticks_off()
    axis.set_xlabel("share of weights kept, % (the largest |θ| of the whole network)")
    axis.set_ylabel(f"accuracy on {tested_on}, %")
    axis.grid(alpha=0.3)
    axis.legend(loc="lower right")
    axis.set_title("One-shot pruning by magnitude, no training afterwards")
    _save(figure, path)


def _draw_theta(axis: Axes, rows: Mapping[float, np.ndarray]) -> None:
    # The few largest weights would squeeze the rest into one bin: they are counted at the edges.
    edge = max(float(np.quantile(np.abs(theta), 0.999)) for theta in rows.values())
    bins = np.linspace(-edge, edge, BINS)
    for colour, (alpha, theta) in zip(_colours(len(rows)), rows.items(), strict=True):
        _draw(axis, np.clip(theta.astype(float), -edge, edge), bins, colour, f"α = {alpha:g}")
    axis.set_ylim(bottom=0.7)
    axis.set_xlabel("θ (the largest 0.1 % counted at the edges)")


def _draw_magnitude(axis: Axes, rows: Mapping[float, np.ndarray]) -> None:
    # In double precision: rounded, a value at the left edge would fall out of its bin.
    largest = max(float(np.abs(theta).max()) for theta in rows.values())
    bins = np.linspace(-6, max(np.log10(max(largest, 1e-6)), -1), BINS)
    for colour, (alpha, theta) in zip(_colours(len(rows)), rows.items(), strict=True):
        # A weight of 0 has no logarithm; it belongs to the smallest.
        magnitude = np.log10(np.maximum(np.abs(theta.astype(float)), 10.0 ** bins[0]))
        _draw(axis, np.minimum(magnitude, bins[-1]), bins, colour, f"α = {alpha:g}")
    axis.set_ylim(bottom=0.7)
    for threshold in (-3, -2):
        axis.axvline(threshold, color="0.5", linestyle=":", linewidth=1)
    axis.xaxis.set_major_formatter(FuncFormatter(lambda power, _: f"$10^{{{power:.0f}}}$"))
    axis.set_xlabel("|θ| (smaller ones counted at the left edge)")


def _draw(axis: Axes, values: np.ndarray, bins: np.ndarray, colour: object, label: str) -> None:
    axis.hist(values, bins, histtype="step", log=True, color=colour, label=label, linewidth=1.4)
    axis.grid(alpha=0.3)


def _colours(count: int) -> np.ndarray:
    """Dark to light along the exponents, which have an order."""
    return plt.get_cmap("viridis")(np.linspace(0.0, 0.85, count))


def _save(figure: plt.Figure, path: Path) -> None:
    figure.set_layout_engine("constrained")
    figure.savefig(path, dpi=140)
    plt.close(figure)
