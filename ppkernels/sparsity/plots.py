"""The pictures of the controller and of the report. matplotlib is imported by the first one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ppkernels.sparsity.adaptive_alpha import AlphaRecord


def alpha_history(history: Sequence[AlphaRecord], epsilon: float, path: str | Path) -> None:
    """α and the share of small weights over the epochs, to the file ``path``."""
    if not history:
        raise ValueError("AdaptiveAlpha.plot: there is no history yet; call step() first")
    figure = _figure("AdaptiveAlpha.plot", 7.2, 6.0)
    above, below = figure.subplots(2, 1, sharex=True)
    layers = list(dict.fromkeys(record.layer for record in history))
    for layer in layers:
        records = [record for record in history if record.layer == layer]
        epochs = [record.epoch for record in records]
        (line,) = above.step(epochs, [r.next_alpha for r in records], where="post", label=layer)
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
    below.set_ylabel(f"share of |θ| < {epsilon:g}, %")
    below.set_xlabel("epochs trained")
    below.xaxis.get_major_locator().set_params(integer=True)
    for axis in (above, below):
        axis.grid(alpha=0.3)
    if len(layers) > 1:
        figure.legend(*above.get_legend_handles_labels(), loc="outside right upper", frameon=False)
    figure.savefig(path, dpi=140)


def _figure(caller: str, width: float, height: float) -> Figure:
    """A figure that belongs to no window system, whatever backend is set."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"{caller}: pictures need matplotlib; pip install matplotlib") from error
    return Figure(figsize=(width, height), layout="constrained")
