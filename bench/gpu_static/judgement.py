"""What must hold of every kernel, as sentences about those that it does not hold of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from bench.gpu_static.measure import H100, Measured
from bench.gpu_static.roofline import affordable
from bench.gpu_static.row import Elementwise, Matrix, Row

WIDE = 128
SLACK, SLACK_INSTRUCTIONS = 1.03, 0.5
"""Instructions an element may exceed what is recorded by that factor and that many: compilers
schedule a few scalars differently when a line moves."""


def faults(
    row: Row, target: str, measured: Measured, recorded: Mapping[str, Any] | None
) -> Iterator[str]:
    """One sentence for each thing that is wrong; ``recorded`` is the entry of the results file."""
    for sentence in (
        *_resources(measured),
        *_work(row, target, measured),
        *_outgrown(measured, recorded),
    ):
        yield f"{row.name}, {target}: {sentence}"


def _resources(measured: Measured) -> Iterator[str]:
    resources = measured.resources
    if resources.stack_bytes or resources.spilled_bytes:
        yield (
            f"registers spill: {resources.stack_bytes} bytes of stack, "
            f"{resources.spilled_bytes} spilled."
        )


def _work(row: Row, target: str, measured: Measured) -> Iterator[str]:
    if isinstance(row.work, Matrix) and not measured.matrix_instructions:
        yield "no matrix instruction."
    if isinstance(row.work, Elementwise):
        yield from _accesses(row.work, measured)
        if not measured.keeps_subnormals:
            yield "an instruction takes subnormal numbers for 0."
        if measured.rounds_to_nearest is False:
            yield f"no conversion rounds to nearest {row.rounds_to}."
        if target == H100 and row.work.is_memory_bound:
            yield from _bound(row.work, measured)


def _accesses(work: Elementwise, measured: Measured) -> Iterator[str]:
    for verb, widths in (("reads", measured.load_bits), ("writes", measured.store_bits)):
        if narrow := [bits for bits in widths if bits < WIDE]:
            sizes = " and ".join(map(str, narrow))
            yield f"a full block {verb} {sizes} bits at a time, not {WIDE}."
    for stream in work.streams:
        moved = measured.stream_bytes[stream.name]
        if abs(moved - stream.bytes) > 1e-3 * stream.bytes:
            yield f"{stream.name}: {moved:g} bytes an element, where {stream.bytes:g} would do."


def _bound(work: Elementwise, measured: Measured) -> Iterator[str]:
    name, usual = next(iter(measured.ways.items()))
    if usual.bound != "memory":
        yield (
            f"not memory-bound ({name}): {usual.instructions:g} instructions an element, "
            f"an H100 affords {affordable(work.floor_bytes):.1f}; what it lacks is {usual.bound}."
        )


def _outgrown(measured: Measured, recorded: Mapping[str, Any] | None) -> Iterator[str]:
    if recorded is None:
        yield "nothing is recorded; run `python -m bench.gpu_static` and commit its file."
        return
    for name, way in measured.ways.items():
        before = recorded.get("ways", {}).get(name)
        if before is None:
            yield f"nothing is recorded of {name}; run `python -m bench.gpu_static`."
        elif way.instructions > SLACK * before["instructions"] + SLACK_INSTRUCTIONS:
            yield (
                f"{way.instructions:g} instructions an element ({name}), "
                f"{before['instructions']:g} are recorded."
            )
