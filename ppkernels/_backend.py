"""The one switch between the compiled kernels and the pure-PyTorch reference."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

NAMES = ("kernels", "reference")

_from_environment = os.environ.get("PPKERNELS_BACKEND") or "kernels"
if _from_environment not in NAMES:
    raise ValueError(
        f"PPKERNELS_BACKEND is {_from_environment!r}; it must be one of {', '.join(NAMES)}"
    )

# One value for the process, not one per thread: autograd runs backward passes of GPU tensors in
# threads of its own, and they must see the caller's choice. Blocks of several threads may end in
# any order, so each removes its own entry; the last one that is open counts.
_open: list[list[str]] = []
_current = _from_environment
_lock = threading.Lock()


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
    entry = [name]
    with _lock:
        _open.append(entry)
        _current = name
    try:
        yield
    finally:
        with _lock:
            _open[:] = [other for other in _open if other is not entry]
            _current = _open[-1][0] if _open else _from_environment
