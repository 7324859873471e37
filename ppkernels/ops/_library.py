"""Ops in PyTorch's library: how one is defined, and how it is called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_REFERENCES: dict[str, Callable[..., Any]] = {}


def define(
    name: str, schema: str, shape: Callable[..., Any], reference: Callable[..., Any]
) -> None:
    """Defines ``ppkernels::<name>``: its schema, and ``shape``, which says what comes back.

    ``reference`` is the kernel of each device for which nothing better is registered.
    """
    torch.library.define(f"ppkernels::{name}", schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"ppkernels::{name}", shape)
    torch.library.impl(f"ppkernels::{name}", "CompositeExplicitAutograd", reference)
    _REFERENCES[name] = reference


def run(name: str, plain: bool, *args: Any) -> Any:
    """The op by its reference if ``plain``, else by what the dispatcher has."""
    if plain:
        return _REFERENCES[name](*args)
    return getattr(torch.ops.ppkernels, name).default(*args)
