"""Every Triton kernel of the package, in the types and variants that are watched.
Longer than 350 lines: one table of rows for each room.

A new kernel is a new row. Importing this imports Triton.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import triton.language as tl

from bench.gpu_static.paths import Arm, Way
from bench.gpu_static.row import Elementwise, Matrix, Row, Stream
from bench.gpu_static.targets import TARGETS, Target
from ppkernels.ops.bitmask import gpu as bitmask
from ppkernels.ops.power import gpu as power
from ppkernels.ops.power_linear import kernels as products
from ppkernels.ops.power_linear import tiles as power_linear
from ppkernels.ops.select import gpu as select
from ppkernels.ops.select import kernels as selection
from ppkernels.ops.select import keys as selection_keys
from ppkernels.ops.statistics import gpu as statistics
from ppkernels.ops.step import gpu as step

DTYPES = {
    "fp32": torch.float32,
    "fp64": torch.float64,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}
TRITON_TYPES = {"fp32": tl.float32, "fp64": tl.float64, "fp16": tl.float16, "bf16": tl.bfloat16}
ROUNDED = {"fp16": "f16", "bf16": "bf16"}
WORD = 1 / 8
"""Bytes of mask an entry."""

LOADED, STORED = Arm("_load"), Arm("_store")
BITS_READ = Stream("read words", WORD, Arm("tile_bits"), is_wide=False)


def files_of(*modules: Any) -> tuple[Path, ...]:
    """The files of a room's functions, and of what rooms share."""
    own = [Path(module.__file__) for module in modules]
    return (*own, *sorted(own[0].parents[1].glob("_*.py")))


def _give_words(is_masked: bool, types: dict[str, str], fixed: dict[str, Any]) -> None:
    """A kernel's argument ``words`` is a mask's, or it has none."""
    if is_masked:
        types["words"] = "*u8"
    else:
        fixed["words"] = None


def full_block(test: str, *arms: Arm) -> Way:
    """A block that has no mask, by ``test`` in ``arms``, a room's `_load` and `_store`."""
    functions = [arm.function for arm in arms]
    return Way(
        required=tuple(Arm(function, test) for function in functions),
        excluded=tuple(Arm(function, test, is_else=True) for function in functions),
    )


# ---- power

A_POWER = "a logarithm, a product, a power of 2"
POWER: Mapping[str, tuple[Any, tuple[str, ...], Mapping[str, str | None], str]] = {
    # name: kernel, inputs, arguments that are exponents (or None), operations
    "power": (
        power.signed_power_kernel,
        ("x",),
        {"numerator": "*fp64", "denominator": None},
        A_POWER,
    ),
    "rebase": (
        power.signed_power_kernel,
        ("x",),
        {"numerator": "*fp64", "denominator": "*fp64"},
        A_POWER,
    ),
    "power_backward": (
        power.power_backward_kernel,
        ("grad_theta", "weight"),
        {"alpha": "*fp64"},
        f"{A_POWER}, 2 products",
    ),
    "power_double_backward": (
        power.power_double_backward_kernel,
        ("grad_grad_weight", "grad_theta", "weight"),
        {"alpha": "*fp64"},
        f"{A_POWER}, 3 products",
    ),
}


def power_rows() -> list[Row]:
    masked = ("power", "power_backward")
    return [
        *(_power_row(name, dtype) for name in POWER for dtype in DTYPES),
        *(_power_row(name, dtype, True) for name in masked for dtype in ("fp32", "bf16")),
    ]


def _power_row(name: str, dtype: str, is_masked: bool = False) -> Row:
    kernel, inputs, exponents, operations = POWER[name]
    size = DTYPES[dtype].itemsize
    given = {argument: kind for argument, kind in exponents.items() if kind is not None}
    absent = {argument: None for argument, kind in exponents.items() if kind is None}
    values = dict.fromkeys((*inputs, "out"), f"*{dtype}")
    streams = [
        Stream(f"read {', '.join(inputs)}", len(inputs) * size, LOADED),
        Stream("write out", size, STORED),
    ]
    if is_masked:
        values["words"], operations = "*u8", f"{operations}, a choice"
        streams.append(BITS_READ)
    else:
        absent["words"] = None
    return Row(
        name=f"{name}/{dtype}" + "/masked" * is_masked,
        kernel=kernel,
        types={**values, **given, "numel": "i32"},
        choices=lambda target: {**power.launch_choices(size, is_masked, target.lanes), **absent},
        work=Elementwise(
            elements=power.launch_choices(size, is_masked, 32)["BLOCK"],
            streams=tuple(streams),
            operations=operations,
            ways={"usual": full_block("start + BLOCK <= numel", LOADED, STORED)},
            is_memory_bound=dtype != "fp64",
        ),
        files=files_of(power),
        rounds_to=ROUNDED.get(dtype),
    )


