"""The install and the switches of the environment, each in an interpreter of its own."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import ppkernels as pp

ROOT = Path(__file__).parents[1]
SWITCHES = ("PPKERNELS_NO_EXT", "PPKERNELS_CPU", "PPKERNELS_BACKEND")

compiled = pytest.mark.skipif(
    pp.cpu_capability() == "reference", reason="this install has no compiled kernels"
)


def python(script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs ``script`` in a fresh interpreter with those switches and no others."""
    inherited = {name: value for name, value in os.environ.items() if name not in SWITCHES}
    return subprocess.run(
        [sys.executable, "-c", script],
        env={**inherited, **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def test_without_kernels_one_warning_says_why_and_ops_work() -> None:
    done = python(
        """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import ppkernels as pp
    import torch
    theta = pp.power(torch.tensor([-0.5, 0.0, 2.0]), 2.0)
(warning,) = [w for w in caught if "ppkernels" in str(w.message)]
assert warning.category is RuntimeWarning
assert "PPKERNELS_NO_EXT=1 is set" in str(warning.message), warning.message
assert pp.cpu_capability() == "reference"
assert theta.tolist() == [-0.25, 0.0, 4.0]
""",
        PPKERNELS_NO_EXT="1",
    )
    assert done.returncode == 0, done.stderr


@compiled
def test_with_kernels_there_is_no_warning() -> None:
    done = python("import warnings; warnings.simplefilter('error'); import ppkernels")
    assert done.returncode == 0, done.stderr


@compiled
def test_an_instruction_set_that_does_not_exist_is_refused() -> None:
    done = python("import ppkernels", PPKERNELS_CPU="nonsense")
    assert done.returncode != 0
    last_line = done.stderr.strip().splitlines()[-1]
    assert "PPKERNELS_CPU" in done.stderr, done.stderr
    assert "nonsense" in done.stderr, last_line
    assert "baseline" in done.stderr, last_line


@compiled
@pytest.mark.parametrize("isa", ["baseline", pp.cpu_capability()])
def test_an_instruction_set_can_be_forced(isa: str) -> None:
    done = python("import ppkernels; print(ppkernels.cpu_capability())", PPKERNELS_CPU=isa)
    assert done.stdout.strip() == isa, done.stderr


def test_a_backend_that_does_not_exist_is_refused() -> None:
    done = python("import ppkernels", PPKERNELS_BACKEND="nonsense")
    assert done.returncode != 0
    last_line = done.stderr.strip().splitlines()[-1]
    assert "PPKERNELS_BACKEND is 'nonsense'; it must be one of" in last_line


def test_the_backend_can_be_set_from_outside() -> None:
    done = python(
        """
import ppkernels as pp, torch
weight, alpha = torch.rand(1000) + 0.5, torch.tensor(1.3, dtype=torch.float64)
assert torch.equal(pp.power(weight, alpha), pp.reference.power(weight, alpha))
""",
        PPKERNELS_BACKEND="reference",
    )
    assert done.returncode == 0, done.stderr


def test_version_is_that_of_the_installed_package() -> None:
    try:
        installed = importlib.metadata.version("ppkernels")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("ppkernels is on the path, not installed")
    assert pp.__version__ == installed


def test_typing_marker_is_there() -> None:
    assert (Path(pp.__file__).parent / "py.typed").exists()


def test_makefile_installs_what_the_build_requires() -> None:
    # A build without isolation needs them in .venv beforehand; pip has no option for it.
    pyproject = (ROOT / "pyproject.toml").read_text()
    requires = re.search(r"^requires = \[(.*)\]$", pyproject, re.MULTILINE)
    installed = re.search(
        r"^BUILD_REQUIRES := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE
    )
    assert requires
    assert installed
    wanted = set(re.findall(r'"([^"]+)"', requires[1]))
    assert wanted <= set(installed[1].replace('"', "").split())


OBJECTS = sorted(ROOT.glob("build/*/CMakeFiles/kernels_*.dir/**/*.o"))


@pytest.mark.skipif(not OBJECTS or shutil.which("nm") is None, reason="no object files, or no nm")
def test_no_code_is_shared_between_instruction_sets() -> None:
    # The linker keeps one copy of a function that several objects define, say a standard-library
    # template: the copy compiled for AVX-512 would then run on a processor without it.
    shared = []
    for path in OBJECTS:
        isa = path.relative_to(ROOT).parts[3].removeprefix("kernels_").removesuffix(".dir")
        symbols = subprocess.run(
            ["nm", "-C", "--defined-only", path], capture_output=True, text=True, check=True
        ).stdout
        for _address, kind, name in (line.split(" ", 2) for line in symbols.splitlines()):
            # The linker merges V, W and u.
            if kind in "VWu" and f"ppkernels::{isa}::" not in name:
                shared.append((isa, name))
    assert shared == []
