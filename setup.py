"""Builds the compiled CPU kernels by calling CMake; everything else stands in pyproject.toml.

PPKERNELS_NO_EXT=1 in the environment, or no C++ compiler, gives a pure-Python install. A compiler
that is there and fails is an error: kernels never go missing without a word.
"""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


class CMakeBuild(build_ext):
    """Compiles ppkernels/_C with CMake, in a build directory that lasts between installs."""

    def build_extension(self, ext: Extension) -> None:
        build_dir = (
            ROOT / "build" / f"cmake-{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        )
        # Given anew each time: pip's isolated builds have tools and torch in another place each.
        configure = {
            "CMAKE_MAKE_PROGRAM": program("ninja", "BIN_DIR"),
            "Python_EXECUTABLE": sys.executable,
            "PPKERNELS_MODULE": "ON",
        }
        definitions = [f"-D{name}={value}" for name, value in configure.items()]
        cmake = program("cmake", "CMAKE_BIN_DIR")
        print(f"ppkernels: compiling the CPU kernels in {build_dir}", file=sys.stderr)
        generate = ["-S", ROOT, "-B", build_dir, "-G", "Ninja", *definitions]
        for step in (generate, ["--build", build_dir, "--target", "_C"]):
            if subprocess.run([cmake, *step], check=False).returncode != 0:
                raise SystemExit(
                    "ppkernels: compiling the CPU kernels failed; what CMake and the compiler say "
                    "stands above. PPKERNELS_NO_EXT=1 installs ppkernels without them."
                )
        built = Path(self.get_ext_fullpath(ext.name))
        built.parent.mkdir(parents=True, exist_ok=True)
        self.copy_file(str(build_dir / built.name), str(built))

    def get_ext_filename(self, fullname: str) -> str:
        # The same on every Python, since one file serves them all.
        return os.path.join(*fullname.split(".")) + ".abi3.so"


def program(package: str, folder: str) -> str:
    """The path of a build tool: out of its PyPI package, or else from the PATH."""
    try:
        return str(Path(getattr(importlib.import_module(package), folder)) / package)
    except ImportError:
        found = shutil.which(package)
    if found is None:
        raise SystemExit(f"ppkernels: compiling the kernels needs {package}: pip install {package}")
    return found


def reason_without_kernels() -> str | None:
    """Why this install has no compiled kernels, or None where it has."""
    if os.environ.get("PPKERNELS_NO_EXT") == "1":
        return "PPKERNELS_NO_EXT=1 is set"
    if sys.platform == "win32":
        return "the kernels are written for GCC and Clang, not for Windows"
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        return "free-threaded Python cannot load modules of the limited API"
    compilers = ("c++", "g++", "clang++")  # where CMake looks too; it reads CXX by itself
    if "CXX" not in os.environ and not any(map(shutil.which, compilers)):
        return f"no C++ compiler was found (CXX is not set, none of {', '.join(compilers)} on PATH)"
    return None


reason = reason_without_kernels()
if reason is None:
    setup(
        ext_modules=[Extension("ppkernels._C", sources=[], py_limited_api=True)],
        cmdclass={"build_ext": CMakeBuild},
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
    )
else:
    print(f"ppkernels: installing without compiled CPU kernels: {reason}.", file=sys.stderr)
    setup()