# ---- bitmask; pack and count run when a mask changes, not in every step, and are known to be
# bound by their instructions


def bitmask_rows() -> list[Row]:
    bools = {"mask": "*u8", "words": "*u8"}
    stored = Stream("write words", WORD, Arm("pack_kernel"), is_wide=False)
    read, written = (
        Stream(f"{verb} mask", 1, arm, is_wide=False)
        for verb, arm in (("read", LOADED), ("write", STORED))
    )
    return [
        *(_apply_row(size) for size in (2, 4, 8)),
        _bitmask_row(
            "pack_bits",
            bitmask.pack_kernel,
            bools,
            (read, stored),
            "a comparison, a shift, an or",
            (LOADED,),
        ),
        _bitmask_row(
            "unpack_bits",
            bitmask.unpack_kernel,
            bools,
            (BITS_READ, written),
            "a shift, an and",
            (STORED,),
        ),
        _bitmask_row(
            "count_bits",
            bitmask.count_kernel,
            {"words": "*u8", "counts": "*i32"},
            (BITS_READ,),
            "a shift, an and, a sum",
            (),
        ),
    ]


def _apply_row(size: int) -> Row:
    types = {"weight": f"*i{8 * size}", "words": "*u8", "out": f"*i{8 * size}"}
    streams = (Stream("read weight", size, LOADED), Stream("write out", size, STORED), BITS_READ)
    name = f"apply_mask/{8 * size}-bit"
    operations = "a shift, an and, a choice"
    return _bitmask_row(name, bitmask.apply_kernel, types, streams, operations, (LOADED, STORED))


def _bitmask_row(
    name: str,
    kernel: Any,
    types: Mapping[str, str],
    streams: tuple[Stream, ...],
    operations: str,
    blockwise: tuple[Arm, ...],
) -> Row:
    (number,) = set(kernel.arg_names) - types.keys() - {"BLOCK"}
    return Row(
        name=name,
        kernel=kernel,
        types={**types, number: "i32"},
        choices=lambda target: bitmask.launch_choices(),
        work=Elementwise(
            elements=8 * bitmask.BLOCK_WORDS,
            streams=streams,
            operations=operations,
            is_memory_bound=kernel not in (bitmask.pack_kernel, bitmask.count_kernel),
            ways={"usual": full_block("end <= numel", *blockwise)},
        ),
        files=files_of(bitmask),
    )


# ---- step

STEP_TYPES = {"table": "*i64", "constants": "*fp64", "begin": "i32", "rows": "i32"}
PLAIN = {
    "ADAM": False,
    "STATES": 0,
    "NESTEROV": False,
    "CHAIN": False,
    "DECAY_OF_PHI": False,
    "MASTERS": False,
    "MASKS": False,
}
# Types of weights and of states, and what differs from the plainest step.
STEPS: Mapping[str, tuple[str, str, Mapping[str, Any]]] = {
    "sgd/fp32": ("fp32", "fp32", {}),
    "sgd/fp32/momentum,masks": ("fp32", "fp32", {"STATES": 1, "MASKS": True}),
    "sgd/fp32/nesterov,chain": ("fp32", "fp32", {"STATES": 1, "NESTEROV": True, "CHAIN": True}),
    "adam/fp32": ("fp32", "fp32", {"ADAM": True, "STATES": 2}),
    "adam/fp32/amsgrad,chain,masks": (
        "fp32",
        "fp32",
        {"ADAM": True, "STATES": 3, "CHAIN": True, "DECAY_OF_PHI": True, "MASKS": True},
    ),
    "adam/bf16/masters,masks": (
        "bf16",
        "fp32",
        {"ADAM": True, "STATES": 2, "MASTERS": True, "MASKS": True},
    ),
    "adam/bf16": ("bf16", "bf16", {"ADAM": True, "STATES": 2}),
    "sgd/fp16/momentum,chain": ("fp16", "fp16", {"STATES": 1, "CHAIN": True}),
    "adam/fp64": ("fp64", "fp64", {"ADAM": True, "STATES": 2}),
}
# Not run in a launch for at most 128 weights, while the weight is powered, its decay, if any,
# decoupled, and its steps small.
UNUSUAL = (
    Arm("row_of", "rows > LANES"),
    Arm("_moved", "tl.load(own + OF_PLAIN) != 0.0"),
    Arm("_decayed", "rate != 0.0"),
)
# float64 has one way to decay, which is not left out.
HALVING_DECAY = Arm("_kept", "DTYPE == tl.float64 or factor <= 0.5")
FAR = Arm("_far")
POWER_OF_THETA = Arm("_factor", "exponent != 0.0")


