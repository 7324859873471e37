"""Runs the Triton tests of op `power_linear`: interpreted here, and on a GPU where there is one."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")


def test_in_the_interpreter(run_cases):
    run_cases("power_linear", TRITON_INTERPRET="1")


@pytest.mark.gpu
def test_on_the_gpu(run_cases):
    run_cases("power_linear", TRITON_INTERPRET="0")
