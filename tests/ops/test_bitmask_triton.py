"""The Triton kernels of op `bitmask`: in the interpreter, as compiled code, and on a GPU."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("triton")


def test_in_the_interpreter(run_cases):
    run_cases("bitmask", TRITON_INTERPRET="1")


@pytest.mark.gpu
def test_on_the_gpu(run_cases):
    run_cases("bitmask", TRITON_INTERPRET="0")


# ---- compiled for an H100, which needs no GPU

# Kernel, its tensors, and the access of a full block that must be there: 128 bits for the weights,
# a word's eight bytes at once for the masks.
ROWS = [
    ("apply_kernel", {"weight": "*i16", "words": "*u8", "out": "*i16"}, ["ld", "st"], "v4.b32"),
    ("apply_kernel", {"weight": "*i32", "words": "*u8", "out": "*i32"}, ["ld", "st"], "v4.b32"),
    ("apply_kernel", {"weight": "*i64", "words": "*u8", "out": "*i64"}, ["ld", "st"], "v2.b64"),
    ("pack_kernel", {"mask": "*u8", "words": "*u8"}, ["ld"], "v2.b32"),
    ("unpack_kernel", {"words": "*u8", "mask": "*u8"}, ["st"], "v2.b32"),
    ("count_kernel", {"words": "*u8", "counts": "*i32"}, [], ""),
]


@pytest.mark.parametrize(("name", "tensors", "directions", "width"), ROWS)
def test_compiled_code(name, tensors, directions, width, compile_for, assert_no_spills):
    """No spills, and wide accesses on aligned addresses."""
    from ppkernels.ops.bitmask import gpu

    code = compile_for(getattr(gpu, name), tensors, {"BLOCK": gpu.BLOCK_WORDS})
    for direction in directions:
        assert re.search(rf"{direction}\.global\.{re.escape(width)}", code.asm["ptx"])
    assert_no_spills(code)
