"""The tables that `python -m bench.gpu_static` prints, one a target, and those of the READMEs."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.gpu_static.measure import H100, SIZE, Measured
from bench.gpu_static.roofline import affordable
from bench.gpu_static.row import Elementwise, Row
from bench.table import count, duration

GPUS = {"sm_80": "A100", "sm_90": "H100", "sm_100": "B200", "gfx942": "MI300"}


def print_target(
    console: Console, target: str, rows: Sequence[Row], measured: Mapping[str, Measured]
) -> None:
    """The kernels compiled for a target, by name; an H100 gets its times as well."""
    is_h100 = target == H100
    table = Table("kernel", title=f"{target} ({GPUS[target]})")
    titles = ["reg.", "spill", "shared", "bits", "bytes", "floor", "instr.", "special"]
    titles += ["affords", count(SIZE), "bound by"] if is_h100 else ["matrix"]
    for title in titles:
        table.add_column(title, justify="right")
    table.columns[0].no_wrap = True
    for row in rows:
        for cells in _lines(row, measured[row.name], is_h100):
            table.add_row(*cells)
    console.print(table)


def _lines(row: Row, found: Measured, is_h100: bool) -> list[list[str]]:
    """A line for the kernel, and one for each way that is not the usual one."""
    resources = found.resources
    spill = str(resources.stack_bytes + resources.spilled_bytes)
    cells = [row.name, str(resources.registers), spill, str(resources.shared_bytes)]
    if not isinstance(row.work, Elementwise):
        return [[*cells, *_power_cells(found, is_h100)]]
    widths = "/".join(
        "+".join(map(str, bits)) for bits in (found.load_bits, found.store_bits) if bits
    )
    cells += [widths, f"{sum(found.stream_bytes.values()):g}", f"{row.work.floor_bytes:g}"]
    lines = []
    for name, way in found.ways.items():
        line = list(cells) if not lines else [f"  {name}", *[""] * (len(cells) - 1)]
        line += [f"{way.instructions:.1f}", f"{way.special:.1f}"]
        if is_h100:
            line += [f"{affordable(row.work.floor_bytes):.1f}", duration(way.seconds or 0.0)]
            line += [str(way.bound)]
        else:
            line += [str(found.matrix_instructions)] if not lines else [""]
        lines.append(line)
    return lines


def _power_cells(found: Measured, is_h100: bool) -> list[str]:
    """What a kernel has from the fourth column on that is not elementwise."""
    if not (way := found.ways.get("power")):
        return [""] * (8 if is_h100 else 6)
    counts = ["", "", "", f"{way.instructions:.1f}", f"{way.special:.1f}"]
    if is_h100:
        return [*counts, "", duration(way.seconds or 0.0), str(way.bound)]
    return [*counts, str(found.matrix_instructions)]


def markdown(content: Mapping[str, Any], part: str) -> str:
    """The H100's table of the kernels whose names ``part``, a regular expression, is found in.

    It comes from what is saved. Of "model" it is what each step does on paper, beside the
    instructions of the compiled code; of "products" it is that of the products of matrices.
    """
    if part == "model":
        return _model(content)
    if part == "products":
        return _products(content)
    lines = [
        "| | bytes | affords | instr. | special | registers | 64 Mi take | bound by |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, entry in content["kernels"].items():
        if re.search(part, name) and entry.get("floor_bytes"):
            lines += _markdown_lines(name, entry)
    return "\n".join(lines) + "\n"


def _products(content: Mapping[str, Any]) -> str:
    lines = [
        "| | registers | shared | instr. of a power | matrix instr. | least time | bound by |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, entry in content["kernels"].items():
        found = entry["targets"][H100]
        if counted := found["ways"].get("power"):
            cells = [f"`{name}`", str(found["registers"]), f"{found['shared_bytes']:,}"]
            cells += [f"{counted['instructions']:.1f}", str(found["matrix_instructions"])]
            lines.append(
                f"| {' | '.join([*cells, duration(counted['seconds'])])} | {counted['bound']} |"
            )
    return "\n".join(lines) + "\n"


def _model(content: Mapping[str, Any]) -> str:
    lines = [
        "| | bytes an element, on paper | operations an element, on paper | instr. | affords |",
        "|---|---|---|---|---|",
    ]
    for name, entry in content["kernels"].items():
        if entry.get("floor_bytes") and not name.endswith(("/fp64", "/fp16")):
            streams = "; ".join(f"{what}: {size:g}" for what, size in entry["streams"].items())
            counted = next(iter(entry["targets"][H100]["ways"].values()))
            cells = [f"`{name}`", streams, entry["operations"], f"{counted['instructions']:.1f}"]
            lines.append(f"| {' | '.join([*cells, str(entry['affordable_instructions'])])} |")
    return "\n".join(lines) + "\n"


def _markdown_lines(name: str, entry: Mapping[str, Any]) -> list[str]:
    found = entry["targets"][H100]
    lines = []
    for way, counted in found["ways"].items():
        first = [f"{entry['floor_bytes']:g}", f"{entry['affordable_instructions']:.1f}"]
        cells = [f"`{name}`", *first] if not lines else [f"… {way}", "", ""]
        cells += [f"{counted['instructions']:.1f}", f"{counted['special']:.1f}"]
        cells += ["" if lines else str(found["registers"]), duration(counted["seconds"])]
        lines.append(f"| {' | '.join([*cells, counted['bound']])} |")
    return lines
