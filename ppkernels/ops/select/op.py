"""Selection of the largest weights as a PyTorch op: public function, schema, kernels.

The CPU kernels register themselves from csrc/bindings/select.cpp when ppkernels._C is loaded.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any, overload

import torch
from torch import Tensor

from ppkernels import _backend
from ppkernels._checks import alpha_tensor, check_alpha, check_floating, check_has_values
from ppkernels._many import Many
from ppkernels._shares import entries_of
from ppkernels.ops.bitmask import BitMask, count_bits, words_within
from ppkernels.ops.select import reference

Alpha = float | Tensor | None

# ---- public functions


@overload
def topk_mask(
    tensors: Tensor,
    k: int | None = None,
    alpha: Alpha = None,
    *,
    share: float | None = None,
    within: BitMask | None = None,
) -> BitMask: ...


@overload
def topk_mask(
    tensors: Mapping[str, Tensor],
    k: int | Mapping[str, int] | None = None,
    alpha: Alpha | Mapping[str, Alpha] = None,
    *,
    share: float | Mapping[str, float] | None = None,
    within: Mapping[str, BitMask | None] | None = None,
) -> dict[str, BitMask]: ...


@overload
def topk_mask(
    tensors: Sequence[Tensor],
    k: int | Sequence[int] | None = None,
    alpha: Alpha | Sequence[Alpha] = None,
    *,
    share: float | Sequence[float] | None = None,
    within: Sequence[BitMask | None] | None = None,
) -> list[BitMask]: ...


def topk_mask(
    tensors: Any, k: Any = None, alpha: Any = None, *, share: Any = None, within: Any = None
) -> Any:
    """The masks that keep the k largest |θ| of all tensors together: exactly k entries.

    The weights are read where they lie: nothing is copied, sorted or powered. What decides is the
    value of |θ| = |x|^α, not rounded to the dtype of x. Where tensors that are ranked together have
    different exponents, that is log2|θ| = α·log2|x| in float64, to 2^-49 of itself: values closer
    to each other than that may count as equal or rank in either order. Of equal |θ| the one with
    the lower index is kept: of an earlier tensor, or earlier in row-major order. The same masks on
    every run, with any number of threads, on every instruction set and device.

    Besides the masks, a CPU needs memory of at most 1.5 bytes an entry, 0.1 MB for each of ``k``,
    and 0.1 MB for each thread.

    Args:
        tensors: one tensor, or a list or mapping of some: float32, float64, bfloat16 or float16,
            which may differ, of any shapes and strides, on one device.
        k: how many entries to keep, of all together; or a list or mapping of numbers, like
            ``tensors``: how many of each.
        alpha: α of the tensors that hold φ; None for those that hold θ. One for all, or a list or
            mapping. It only matters where it differs.
        share: instead of k, the share to keep, from 0 to 1, of all together or of each; that is
            ⌊share · N⌋ of N entries, with 0.29 of 100 meaning 29.
        within: masks like ``tensors``; entries whose bit is 0 are not kept, nor looked at. Shares
            are shares of all entries nevertheless.

    Returns:
        A `BitMask`, or a list or dict of them, as ``tensors`` came, on the tensors' device.

    Raises:
        TypeError: tensors, numbers or masks of another kind; not one of ``k`` and ``share``.
        ValueError: a tensor in which there is a NaN, which the error names; k beyond the number of
            entries that may be kept; lists that do not go together; tensors on several devices.

    A GPU is waited for, to ask it for NaN (and for the bits of each mask in ``within`` and for each
    α that lies there), so that no CUDA graph can hold a call. On the CPU, subnormal numbers count
    as 0 under torch.set_flush_denormal(True). Weights that another thread writes to meanwhile give
    masks that mean nothing, or an error.
    """
    many = Many("topk_mask", tensors)
    inputs = many.tensors
    for name, tensor in zip(many.names, inputs, strict=True):
        check_floating("topk_mask", name, tensor)
        check_has_values("topk_mask", name, tensor)
        if tensor.device != inputs[0].device:
            raise ValueError(
                f"topk_mask: all tensors must be on one device, got {many.names[0]} on "
                f"{inputs[0].device} and {name} on {tensor.device}"
            )
    alphas = [
        1.0 if value is None else _exponent(label, value)
        for label, value in zip(many.labels("alpha", alpha), many.each("alpha", alpha), strict=True)
    ]
    words = _words(many, within)
    counts = _counts(many, k, share, words)
    if not inputs:
        return many.like([])
    if _backend.uses_reference():
        kept, first_nan = reference.topk_bits(inputs, counts, alphas, words)
    else:
        kept = [
            torch.empty((tensor.numel() + 7) // 8, dtype=torch.uint8, device=tensor.device)
            for tensor in inputs
        ]
        first_nan = torch.ops.ppkernels.topk_bits_(kept, inputs, counts, alphas, words)
    found = int(first_nan)
    if found >= 0:
        raise ValueError(f"topk_mask: there is a NaN in {many.names[found]}")
    return many.like(
        [BitMask(bits, tensor.shape) for bits, tensor in zip(kept, inputs, strict=True)]
    )


def _exponent(label: str, alpha: float | Tensor) -> float:
    value = alpha_tensor("topk_mask", alpha, name=label).item()
    # One on a GPU has not been looked at before.
    return check_alpha("topk_mask", value, label)


def _words(many: Many, within: Any) -> list[Tensor]:
    """The words of the masks, with an empty tensor for none; an empty list if there are none."""
    masks = many.each("within", within)
    if all(mask is None for mask in masks):
        return []
    return [
        torch.empty(0, dtype=torch.uint8, device=tensor.device)
        if mask is None
        else words_within("topk_mask", mask, name, tensor)
        for name, tensor, mask in zip(many.names, many.tensors, masks, strict=True)
    ]


def _counts(many: Many, k: Any, share: Any, words: list[Tensor]) -> list[int]:
    """How many entries to keep: one number for all tensors, or one for each."""
    if (k is None) == (share is None):
        raise TypeError("topk_mask: give either k, a number of entries, or share, from 0 to 1")
    sizes = [tensor.numel() for tensor in many.tensors]
    asked = share if k is None else k
    if many.is_spread(asked):
        wanted = many.each("share" if k is None else "k", asked)
        totals, names, parts = sizes, many.names, [[i] for i in range(len(sizes))]
    else:
        wanted, totals, names = [asked], [sum(sizes)], ["all tensors together"]
        parts = [list(range(len(sizes)))]
    if k is None:
        labels = many.labels("share", asked) if many.is_spread(asked) else ["share"]
        counts = [
            entries_of(each, total, "topk_mask", label)
            for each, total, label in zip(wanted, totals, labels, strict=True)
        ]
    else:
        counts = [_count(each) for each in wanted]
    for count, name, part in zip(counts, names, parts, strict=True):
        allowed = sum(_allowed(sizes[i], words[i] if words else None) for i in part)
        if count > allowed:
            raise ValueError(
                f"topk_mask: {count} entries of {name} are to be kept, but there are {allowed}"
                + (" in the masks within" if words else "")
            )
    return counts


def _count(k: Any) -> int:
    if not isinstance(k, Integral) or isinstance(k, bool):
        raise TypeError(
            f"topk_mask: k must be a whole number of entries, got {k!r}"
            + ("; a share goes by the name share=" if isinstance(k, float) else "")
        )
    if k < 0:
        raise ValueError(f"topk_mask: k must be at least 0, got {k}")
    return int(k)


def _allowed(size: int, words: Tensor | None) -> int:
    return size if words is None or words.numel() == 0 else int(count_bits(words))


# ---- schema, and the kernels of every device but the CPU

_SCHEMA = (
    "(Tensor(a!)[] words, Tensor[] tensors, int[] counts, float[] alphas, Tensor[] within) "
    "-> Tensor"
)


def _topk_bits_(
    words: list[Tensor],
    tensors: list[Tensor],
    counts: list[int],
    alphas: list[float],
    within: list[Tensor],
) -> Tensor:
    kept, first_nan = reference.topk_bits(tensors, counts, alphas, within)
    for out, bits in zip(words, kept, strict=True):
        out.copy_(bits)
    return first_nan


def _launch(*args: Any) -> Tensor:
    # Triton is imported by the first call on a GPU, never by `import ppkernels`.
    from ppkernels.ops.select import gpu

    return gpu.topk_bits_(*args)


torch.library.define("ppkernels::topk_bits_", _SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))
torch.library.register_fake(
    "ppkernels::topk_bits_",
    lambda words, tensors, *_: tensors[0].new_empty((), dtype=torch.int64),
)
# The reference, wherever nothing better is registered for a device.
torch.library.impl("ppkernels::topk_bits_", "CompositeExplicitAutograd", _topk_bits_)
if importlib.util.find_spec("triton") is not None:
    torch.library.impl("ppkernels::topk_bits_", "CUDA", _launch)
