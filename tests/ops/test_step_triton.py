"""The Triton kernels of op `step`: in the interpreter, as compiled code, and on a GPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

CASES = Path(__file__).with_name("step_triton_cases.py")


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


# ---- compiled for GPUs that need not be there

not_interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted, not compiled"
)
TARGETS = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "gfx942": ("hip", "gfx942", 64)}

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


def compiled(kernel: Any, constants: dict[str, Any], target: str) -> Any:
    """``kernel`` as its launcher would have it compiled for the target."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    tensors = {"table": "*i64", "constants": "*fp64"}
    place = kernel.arg_names.index
    source = ASTSource(
        fn=kernel,
        signature={
            name: "constexpr" if name in constants else tensors.get(name, "i32")
            for name in kernel.arg_names
        },
        constexprs={(place(name),): value for name, value in constants.items()},
        attrs={(place(tensor),): [["tt.divisibility", 16]] for tensor in tensors},
    )
    return triton.compile(source, target=GPUTarget(*TARGETS[target]))


def compiled_step(variant: str, target: str, aligned: bool = True) -> Any:
    import triton.language as tl

    from ppkernels.ops.step import gpu, table

    weight, state, options = VARIANTS[variant]
    types = {"fp32": tl.float32, "fp64": tl.float64, "fp16": tl.float16, "bf16": tl.bfloat16}
    constants = PLAIN | options | {"WEIGHT": types[weight], "STATE": types[state]}
    constants |= {"ALIGNED": aligned, "LANES": 128, "BLOCK": table.block_of(DTYPES[weight])}
    return compiled(gpu.step_kernel, constants, target)


DTYPES = {
    "fp32": torch.float32,
    "fp64": torch.float64,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}


def assert_no_spills(code: Any, target: str, tmp_path: Path) -> None:
    import triton

    if target.startswith("gfx"):
        for name in ("private_segment_fixed_size", "vgpr_spill_count", "sgpr_spill_count"):
            assert re.search(rf"\.{name}:\s+0\b", code.asm["amdgcn"]), name
        return
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(code.asm["cubin"])
    usage = subprocess.run(
        [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(cubin)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "STACK:0 " in usage, usage
    assert "LOCAL:0 " in usage, usage


def bytes_of_a_full_block(variant: str) -> tuple[int, int]:
    """Bytes that one of 128 threads reads and writes, but for mask words."""
    weight, state, options = VARIANTS[variant]
    elements = (512 if weight == "fp64" else 1024) // 128
    states = options.get("STATES", 0) * BYTES[state]
    masters = 4 if options.get("MASTERS") else 0
    written = BYTES[weight] + states + masters
    return elements * (written + BYTES[weight]), elements * written


@not_interpreted
@pytest.mark.parametrize("variant", ["momentum, masks", "adam, masters, masks", "adam, double"])
def test_compiled_code_for_amd(variant, tmp_path, monkeypatch):
    """No spills; 256 threads with four elements: 128 bits of float32, 64 of half types."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    code = compiled_step(variant, "gfx942")
    assert_no_spills(code, "gfx942", tmp_path)
    wide = "dwordx2" if BYTES[VARIANTS[variant][0]] == 2 else "dwordx4"
    assert f"buffer_load_{wide}" in code.asm["amdgcn"]
    assert f"buffer_store_{wide}" in code.asm["amdgcn"]


@not_interpreted
@pytest.mark.parametrize("variant", VARIANTS)
def test_compiled_code(variant, tmp_path, monkeypatch):
    """No spills, and full blocks in accesses of 128 bits."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    code = compiled_step(variant, "sm_90")
    assert_no_spills(code, "sm_90", tmp_path)
    read, written = bytes_of_a_full_block(variant)
    wide = r"v4\.b32|v2\.b64"
    assert len(re.findall(rf"ld\.global\.(?:{wide})", code.asm["ptx"])) == read // 16
    assert len(re.findall(rf"st\.global\.(?:{wide})", code.asm["ptx"])) == written // 16
    # No instruction takes subnormal numbers for 0, and half types are rounded to nearest.
    assert ".ftz" not in code.asm["ptx"]
    weight = VARIANTS[variant][0]
    if weight in ("fp16", "bf16"):
        assert re.search(rf"cvt\.rn\.{weight.replace('fp', 'f')}(x2)?\.f32", code.asm["ptx"])


@not_interpreted
@pytest.mark.parametrize("variant", ["momentum, masks", "adam, masters, masks"])
def test_compiled_code_of_an_older_gpu(variant, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    assert_no_spills(compiled_step(variant, "sm_80"), "sm_80", tmp_path)


@not_interpreted
def test_addresses_that_are_not_aligned_get_accesses_of_one_element(tmp_path, monkeypatch):
    """Which any address of a float32 allows."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    code = compiled_step("sgd", "sm_90", aligned=False)
    assert not re.search(r"(ld|st)\.global\.v", code.asm["ptx"])


@not_interpreted
@pytest.mark.parametrize("target", TARGETS)
def test_compiled_preparation(target, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from ppkernels.ops.step import gpu

    constants = {"ADAM": True, "CHAIN": True, "DECAY_OF_PHI": False, "LANES": gpu.PREPARED}
    assert_no_spills(compiled(gpu.prepare_kernel, constants, target), target, tmp_path)
