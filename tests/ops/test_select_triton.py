"""The Triton kernels of op `select`: in the interpreter, and on a GPU.

Their compiled code is checked by ``python -m bench.gpu_static --check``.
"""

from __future__ import annotations

import re

import pytest

pytest.importorskip("triton")


def test_in_the_interpreter(run_cases):
    run_cases("select", TRITON_INTERPRET="1")


@pytest.mark.gpu
def test_on_the_gpu(run_cases):
    run_cases("select", TRITON_INTERPRET="0")


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_no_product_and_sum_become_one(target, monkeypatch, tmp_path):
    """Of the logarithm, which has the reference's bits: read off the compiled code."""
    from bench.gpu_static.catalogue import ROWS
    from bench.gpu_static.targets import TARGETS, compile_kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    row = next(row for row in ROWS if row.name == "select/count/fp32/several alpha")
    choices = row.choices(TARGETS[target])
    ptx = compile_kernel(row.kernel, row.types, choices, TARGETS[target]).asm["ptx"]
    # Of products and sums that are marked so, the assembler makes no fused operation either.
    assert re.findall(r"\b(?:fma|mad)\.\w+\.f64|\b(?:add|mul|sub)\.f64", ptx) == []
    assert "mul.rn.f64" in ptx
    fused = {**choices, "enable_fp_fusion": True}
    assert "fma.rn.f64" in compile_kernel(row.kernel, row.types, fused, TARGETS[target]).asm["ptx"]
