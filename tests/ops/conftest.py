"""What the tests of Triton kernels share: a process of their own, and code for GPUs not there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

TARGETS = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "gfx942": ("hip", "gfx942", 64)}


@pytest.fixture
def run_cases() -> Callable[..., None]:
    """``run_cases("power", TRITON_INTERPRET="1")``: power_triton_cases.py in a new process."""

    def run(op: str, **environment: str) -> None:
        command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider"]
        result = subprocess.run(
            [*command, str(Path(__file__).with_name(f"{op}_triton_cases.py"))],
            env={**os.environ, **environment},
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
        )
        # The report is the message of a failure.
        assert result.returncode == 0, result.stdout[-20_000:] + result.stderr[-2_000:]

    return run


@pytest.fixture
def compile_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Compiles a kernel as its launcher would have it compiled, for a target in ``TARGETS``.

    ``tensors`` are the arguments at aligned addresses with their types, ``scalars`` other arguments
    that are not of type ``other``, ``constants`` the values of constexpr arguments.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("interpreted, not compiled")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    def compiled(
        kernel: Any,
        tensors: Mapping[str, str],
        constants: Mapping[str, Any],
        scalars: Mapping[str, str] | None = None,
        other: str = "i64",
        target: str = "sm_90",
    ) -> Any:
        place = kernel.arg_names.index
        types = {**dict.fromkeys(kernel.arg_names, other), **(scalars or {}), **tensors}
        source = ASTSource(
            fn=kernel,
            signature=types | dict.fromkeys(constants, "constexpr"),
            constexprs={(place(name),): value for name, value in constants.items()},
            attrs={(place(tensor),): [["tt.divisibility", 16]] for tensor in tensors},
        )
        return triton.compile(source, target=GPUTarget(*TARGETS[target]))

    return compiled


@pytest.fixture
def assert_no_spills(tmp_path: Path) -> Callable[[Any], None]:
    """``assert_no_spills(code)``: the compiled code keeps everything in registers."""

    def check(code: Any) -> None:
        import triton

        if "amdgcn" in code.asm:
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

    return check