def step_ways(has_near: bool, has_alpha_2: bool) -> Mapping[str, Way]:
    """``has_near``: a block whose steps are small goes a shorter way; ``has_alpha_2``: so it does
    for α = 2."""
    full = full_block("left >= BLOCK", LOADED, STORED)
    far = Way((*full.required, FAR), full.excluded + UNUSUAL)
    if not has_near:
        return {"usual": far}
    far = replace(far, excluded=(*far.excluded, HALVING_DECAY))
    near = Way(full.required, (*far.excluded, FAR))
    ways = {"usual": near}
    if has_alpha_2:
        ways["alpha=2"] = replace(near, excluded=(*near.excluded, POWER_OF_THETA))
    return {**ways, "far": far}


def step_rows() -> list[Row]:
    return [*(_step_row(name) for name in STEPS), _prepare_row()]


def _step_row(name: str) -> Row:
    weight, state, options = STEPS[name]
    variant = {**PLAIN, **options}
    is_double = weight == "fp64"

    def choices(target: Target) -> Mapping[str, Any]:
        chosen = step.step_choices(DTYPES[weight], DTYPES[state], target.lanes)
        return {**chosen, **variant, "ALIGNED": True}

    return Row(
        name=f"step/{name}",
        kernel=step.step_kernel,
        types={**STEP_TYPES, "all_rows": "i32"},
        choices=choices,
        work=Elementwise(
            elements=step.block_of(DTYPES[weight]),
            streams=_step_streams(DTYPES[weight].itemsize, DTYPES[state].itemsize, variant),
            operations=_step_operations(variant),
            ways=step_ways(has_near=not is_double, has_alpha_2=not variant["CHAIN"]),
            is_memory_bound=not is_double,
        ),
        files=files_of(step),
        rounds_to=ROUNDED.get(weight),
    )


def _step_streams(weight: int, state: int, variant: Mapping[str, Any]) -> tuple[Stream, ...]:
    """Reads weight and gradient, writes the weight; states and master are read and written."""
    kept = variant["STATES"] * state + 4 * variant["MASTERS"]
    read = Stream("read weight, gradient, states", 2 * weight + kept, LOADED)
    written = Stream("write weight, states", weight + kept, STORED)
    return (read, written, BITS_READ) if variant["MASKS"] else (read, written)


def _step_operations(variant: Mapping[str, Any]) -> str:
    """On the usual way of float32 and half types."""
    parts = ["a power", "2 products for r", "a series of 6 terms", "1 multiply-add"]
    if variant["CHAIN"]:
        parts.append("3 products for the slope")
    if variant["ADAM"]:
        parts.append("4 multiply-adds, a root and a division for Adam")
    elif variant["STATES"]:
        parts.append(f"{2 + variant['NESTEROV']} multiply-adds for momentum")
    if variant["STATES"] == 3:
        parts.append("a maximum")
    if variant["MASKS"]:
        parts.append(f"{1 + variant['STATES'] + variant['MASTERS']} choices for the mask")
    return ", ".join(parts)


def _prepare_row() -> Row:
    variant = {"ADAM": True, "CHAIN": True, "DECAY_OF_PHI": False}
    return Row(
        name="step/prepare",
        kernel=step.prepare_kernel,
        types={"table": "*i64", "constants": "*fp64", "rows": "i32"},
        choices=lambda target: {**step.prepare_choices(), **variant},
        work=None,
        files=files_of(step),
    )


# ---- products: a weight of 2048 × 2048 and a batch of 128, a weight whose tiles stick out, and one
# that has few tiles

