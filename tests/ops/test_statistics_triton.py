"""The Triton kernels of op `statistics`: in the interpreter, and on a GPU.

Their compiled code is checked by ``python -m bench.gpu_static --check``.
"""

from __future__ import annotations

import pytest

pytest.importorskip("triton")


def test_in_the_interpreter(run_cases):
    run_cases("statistics", TRITON_INTERPRET="1")


@pytest.mark.gpu
def test_on_the_gpu(run_cases):
    run_cases("statistics", TRITON_INTERPRET="0")
