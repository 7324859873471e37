"""The Triton kernels of op `step`: in the interpreter, as compiled code, and on a GPU."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("triton")


def test_in_the_interpreter(run_cases):
    run_cases("step", TRITON_INTERPRET="1")


@pytest.mark.gpu
def test_on_the_gpu(run_cases):
    run_cases("step", TRITON_INTERPRET="0")


# ---- compiled for GPUs that need not be there

# Variants of `step_kernel`: types of weights and states, and what differs from the plainest.
PLAIN = dict.fromkeys(
    ("ADAM", "NESTEROV", "CHAIN", "DECAY_OF_PHI", "MASTERS", "MASKS", "STATES"), False
)
VARIANTS = {
    "sgd": ("fp32", "fp32", {}),
    "momentum, masks": ("fp32", "fp32", {"STATES": 1, "MASKS": True}),
    "nesterov, chain": ("fp32", "fp32", {"STATES": 1, "NESTEROV": True, "CHAIN": True}),
    "adam": ("fp32", "fp32", {"ADAM": True, "STATES": 2}),
    "amsgrad, chain, decay of phi, masks": (
        "fp32",
        "fp32",
        {"ADAM": True, "STATES": 3, "CHAIN": True, "DECAY_OF_PHI": True, "MASKS": True},
    ),
    "adam, masters, masks": (
        "bf16",
        "fp32",
        {"ADAM": True, "STATES": 2, "MASTERS": True, "MASKS": True},
    ),
    "adam, half": ("bf16", "bf16", {"ADAM": True, "STATES": 2}),
    "momentum, half, chain": ("fp16", "fp16", {"STATES": 1, "CHAIN": True}),
    "adam, double": ("fp64", "fp64", {"ADAM": True, "STATES": 2}),
}
BYTES = {"fp32": 4, "fp64": 8, "fp16": 2, "bf16": 2}


# What all kernels take; their integers are 32 bits wide.
TENSORS = {"table": "*i64", "constants": "*fp64"}


def compiled_step(
    compile_for: Callable[..., Any], variant: str, target: str, aligned: bool = True
) -> Any:
    import triton.language as tl

    from ppkernels.ops.step import gpu, table

    weight, state, options = VARIANTS[variant]
    types = {"fp32": tl.float32, "fp64": tl.float64, "fp16": tl.float16, "bf16": tl.bfloat16}
    constants = PLAIN | options | {"WEIGHT": types[weight], "STATE": types[state]}
    constants |= {"ALIGNED": aligned, "LANES": 128, "BLOCK": table.block_of(DTYPES[weight])}
    return compile_for(gpu.step_kernel, TENSORS, constants, other="i32", target=target)


DTYPES = {
    "fp32": torch.float32,
    "fp64": torch.float64,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}


def bytes_of_a_full_block(variant: str) -> tuple[int, int]:
    """Bytes that one of 128 threads reads and writes, but for mask words."""
    weight, state, options = VARIANTS[variant]
    elements = (512 if weight == "fp64" else 1024) // 128
    states = options.get("STATES", 0) * BYTES[state]
    masters = 4 if options.get("MASTERS") else 0
    written = BYTES[weight] + states + masters
    return elements * (written + BYTES[weight]), elements * written


@pytest.mark.parametrize("variant", ["momentum, masks", "adam, masters, masks", "adam, double"])
def test_compiled_code_for_amd(variant, compile_for, assert_no_spills):
    """No spills; 256 threads with four elements: 128 bits of float32, 64 of half types."""
    code = compiled_step(compile_for, variant, "gfx942")
    assert_no_spills(code)
    wide = "dwordx2" if BYTES[VARIANTS[variant][0]] == 2 else "dwordx4"
    assert f"buffer_load_{wide}" in code.asm["amdgcn"]
    assert f"buffer_store_{wide}" in code.asm["amdgcn"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_compiled_code(variant, compile_for, assert_no_spills):
    """No spills, and full blocks in accesses of 128 bits."""
    code = compiled_step(compile_for, variant, "sm_90")
    assert_no_spills(code)
    read, written = bytes_of_a_full_block(variant)
    wide = r"v4\.b32|v2\.b64"
    assert len(re.findall(rf"ld\.global\.(?:{wide})", code.asm["ptx"])) == read // 16
    assert len(re.findall(rf"st\.global\.(?:{wide})", code.asm["ptx"])) == written // 16
    # No instruction takes subnormal numbers for 0, and half types are rounded to nearest.
    assert ".ftz" not in code.asm["ptx"]
    weight = VARIANTS[variant][0]
    if weight in ("fp16", "bf16"):
        assert re.search(rf"cvt\.rn\.{weight.replace('fp', 'f')}(x2)?\.f32", code.asm["ptx"])


@pytest.mark.parametrize("variant", ["momentum, masks", "adam, masters, masks"])
def test_compiled_code_of_an_older_gpu(variant, compile_for, assert_no_spills):
    assert_no_spills(compiled_step(compile_for, variant, "sm_80"))


def test_addresses_that_are_not_aligned_get_accesses_of_one_element(compile_for):
    """Which any address of a float32 allows."""
    code = compiled_step(compile_for, "sgd", "sm_90", aligned=False)
    assert not re.search(r"(ld|st)\.global\.v", code.asm["ptx"])


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
def test_compiled_preparation(target, compile_for, assert_no_spills):
    from ppkernels.ops.step import gpu

    constants = {"ADAM": True, "CHAIN": True, "DECAY_OF_PHI": False, "LANES": gpu.PREPARED}
    code = compile_for(gpu.prepare_kernel, TENSORS, constants, other="i32", target=target)
    assert_no_spills(code)
