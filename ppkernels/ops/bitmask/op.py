"""Masks of one bit an entry as PyTorch ops: public functions, schemas, kernels, autograd.

The CPU kernels register themselves from csrc/bindings/bitmask.cpp when ppkernels._C is loaded.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from ppkernels import _backend
from ppkernels._checks import check_floating, check_tensor, check_words, check_words_for
from ppkernels.ops._layout import laid_out_as
from ppkernels.ops.bitmask import reference

# ---- public functions


def pack_bits(mask: Tensor) -> Tensor:
    """The words of a mask: one bit an entry, in row-major order, least significant bit first.

    words[j] = Σ_b 2^b · mask.flatten()[8·j + b], as numpy.packbits(bitorder="little") has it. The
    bits behind the last entry are 0. Not differentiable.

    Args:
        mask: a bool tensor of N entries, any shape and strides.

    Returns:
        The words, contiguous uint8 of shape [ceil(N / 8)], on ``mask``'s device.

    Raises:
        TypeError: ``mask`` is no bool tensor.
    """
    check_tensor("pack_bits", "mask", mask, torch.bool)
    if _backend.uses_reference():
        return reference.pack_bits(mask)
    return torch.ops.ppkernels.pack_bits(mask)


def unpack_bits(words: Tensor, shape: int | Sequence[int]) -> Tensor:
    """The mask of ``shape`` that the words stand for: the opposite of `pack_bits`.

    Args:
        words: contiguous uint8 of shape [ceil(N / 8)]; bits behind the last entry are not read.
        shape: the mask's shape, of N entries.

    Returns:
        A contiguous bool tensor of ``shape``, on ``words``' device.

    Raises:
        TypeError, ValueError: words of another kind or size, a shape that is none.
    """
    sizes = checked_shape("unpack_bits", shape)
    check_words("unpack_bits", words, math.prod(sizes))
    if _backend.uses_reference():
        return reference.unpack_bits(words, sizes)
    return torch.ops.ppkernels.unpack_bits(words, sizes)


def count_bits(words: Tensor) -> Tensor:
    """How many bits of ``words`` are set, the ones behind the last entry included.

    Args:
        words: contiguous uint8 of shape [W].

    Returns:
        The number, a 0-dim int64 tensor on ``words``' device: no GPU is waited for.

    Raises:
        TypeError, ValueError: words of another kind.
    """
    check_words("count_bits", words)
    if _backend.uses_reference():
        return reference.count_bits(words)
    return torch.ops.ppkernels.count_bits(words)


def apply_mask(weight: Tensor, words: Tensor) -> Tensor:
    """``weight`` where its bit is set and +0 elsewhere, in one pass that reads one bit a weight.

    A selection, not a product: NaN and infinity under a 0 bit give 0. Weights that are not
    contiguous are right as well, at the price of a copy, or of putting the words in their order.
    Differentiable with respect to ``weight`` any number of times (`pp.autograd.ApplyMask`); the
    gradient is apply_mask(grad, words).

    Args:
        weight: any shape and strides, N entries; float32, float64, bfloat16 or float16.
        words: the mask of ``weight``'s shape, contiguous uint8 of shape [ceil(N / 8)] on
            ``weight``'s device.

    Returns:
        The masked weight, laid out as ``torch.empty_like(weight)``. Exact.

    Raises:
        TypeError: a dtype that is not supported.
        ValueError: words of another size or on another device.
    """
    check_floating("apply_mask", "weight", weight)
    check_words_for("apply_mask", words, weight)
    return ApplyMask.apply(weight, words)


def checked_shape(op: str, shape: int | Sequence[int]) -> tuple[int, ...]:
    """``shape`` as a tuple of numbers that are not negative."""
    sizes = (shape,) if isinstance(shape, (Integral, torch.SymInt)) else shape
    # bool is a kind of int, and a Tensor a kind of sequence. numpy's integers are Integral.
    if not isinstance(sizes, (tuple, list)) or not all(
        isinstance(size, (Integral, torch.SymInt)) and not isinstance(size, bool) for size in sizes
    ):
        raise TypeError(f"{op}: shape must be a number or a tuple of numbers, got {shape!r}")
    if any(size < 0 for size in sizes):
        raise ValueError(f"{op}: shape must have no negative sizes, got {tuple(sizes)}")
    # The op's schema takes Python's own; a SymInt has to stay one.
    return tuple(int(size) if isinstance(size, Integral) else size for size in sizes)


# ---- schemas, shapes, and the kernels of every device but the CPU

_SCHEMAS = {
    "pack_bits": "(Tensor mask) -> Tensor",
    "unpack_bits": "(Tensor words, SymInt[] shape) -> Tensor",
    "count_bits": "(Tensor words) -> Tensor",
    "apply_mask": "(Tensor weight, Tensor words) -> Tensor",
}
_SHAPES: dict[str, Callable[..., Tensor]] = {
    "pack_bits": lambda mask: mask.new_empty((mask.numel() + 7) // 8, dtype=torch.uint8),
    "unpack_bits": lambda words, shape: words.new_empty(shape, dtype=torch.bool),
    "count_bits": lambda words: words.new_empty((), dtype=torch.int64),
    "apply_mask": lambda weight, words: torch.empty_like(weight),
}


def _define(name: str) -> None:
    """Schema, shapes and reference kernel of one op."""

    def kernel(*args: Any) -> Tensor:
        return laid_out_as(getattr(reference, name)(*args), _SHAPES[name](*args))

    tags = (torch.Tag.pt2_compliant_tag,)
    torch.library.define(f"ppkernels::{name}", _SCHEMAS[name], tags=tags)
    torch.library.register_fake(f"ppkernels::{name}", _SHAPES[name])
    # The reference, wherever nothing better is registered for a device.
    torch.library.impl(f"ppkernels::{name}", "CompositeExplicitAutograd", kernel)


def _define_on_gpu(name: str) -> None:
    def launch(*args: Any) -> Tensor:
        # Triton is imported by the first call on a GPU, never by `import ppkernels`.
        from ppkernels.ops.bitmask import gpu

        return getattr(gpu, name)(*args)

    torch.library.impl(f"ppkernels::{name}", "CUDA", launch)


for _name in _SCHEMAS:
    _define(_name)
if importlib.util.find_spec("triton") is not None:
    for _name in _SCHEMAS:
        _define_on_gpu(_name)

# ---- autograd


def _apply(weight: Tensor, words: Tensor) -> Tensor:
    # PyTorch's own operations can do whatever torch.func asks for, and do it inside torch.compile.
    if torch._C._are_functorch_transforms_active():
        return reference.apply_mask(weight, words)
    if _backend.uses_reference():
        return laid_out_as(reference.apply_mask(weight, words), torch.empty_like(weight))
    return torch.ops.ppkernels.apply_mask.default(weight, words)


class ApplyMask(torch.autograd.Function):
    """The weight where its bit is set, and 0 elsewhere; the gradient is masked in the same way.

    ``ApplyMask.apply(weight, words)``: a weight of any shape and its mask's words. Differentiable
    any number of times, works under torch.func's transforms and in torch.compile(fullgraph=True);
    forward-mode differentiation outside torch.func is refused with PyTorch's error. Arguments are
    not checked: `pp.apply_mask` is the checked way in.
    """

    @classmethod
    def apply(cls, weight: Tensor, words: Tensor) -> Tensor:
        if torch._C._are_functorch_transforms_active():
            return _apply(weight, words)
        return _apply_function(weight, words)

    @staticmethod
    def forward(ctx: Any, weight: Tensor, words: Tensor) -> Tensor:
        ctx.save_for_backward(words)
        return _apply(weight, words)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (words,) = ctx.saved_tensors
        # The second Function costs some µs; without a double backward the op alone will do.
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return ApplyMask.apply(grad, words), None
        return _apply(grad, words), None


_apply_function = super(ApplyMask, ApplyMask).apply