BATCH, FEATURES, RAGGED, FEW = 128, 2048, 2032, 512
# Dtypes of the batch and of φ, the direction (is the weight read across?), its size, is it masked?
PRODUCTS: Mapping[str, tuple[str, str, bool, int, bool]] = {
    "forward/bf16,fp32": ("bf16", "fp32", False, FEATURES, False),
    "forward/bf16,fp32/masked": ("bf16", "fp32", False, FEATURES, True),
    "forward/bf16,fp32/ragged": ("bf16", "fp32", False, RAGGED, False),
    "forward/fp16": ("fp16", "fp16", False, FEATURES, False),
    "forward/fp32": ("fp32", "fp32", False, FEATURES, False),
    "grad_input/bf16,fp32": ("bf16", "fp32", True, FEATURES, False),
    "grad_input/bf16/masked,ragged": ("bf16", "bf16", True, RAGGED, True),
    "grad_input/fp32/masked,ragged": ("fp32", "fp32", True, RAGGED, True),
}
GRADIENTS: Mapping[str, tuple[str, str, int, bool]] = {
    "grad_weight/bf16,fp32": ("bf16", "fp32", FEATURES, False),
    "grad_weight/bf16,fp32/masked,ragged": ("bf16", "fp32", RAGGED, True),
    "grad_weight/fp16/few": ("fp16", "fp16", FEW, False),
    "grad_weight/fp32": ("fp32", "fp32", FEATURES, False),
    "grad_weight/fp32/masked,few": ("fp32", "fp32", FEW, True),
}
H100_PROCESSORS = 132
SIZES = {"batch": "i32", "rows": "i32:16"}


def product_rows() -> list[Row]:
    return [
        *(_product_row(name) for name in PRODUCTS),
        *(_gradient_row(name) for name in GRADIENTS),
        _sum_row(),
    ]


