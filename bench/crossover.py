"""The picture of `bench.sweep`: where a sparse layer overtakes the dense one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib import colormaps
from matplotlib.figure import Figure

from bench.sparse import BOTH, FORWARD

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from bench.sweep import Point

TITLES = {FORWARD: "forward (inference)", BOTH: "forward + backward (training)"}

GAP = 0.065
"""Between the middles of two labels at least: the share of the axis that a line of text takes."""


def crossover(about: Mapping[str, Any], points: Sequence[Point], path: Path) -> None:
    """How many times faster than dense, against zeros: a line a batch, a panel a size and pass.

    Args:
        about: facts of the machine, and the date, as `sweep.read` gives them.
        points: of one sweep.
        path: where the PNG goes.
    """
    panels: dict[tuple[tuple[int, int], str], list[Point]] = {}
    for point in points:
        size = (point.out_features, point.in_features)
        panels.setdefault((size, point.passes), []).append(point)
    sizes, passes = (list(dict.fromkeys(keys)) for keys in zip(*panels, strict=True))
    figure = Figure(figsize=(5.3 * len(passes), 1 + 3 * len(sizes)), layout="constrained")
    axes = figure.subplots(len(sizes), len(passes), squeeze=False, sharey=True, sharex=True)
    low, high = _limits([point.faster for point in points])
    for row, size in zip(axes, sizes, strict=True):
        for axis, one in zip(row, passes, strict=True):
            axis.set_ylim(low, high)
            _draw(axis, panels[size, one])
            axis.tick_params(labelbottom=True, labelleft=True)
            axis.set_xlabel("weights that are 0, %", fontsize=9)
            axis.set_title(f"{size[1]} inputs → {size[0]} outputs, {TITLES[one]}", fontsize=10)
        row[0].set_ylabel("times faster than dense")
    facts = about["machine"]
    figure.suptitle(
        "When does a sparse layer pay? Its speed against the dense layer's, at each batch size\n"
        f"{facts['cpu']}, {facts['cores']} cores, {facts['threads']} threads, "
        f"{facts['instruction_set']}, float32, torch {facts['torch']}, {about['date']}",
        fontsize=12,
    )
    figure.savefig(path, dpi=120)


def _limits(ratios: Sequence[float]) -> tuple[float, float]:
    """A little more than the ratios take, with 1 inside."""
    return min(0.8, min(ratios) / 1.25), max(1.25, max(ratios) * 1.25)


def _draw(axis: Axes, points: Sequence[Point]) -> None:
    batches = sorted({point.batch for point in points})
    zeros = sorted({point.zeros for point in points})
    axis.set_yscale("log")
    axis.axhspan(axis.get_ylim()[0], 1, color="0.93", zorder=0)
    axis.axhline(1, color="0.3", linewidth=1.2, zorder=1)
    axis.annotate(
        "grey: the dense layer is faster",
        (_place(zeros[-1]), 1),
        (-2, -4),
        textcoords="offset points",
        ha="right",
        va="top",
        fontsize=8,
        color="0.3",
    )
    # The lightest colours of the map could not be read on white.
    steps = max(len(batches) - 1, 1)
    shades = {batch: colormaps["plasma"](0.8 * i / steps) for i, batch in enumerate(batches)}
    ends = {}
    for batch in batches:
        line = sorted((point.zeros, point.faster) for point in points if point.batch == batch)
        places, ratios = [_place(share) for share, _ in line], [ratio for _, ratio in line]
        axis.plot(places, ratios, "o-", color=shades[batch], markersize=3, linewidth=1.5)
        ends[batch] = ratios[-1]
    _label(axis, _place(zeros[-1]), ends, shades)
    low, high = axis.get_ylim()
    ticks = [tick for tick in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200) if low <= tick <= high]
    axis.set_yticks(ticks, [f"{tick:g}×" for tick in ticks])
    axis.set_xticks([_place(share) for share in zeros], [str(share) for share in zeros], fontsize=9)
    axis.minorticks_off()
    axis.grid(alpha=0.3)


def _place(zeros: int) -> float:
    """Where a share of zeros stands: a step to the right each time that what is left halves."""
    return -math.log2(1 - zeros / 100)


def _label(axis: Axes, right: float, ends: Mapping[int, float], shades: Mapping[int, Any]) -> None:
    """The batch beside the end of each line, no label over another."""
    low, high = (math.log(limit) for limit in axis.get_ylim())
    shares = [(math.log(ratio) - low) / (high - low) for ratio in ends.values()]
    for (batch, ratio), share in zip(ends.items(), apart(shares, GAP), strict=True):
        height = math.exp(low + share * (high - low))
        axis.annotate(
            f"batch {batch}",
            (right, ratio),
            (right + 0.35, height),
            va="center",
            fontsize=8,
            color=shades[batch],
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": shades[batch],
                "linewidth": 0.6,
                "relpos": (0, 0.5),
                "shrinkA": 0,
            },
        )
    left = axis.get_xlim()[0]
    axis.set_xlim(left, right + 0.3 * (right - left))


def apart(places: Sequence[float], gap: float) -> list[float]:
    """The places moved so that they stand ``gap`` from each other, within 0 ... 1, in their order.

    Those that would stand closer become a group, evenly spaced around the mean of their places.
    """
    groups: list[list[int]] = []
    middles: list[float] = []
    for index in sorted(range(len(places)), key=lambda index: places[index]):
        group: list[int] = []
        added = [index]
        while True:
            group = added + group
            half = gap * len(group) / 2
            middle = sum(places[member] for member in group) / len(group)
            middle = min(max(middle, half), 1 - half)
            if not groups or middle - middles[-1] >= half + gap * len(groups[-1]) / 2:
                break
            added = groups.pop()
            middles.pop()
        groups.append(group)
        middles.append(middle)
    moved = [0.0] * len(places)
    for group, middle in zip(groups, middles, strict=True):
        for step, index in enumerate(group):
            moved[index] = middle + gap * (step - (len(group) - 1) / 2)
    return moved
