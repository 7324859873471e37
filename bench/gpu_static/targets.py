"""The GPUs that are compiled for, and a kernel compiled for one of them; needs no driver."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Target:
    """A GPU as Triton names it; a warp (AMD: wave) has ``lanes`` threads."""

    backend: str
    arch: int | str
    lanes: int

    @property
    def is_nvidia(self) -> bool:
        return self.backend == "cuda"


TARGETS = {
    "sm_80": Target("cuda", 80, 32),  # A100
    "sm_90": Target("cuda", 90, 32),  # H100
    "sm_100": Target("cuda", 100, 32),  # B200
    "gfx942": Target("hip", "gfx942", 64),  # MI300
}


class CannotCompile(Exception):
    """Nothing can be compiled in this process, and the sentence says why."""


def require_compiler() -> None:
    """Raise `CannotCompile` where there is no Triton, or where it would interpret kernels."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise CannotCompile("TRITON_INTERPRET=1 is set: kernels are interpreted then; unset it.")
    try:
        import triton  # noqa: F401
    except ImportError:
        raise CannotCompile("The package triton is missing; torch for Linux brings it.") from None


def compile_kernel(
    kernel: Any, types: Mapping[str, str], choices: Mapping[str, Any], target: Target
) -> Any:
    """``kernel`` as its launcher has it compiled.

    Args:
        kernel: a function under ``triton.jit``.
        types: Triton's type of every argument that is a value, "*fp32" for a tensor's address,
            which is a multiple of 16; "i32:16" for an integer that is one.
        choices: what else the launcher passes: values of constexpr arguments, and Triton's options
            such as ``num_warps``.
        target: a value of `TARGETS`.

    Raises:
        CannotCompile: see `require_compiler`.
    """
    require_compiler()
    from triton import compile as compiled
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    place = kernel.arg_names.index
    constants = {name: value for name, value in choices.items() if name in kernel.arg_names}
    options = {name: value for name, value in choices.items() if name not in kernel.arg_names}
    multiples = [name for name, kind in types.items() if kind[0] == "*" or kind.endswith(":16")]
    kinds = {name: kind.partition(":")[0] for name, kind in types.items()}
    source = ASTSource(
        fn=kernel,
        signature={name: kinds.get(name, "constexpr") for name in kernel.arg_names},
        constexprs={(place(name),): value for name, value in constants.items()},
        attrs={(place(name),): [["tt.divisibility", 16]] for name in multiples},
    )
    gpu = GPUTarget(target.backend, target.arch, target.lanes)
    with _true_lines():
        return compiled(source, target=gpu, options=options)


@contextmanager
def _true_lines() -> Iterator[None]:
    """Within, PTX is noted with the source lines that it comes from; the code stays the same.

    Triton's loads are inline assembly of several lines, and LLVM counts the source line up with
    each, so that the access itself seems to stand a few lines below.
    """
    from triton import knobs

    def hook(*arguments: Any) -> tuple[str, str] | None:
        if not arguments:  # asked for what a cache is to tell these kernels by
            return _true_lines.__name__, _true_lines.__name__
        stages = arguments[1]
        if "ptx" in stages:
            make = stages["ptx"]
            stages["ptx"] = lambda source, metadata: with_true_lines(make(source, metadata))
        return None

    with knobs.runtime.scope():
        knobs.runtime.add_stages_inspection_hook = hook
        yield


def with_true_lines(ptx: str) -> str:
    """``ptx`` with one source line for each run of inline assembly, its first."""
    lines, noted = [], None
    for line in ptx.splitlines():
        if line.strip() in ("// begin inline asm", "// end inline asm"):
            noted = False if "begin" in line else None
        elif noted is not None and line.lstrip().startswith(".loc"):
            if noted:
                continue
            noted = True
        lines.append(line)
    return "\n".join(lines) + "\n"