def _product_row(name: str) -> Row:
    dtype, stored, is_across, size, is_masked = PRODUCTS[name]
    types = {"input": f"*{dtype}", "weight": f"*{stored}", "alpha": "*fp64", "out": f"*{dtype}"}
    types |= {**SIZES, "contracted": "i32:16", "contracted_per_split": "i32:16"}
    types |= {"input_stride_batch": "i32:16"}
    # Along the rows of the product, φ and its bits are neighbours where they are read across.
    near, far = ("row", "contracted") if is_across else ("contracted", "row")
    types |= {f"weight_stride_{far}": "i32:16", f"bit_stride_{far}": "i32:16"}
    fixed = {"input_stride_contracted": 1, f"weight_stride_{near}": 1, f"bit_stride_{near}": 1}
    if is_across:
        fixed["bias"] = None
    else:
        types["bias"] = "*fp32"
    _give_words(is_masked, types, fixed)

    def choices(target: Target) -> Mapping[str, Any]:
        sizes = (BATCH, size, size, is_masked, not target.is_nvidia)
        return {**power_linear.product_choices(DTYPES[dtype], *sizes), **fixed}

    tiles = power_linear.product_tiles(DTYPES[dtype].itemsize, size, size, is_masked)
    return Row(
        name=f"power_linear/{name}",
        kernel=products.product_kernel,
        types=types,
        choices=choices,
        work=_matrix(
            dtype,
            size,
            bytes_of_weight=DTYPES[stored].itemsize,
            powered=Arm("signed_power"),
            tile=tiles.rows * tiles.across,
            times=-(-BATCH // tiles.batch),
        ),
        files=files_of(products, power),
        rounds_to=ROUNDED.get(dtype),
    )


def _gradient_row(name: str) -> Row:
    dtype, stored, size, is_masked = GRADIENTS[name]
    types = {"grad_output": f"*{dtype}", "input": f"*{dtype}", "weight": f"*{stored}"}
    types |= {"out": f"*{stored}", "alpha": "*fp64", **SIZES, "columns": "i32:16"}
    strides = ("grad_stride_batch", "input_stride_batch", "weight_stride_row")
    types |= dict.fromkeys(strides, "i32:16")
    neighbours = ("grad_stride_row", "input_stride_column", "weight_stride_column")
    fixed: dict[str, Any] = dict.fromkeys(neighbours, 1)
    _give_words(is_masked, types, fixed)

    def choices(target: Target) -> Mapping[str, Any]:
        sizes = (BATCH, size, size, H100_PROCESSORS, not target.is_nvidia)
        return {**power_linear.gradient_choices(DTYPES[dtype], *sizes), **fixed}

    chosen = choices(TARGETS["sm_90"])
    return Row(
        name=f"power_linear/{name}",
        kernel=products.grad_weight_kernel,
        types=types,
        choices=choices,
        work=_matrix(
            dtype,
            size,
            bytes_of_weight=2 * DTYPES[stored].itemsize,
            powered=Arm("power_slope"),
            tile=chosen["ROWS"] * chosen["COLUMNS"],
            times=1,
        ),
        files=files_of(products, power),
        rounds_to=ROUNDED.get(stored),
    )


def _matrix(
    dtype: str, size: int, bytes_of_weight: int, powered: Arm, tile: int, times: int
) -> Matrix:
    """A product of a batch with a square weight, which is powered as many ``times``."""
    # Two tensors of the batch's size are read or written.
    moved = size * size * bytes_of_weight + 2 * BATCH * size * DTYPES[dtype].itemsize
    is_single = dtype == "fp32"
    return Matrix(
        flops=(3 if is_single else 1) * 2 * BATCH * size * size,
        dtype="tf32" if is_single else dtype,
        bytes_moved=moved,
        powered=powered,
        tile=tile,
        powers=times * size * size,
    )


def _sum_row() -> Row:
    return Row(
        name="power_linear/add_up",
        kernel=products.add_up_kernel,
        types={"partials": "*fp32", "out": "*bf16", "numel": "i32:16", "rows": "i32:16"},
        # One part, of which compilers cannot unroll the loop.
        choices=lambda target: {
            **power_linear.sum_choices(not target.is_nvidia),
            "bias": None,
            "splits": 1,
        },
        work=Elementwise(
            elements=power_linear.sum_choices(False)["BLOCK"],
            streams=(Stream("read a part, write out", 6, Arm("_add_up")),),
            operations="an addition",
            ways={"usual": full_block("start + BLOCK <= numel", Arm("add_up_kernel"))},
        ),
        files=files_of(products),
        rounds_to="bf16",
    )


# ---- select: passes over all weights of a selection, whose times add up

SELECT_TYPES = {"table": "*i64", "state": "*i64", "begin": "i32", "rows": "i32", "all_rows": "i32"}
OF_MANY = (Arm("row_of", "rows > LANES"), Arm("_block_keys", "left < BLOCK"))
# Dtype, bits of the keys, what is on paper done for a key, and is there a mask?
SELECTIONS: Mapping[str, tuple[str, int, str, bool]] = {
    "fp32": ("fp32", 31, "an and", False),
    "fp32/masked": ("fp32", 31, "an and, a choice", True),
    "bf16": ("bf16", 15, "an and", False),
    "fp16/beside fp32": ("fp16", 31, "an and, a conversion", False),
    "fp64": ("fp64", 63, "an and", False),
    "fp32/several alpha": ("fp32", 64, "a logarithm and a product in float64", False),
}
COUNTING = "a shift, a difference, a comparison, an addition to a bin"


def select_rows() -> list[Row]:
    counts = [_count_row(name, False) for name in SELECTIONS]
    writes = [_select_row("write", name, selection.write_kernel) for name in SELECTIONS]
    ties = _select_row("ties", "fp32", selection.tie_kernel)
    return [_count_row("fp32", True), *counts, ties, *writes, _narrow_row()]


def _count_row(name: str, is_first: bool) -> Row:
    """``is_first``: the pass that also looks for NaN."""
    key = SELECTIONS[name][1]
    pointers = {"bins": "*i64", "first_nan": "*u64", "shift": "i32", "values": "i32"}
    row = _select_row("first count" if is_first else "count", name, selection.count_kernel)
    own = {"FIRST": is_first}
    return replace(
        row,
        types={**{k: v for k, v in row.types.items() if k != "ties"}, **pointers},
        choices=lambda target: {
            **row.choices(target),
            **own,
            "BINS": select.bins_of(key, not target.is_nvidia),
        },
    )


def _select_row(does: str, name: str, kernel: Any) -> Row:
    dtype, key, of_key, is_masked = SELECTIONS[name]
    streams = [Stream("read values", DTYPES[dtype].itemsize, LOADED)]
    if is_masked:
        streams.append(BITS_READ)
    full = full_block("left >= BLOCK", LOADED)
    ways = {"usual": Way(full.required, full.excluded + OF_MANY)}
    operations = {"ties": "a comparison, a sum", "write": "a comparison, a shift, an or"}
    if does == "write":
        streams.append(Stream("write words", WORD, Arm("_store_words"), is_wide=False))
        tied = Arm("write_kernel", "kept_ties > 0")
        ways = {
            "usual": replace(ways["usual"], excluded=(*ways["usual"].excluded, tied)),
            "ties": replace(ways["usual"], required=(*full.required, tied)),
        }
    if "count" in does:
        found = Arm("_note_nan", "tl.max(keys) > infinity_key(TYPE, KEY)")
        if does == "first count":
            ways = {"usual": replace(ways["usual"], excluded=(*ways["usual"].excluded, found))}

    def choices(target: Target) -> Mapping[str, Any]:
        chosen = select.launch_choices(key, target.lanes)
        return {**chosen, "TYPE": TRITON_TYPES[dtype], "ALIGNED": True, "MASKS": is_masked}

    return Row(
        name=f"select/{does}/{name}",
        kernel=kernel,
        types={**SELECT_TYPES, "ties": "*i64"},
        choices=choices,
        work=Elementwise(
            elements=select.block_of(key),
            streams=tuple(streams),
            operations=f"{of_key}, {operations.get(does, COUNTING)}",
            ways=ways,
            # The others take more instructions than their bytes leave time for.
            is_memory_bound=name in ("fp32", "fp64"),
        ),
        files=files_of(selection, selection_keys),
    )


def _narrow_row() -> Row:
    numbers = dict.fromkeys(("first", "shift", "next_shift"), "i32")
    return Row(
        name="select/narrow",
        kernel=selection.narrow_kernel,
        types={"state": "*i64", "bins": "*i64", **numbers},
        choices=lambda target: {
            **{"KEY": 31, "LAST": False, "num_warps": 4},
            "BINS": select.bins_of(31, not target.is_nvidia),
        },
        work=None,
        files=files_of(selection, selection_keys),
    )


# ---- statistics

# Dtype, is there a mask, and a histogram?
STATISTICS: Mapping[str, tuple[str, bool, bool]] = {
    "fp32": ("fp32", False, False),
    "fp32/histogram": ("fp32", False, True),
    "fp32/masked,histogram": ("fp32", True, True),
    "bf16": ("bf16", False, False),
    "bf16/histogram": ("bf16", False, True),
    "fp16": ("fp16", False, False),
    "fp64": ("fp64", False, False),
    "fp64/histogram": ("fp64", False, True),
}


def statistics_rows() -> list[Row]:
    return [*(_statistics_row(name) for name in STATISTICS), _combine_row()]


def _statistics_row(name: str) -> Row:
    dtype, is_masked, has_bins = STATISTICS[name]
    size = DTYPES[dtype].itemsize
    types = {"weight": f"*{dtype}", "alpha": "*fp64", "numbers": "*fp64", "partials": "*fp64"}
    types |= {"counts": "*i64", **dict.fromkeys(("limits", "bins", "numel", "programs"), "i32")}
    fixed: dict[str, Any] = {}
    _give_words(is_masked, types, fixed)
    full = full_block("left >= BLOCK", LOADED)
    unusual = (*full.excluded, Arm("_put_moments", "total != total"))
    power = Arm("_power")
    # A loop counts once: one ε.
    operations = "a minimum, a maximum, 3 sums in float64, a comparison and a sum for an ε"
    if has_bins:
        operations += ", a difference and a product in float64, an addition to a bin"
    return Row(
        name=f"statistics/{name}",
        kernel=statistics.statistics_kernel,
        types=types,
        choices=lambda target: {
            **statistics.launch_choices(size, is_masked, has_bins, not target.is_nvidia),
            **fixed,
        },
        work=Elementwise(
            elements=statistics.BLOCKS[size],
            streams=(Stream("read weight", size, LOADED), *([BITS_READ] * is_masked)),
            operations=operations,
            ways={
                "usual": Way(full.required, (*unusual, power)),
                "powered": Way((*full.required, power), unusual),
            },
            is_memory_bound=False,
        ),
        files=files_of(statistics),
    )


def _combine_row() -> Row:
    return Row(
        name="statistics/combine",
        kernel=statistics.combine_kernel,
        types={"partials": "*fp64", "counts": "*i64", "moments": "*fp64", "programs": "i32"},
        choices=lambda target: statistics.combine_choices(),
        work=None,
        files=files_of(statistics),
    )


ROWS: tuple[Row, ...] = (
    *power_rows(),
    *bitmask_rows(),
    *step_rows(),
    *product_rows(),
    *select_rows(),
    *statistics_rows(),
)
"""Every row, in the order in which they are compiled and printed."""
