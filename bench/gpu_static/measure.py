"""From a row of the catalogue to its numbers for one target."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from typing import Any

from bench.gpu_static import roofline
from bench.gpu_static.listing import Block, Instruction, Resources, read
from bench.gpu_static.paths import comes_from, lines_of_all, path
from bench.gpu_static.row import Elementwise, Matrix, Row, Stream
from bench.gpu_static.targets import TARGETS, Target, compile_kernel
from bench.timing import core_ids

SIZE = 64 * 2**20
"""Elements for which times are predicted: those of the large rows of `python -m bench`."""
H100 = "sm_90"


@dataclass(frozen=True)
class WayCount:
    """One way through an elementwise kernel, for each element; see Note [What is counted].

    ``seconds`` is the H100's for `SIZE` elements, or for the row's product of matrices, and
    ``bound`` what takes them; None elsewhere.
    """

    instructions: float
    special: float
    seconds: float | None = None
    bound: str | None = None


@dataclass(frozen=True)
class Measured:
    """What a compiled kernel is made of.

    Attributes:
        registers, stack_bytes, spilled_bytes: of a thread.
        shared_bytes: of a program.
        matrix_instructions: in the whole code.
        load_bits, store_bits: widths of the accesses of streams that have to be wide.
        stream_bytes: of an element, that full blocks move, by stream.
        ways: by name; of a product of matrices "power", the power of an element of its weight.
        keeps_subnormals: no instruction takes subnormal numbers for 0, but for exp2, whose
            results the kernels keep away from them.
        rounds_to_nearest: half types are rounded so; None where the row has none, or on AMD, where
            a register of the processor decides it.
    """

    resources: Resources
    matrix_instructions: int
    load_bits: tuple[int, ...] = ()
    store_bits: tuple[int, ...] = ()
    stream_bytes: dict[str, float] = field(default_factory=dict)
    ways: dict[str, WayCount] = field(default_factory=dict)
    keeps_subnormals: bool = True
    rounds_to_nearest: bool | None = None

    def as_json(self) -> dict[str, Any]:
        fields = asdict(self)
        return {**fields.pop("resources"), **fields}


def measure(row: Row, name: str) -> Measured:
    """Compile ``row`` for the target of that name and count.

    Raises:
        LookupError: the source has no longer what the row names.
    """
    target = TARGETS[name]
    choices = row.choices(target)
    compiled = compile_kernel(row.kernel, row.types, choices, target)
    blocks, resources = read(compiled)
    code = [instruction for block in blocks for instruction in block.instructions]
    found: dict[str, Any] = {}
    if isinstance(row.work, Elementwise):
        per_thread = row.work.elements / (choices["num_warps"] * target.lanes)
        found = _elementwise(row, row.work, blocks, per_thread, is_h100=name == H100)
    elif row.work is not None:
        per_thread = row.work.tile / (choices["num_warps"] * target.lanes)
        found["ways"] = {"power": _powers(row, row.work, code, per_thread, name == H100)}
    return Measured(
        resources=resources,
        matrix_instructions=sum(instruction.is_matrix for instruction in code),
        keeps_subnormals=_keeps_subnormals(compiled.asm),
        rounds_to_nearest=_rounds_to_nearest(compiled.asm, row, target),
        **found,
    )


def _elementwise(
    row: Row, work: Elementwise, blocks: Sequence[Block], per_thread: float, is_h100: bool
) -> dict[str, Any]:
    """The fields of `Measured` that elementwise kernels have; a thread has ``per_thread``."""
    paths = {
        name: path(
            blocks, lines_of_all(row.files, way.required), lines_of_all(row.files, way.excluded)
        )
        for name, way in work.ways.items()
    }
    usual = next(iter(paths.values()))
    taken = {stream: list(_accesses(usual, row, stream)) for stream in work.streams}
    wide = {access for stream in work.streams if stream.is_wide for access in taken[stream]}
    return {
        "load_bits": tuple(sorted(bits for way, bits in wide if way == "load")),
        "store_bits": tuple(sorted(bits for way, bits in wide if way == "store")),
        "stream_bytes": {
            stream.name: round(sum(bits for _, bits in accesses) / 8 / per_thread, 4)
            for stream, accesses in taken.items()
        },
        "ways": {
            name: _count(found, per_thread, work.floor_bytes if is_h100 else None)
            for name, found in paths.items()
        },
    }


def _accesses(usual: Sequence[Instruction], row: Row, stream: Stream) -> Iterator[tuple[str, int]]:
    """The accesses that stand in the stream's function, without those of functions it calls."""
    lines = lines_of_all(row.files, [stream.where])
    for instruction in usual:
        if instruction.access and instruction.frames and instruction.frames[0] in lines:
            yield instruction.access


def _count(found: Sequence[Instruction], per_thread: float, floor: float | None) -> WayCount:
    special = sum(instruction.is_special for instruction in found)
    count = WayCount(round(len(found) / per_thread, 2), round(special / per_thread, 2))
    if floor is None:
        return count
    time = roofline.elementwise(found, per_thread, floor, SIZE)
    return WayCount(count.instructions, count.special, time.seconds, time.bound)


def _powers(
    row: Row, work: Matrix, code: Sequence[Instruction], per_thread: float, is_h100: bool
) -> WayCount:
    """What the power of an element takes, wherever it stands in the code."""
    lines = lines_of_all(row.files, [work.powered])
    found = [instruction for instruction in code if comes_from(instruction, lines)]
    special = sum(instruction.is_special for instruction in found)
    count = WayCount(round(len(found) / per_thread, 2), round(special / per_thread, 2))
    if not is_h100:
        return count
    issued = work.powers * count.instructions
    time = roofline.matrix(work.flops, work.bytes_moved, work.dtype, issued)
    return WayCount(count.instructions, count.special, time.seconds, time.bound)


def _keeps_subnormals(asm: dict[str, Any]) -> bool:
    if "ptx" in asm:
        return ".ftz" not in asm["ptx"].replace("ex2.approx.ftz.f32", "")
    modes = re.findall(r"\.amdhsa_float_denorm_mode_\w+ (\d)", asm["amdgcn"])
    return bool(modes) and set(modes) == {"3"}


def _rounds_to_nearest(asm: dict[str, Any], row: Row, target: Target) -> bool | None:
    if row.rounds_to is None or not target.is_nvidia:
        return None
    return bool(re.search(rf"cvt\.rn\.{row.rounds_to}(x2)?\.f32", asm["ptx"]))


# ---- many rows


def measure_all(
    names: Sequence[tuple[str, str]], done: Callable[[str, str], None]
) -> dict[tuple[str, str], Measured]:
    """`measure` for pairs of row and target, on all cores, from an empty cache.

    ``done`` is called with each pair as it is finished.
    """
    with tempfile.TemporaryDirectory() as cache:
        workers = min(len(core_ids()), len(names))
        # New processes: one that has threads already must not be forked.
        context = get_context("spawn")
        with ProcessPoolExecutor(workers, context, _use_cache, (cache,)) as pool:
            futures = [(name, pool.submit(_measure_named, *name)) for name in names]
            found = {}
            for name, future in futures:
                found[name] = future.result()
                done(*name)
    return found


def _use_cache(folder: str) -> None:
    os.environ["TRITON_CACHE_DIR"] = folder


def _measure_named(row: str, target: str) -> Measured:
    from bench.gpu_static.catalogue import ROWS

    return measure(next(entry for entry in ROWS if entry.name == row), target)
