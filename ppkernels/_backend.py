"""The one switch between the compiled kernels and the pure-PyTorch reference."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

NAMES = ("kernels", "reference")

_from_environment = os.environ.get("PPKERNELS_BACKEND", "kernels")
if _from_environment not in NAMES:
    raise ValueError(
        f"PPKERNELS_BACKEND is {_from_environment!r}; it must be one of {', '.join(NAMES)}"
    )

# One value for the process, not one per thread: autograd runs backward passes of GPU tensors in
# threads of its own, and they must see the caller's choice.
_current = _from_environment


def uses_reference() -> bool:
    """Whether ops run on the pure-PyTorch reference at this moment."""
    return _current == "reference"


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Run every op of ppkernels on one implementation, for people who compare or debug.

    ``"kernels"`` (the default) lets the dispatcher pick by the tensors' device: compiled C++ on the
    CPU, Triton on a GPU, the reference elsewhere. ``"reference"`` is pure PyTorch on any device.
    The environment variable ``PPKERNELS_BACKEND`` sets the value a process starts with. The choice
    holds for the whole process while the block runs, backward passes inside the block included.

    Example::

        with pp.backend("reference"):
            theta = pp.power(weight, 1.5)
    """
    global _current
    if name not in NAMES:
        raise ValueError(f"backend: {name!r} is not one of {', '.join(NAMES)}")
    before, _current = _current, name
    try:
        yield
    finally:
        _current = before
