"""The Triton kernels of op `power`: in the interpreter, as compiled code, and on a GPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

CASES = Path(__file__).with_name("power_triton_cases.py")


def run_cases(**environment: str) -> None:
    """Runs CASES with pytest in a new process; its report is the message of a failure."""
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider"]
    result = subprocess.run(
        [*command, str(CASES)],
        env={**os.environ, **environment},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-20_000:] + result.stderr[-2_000:]


def test_in_the_interpreter():
    run_cases(TRITON_INTERPRET="1")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that PyTorch can use")
def test_on_the_gpu():
    run_cases(TRITON_INTERPRET="0")


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


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted, not compiled")
@pytest.mark.parametrize("element", TYPES)
@pytest.mark.parametrize("name", KERNELS)
def test_compiled_code(name, element, tmp_path, monkeypatch):
    """No spills, 128-bit accesses on aligned addresses, and the half types rounded to nearest."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from ppkernels.ops.power import gpu

    kernel = getattr(gpu, name)
    tensors, exponents = KERNELS[name]
    block = gpu.BLOCK_BYTES // TYPES[element]
    place = kernel.arg_names.index
    source = ASTSource(
        fn=kernel,
        signature={
            argument: f"*{element}" if argument in tensors else exponents.get(argument, "i64")
            for argument in kernel.arg_names
        }
        | {"BLOCK": "constexpr"},
        constexprs={(place("BLOCK"),): block},
        attrs={(place(tensor),): [["tt.divisibility", 16]] for tensor in tensors},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))

    code = compiled.asm["ptx"]
    lanes = 2 if element == "fp64" else 4
    width = 64 if element == "fp64" else 32
    accesses = block * TYPES[element] // 16 // 128
    loads = re.findall(rf"ld\.global\.v{lanes}\.b{width}", code)
    assert len(loads) == accesses * (len(tensors) - 1)
    assert len(re.findall(rf"st\.global\.v{lanes}\.b{width}", code)) == accesses
    if element in ("fp16", "bf16"):
        assert re.search(rf"cvt\.rn\.{element.replace('fp', 'f')}(x2)?\.f32", code)
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    usage = subprocess.run(
        [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(cubin)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "STACK:0 " in usage, usage
    assert "LOCAL:0 " in usage, usage
