"""The file that keeps the numbers, which are the ceilings of the next check as well."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.gpu_static import roofline
from bench.gpu_static.measure import SIZE, Measured
from bench.gpu_static.row import Elementwise, Matrix, Row

PATH = Path(__file__).parents[1] / "results" / "gpu_static.json"


def load(path: Path = PATH) -> dict[str, Any]:
    """What is recorded; nothing where there is no file."""
    return json.loads(path.read_text()) if path.exists() else {"kernels": {}}


def recorded(content: Mapping[str, Any], row: str, target: str) -> Mapping[str, Any] | None:
    """The entry of a kernel and a target, None where there is none."""
    return content["kernels"].get(row, {}).get("targets", {}).get(target)


def tools() -> dict[str, str]:
    """The compilers' versions."""
    import triton

    nvidia = triton.knobs.nvidia
    return {
        "triton": triton.__version__,
        "ptxas": str(nvidia.ptxas.version),
        "ptxas of sm_100": str(nvidia.ptxas_blackwell.version),
    }


def save(
    rows: Sequence[Row], measured: Mapping[tuple[str, str], Measured], path: Path = PATH
) -> None:
    """Write ``measured``, and keep what else the file holds of ``rows``, which are all rows."""
    old = load(path)["kernels"]
    kernels = {row.name: _entry(row, old.get(row.name, {}), measured) for row in rows}
    content = {"tools": tools(), "h100": _model(), "kernels": kernels}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def _model() -> dict[str, Any]:
    return {
        "bytes_per_second": roofline.BANDWIDTH,
        "multiprocessors": roofline.MULTIPROCESSORS,
        "clock_hz": roofline.CLOCK,
        "lanes_per_cycle": roofline.LANES,
        "elements": SIZE,
    }


def _entry(
    row: Row, old: Mapping[str, Any], measured: Mapping[tuple[str, str], Measured]
) -> dict[str, Any]:
    own = {target: found for (name, target), found in measured.items() if name == row.name}
    targets = {**old.get("targets", {}), **{name: found.as_json() for name, found in own.items()}}
    entry: dict[str, Any] = {"kernel": row.kernel.__name__}
    if isinstance(row.work, Elementwise):
        entry["streams"] = {stream.name: stream.bytes for stream in row.work.streams}
        entry["operations"] = row.work.operations
        entry["floor_bytes"] = row.work.floor_bytes
        entry["affordable_instructions"] = round(roofline.affordable(row.work.floor_bytes), 1)
    if isinstance(row.work, Matrix):
        entry |= {"flops": row.work.flops, "bytes": row.work.bytes_moved, "powers": row.work.powers}
    return {**entry, "targets": targets}
