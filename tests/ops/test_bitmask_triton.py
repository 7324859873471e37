"""The Triton kernels of op `bitmask`: in the interpreter, as compiled code, and on a GPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

CASES = Path(__file__).with_name("bitmask_triton_cases.py")


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


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted, not compiled")
@pytest.mark.parametrize(("name", "tensors", "directions", "width"), ROWS)
def test_compiled_code(name, tensors, directions, width, tmp_path, monkeypatch):
    """No spills, and wide accesses on aligned addresses."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from ppkernels.ops.bitmask import gpu

    kernel = getattr(gpu, name)
    place = kernel.arg_names.index
    source = ASTSource(
        fn=kernel,
        signature={argument: tensors.get(argument, "i64") for argument in kernel.arg_names}
        | {"BLOCK": "constexpr"},
        constexprs={(place("BLOCK"),): gpu.BLOCK_WORDS},
        attrs={(place(tensor),): [["tt.divisibility", 16]] for tensor in tensors},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))

    for direction in directions:
        assert re.search(rf"{direction}\.global\.{re.escape(width)}", compiled.asm["ptx"])
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
