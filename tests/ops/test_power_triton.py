"""The Triton kernels of op `power`: in the interpreter, as compiled code, and on a GPU."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("triton")


def test_in_the_interpreter(run_cases):
    run_cases("power", TRITON_INTERPRET="1")


@pytest.mark.gpu
def test_on_the_gpu(run_cases):
    run_cases("power", TRITON_INTERPRET="0")


# ---- compiled for an H100, which needs no GPU

TYPES = {"fp32": 4, "fp64": 8, "fp16": 2, "bf16": 2}
KERNELS = {
    "signed_power_kernel": (["x", "out"], {"numerator": "*fp64", "denominator": "i64"}),
    "power_backward_kernel": (["grad_theta", "weight", "out"], {"alpha": "*fp64"}),
    "power_double_backward_kernel": (
        ["grad_grad_weight", "grad_theta", "weight", "out"],
        {"alpha": "*fp64"},
    ),
}


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("element", TYPES)
@pytest.mark.parametrize("name", KERNELS)
def test_compiled_code(name, element, masked, compile_for, assert_no_spills):
    """No spills, 128-bit accesses on aligned addresses, and the half types rounded to nearest."""
    from ppkernels.ops.power import gpu

    tensors, exponents = KERNELS[name]
    block = gpu.BLOCK_BYTES // TYPES[element]
    types, constants = dict.fromkeys(tensors, f"*{element}"), {"BLOCK": block}
    if masked:
        types["words"] = "*u8"
    else:
        constants["words"] = None
    compiled = compile_for(getattr(gpu, name), types, constants, exponents)

    code = compiled.asm["ptx"]
    lanes = 2 if element == "fp64" else 4
    width = 64 if element == "fp64" else 32
    accesses = block * TYPES[element] // 16 // 128
    loads = re.findall(rf"ld\.global\.v{lanes}\.b{width}", code)
    assert len(loads) == accesses * (len(tensors) - 1)
    assert len(re.findall(rf"st\.global\.v{lanes}\.b{width}", code)) == accesses
    if element in ("fp16", "bf16"):
        assert re.search(rf"cvt\.rn\.{element.replace('fp', 'f')}(x2)?\.f32", code)
    assert_no_spills(compiled)
