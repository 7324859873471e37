"""What the tests of Triton kernels share: a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest


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
