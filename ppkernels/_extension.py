"""Loads the compiled CPU kernels, or says once why the reference is in use.

Loading registers the kernels with PyTorch's dispatcher for CPU tensors; nothing else in the package
knows whether they are there.
"""

from __future__ import annotations

import importlib
import os
import warnings

import torch

__all__ = ["cpu_capability"]

_CAPABILITIES = ("baseline", "avx2", "avx512")


_REBUILD = "install a C++20 compiler (g++ >= 10 or clang++ >= 12) and reinstall ppkernels"


def _load() -> bool:
    if os.environ.get("PPKERNELS_NO_EXT") == "1":
        reason, remedy = "PPKERNELS_NO_EXT=1 is set", "unset it"
    else:
        try:
            importlib.import_module("ppkernels._C")
        except ModuleNotFoundError as error:
            if error.name != "ppkernels._C":
                raise
            reason, remedy = "they were not built (no C++ compiler at install time?)", _REBUILD
        except ImportError as error:
            reason, remedy = f"they could not be loaded ({error})", _REBUILD
        else:
            return True
    warnings.warn(
        f"ppkernels runs on its pure-PyTorch reference, without compiled CPU kernels: {reason}. "
        f"To have them: {remedy}.",
        RuntimeWarning,
        stacklevel=4,
    )
    return False


_loaded = _load()


def cpu_capability() -> str:
    """The instruction set that the CPU kernels use, picked when the library is loaded.

    One of ``"avx512"``, ``"avx2"``, ``"baseline"`` (portable C++), or ``"reference"`` where the
    compiled kernels are missing. ``PPKERNELS_CPU=baseline|avx2|avx512`` in the environment forces
    one that the processor has.
    """
    if not _loaded:
        return "reference"
    return _CAPABILITIES[torch.ops.ppkernels.cpu_capability()]
