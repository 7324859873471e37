"""`pp.BitMask`: a mask of one bit an entry, with its shape."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ppkernels._checks import check_words, check_words_for
from ppkernels.ops.bitmask.op import checked_shape, count_bits, pack_bits, unpack_bits


class BitMask:
    """An immutable mask of one bit an entry: set means kept or trained, 0 hidden or frozen.

    ``a & b``, ``a | b``, ``a - b`` (set in a and not in b) and ``~a`` give new masks; the operands
    must have one shape and one device. ``a == b`` is a bool: whether shapes and entries are the
    same, on whatever devices. Masks have no hash. torch.save and torch.load take them as they are.

    Attributes:
        words: the entries in row-major order, contiguous uint8 [ceil(N / 8)]; entry i is bit i % 8
            of byte i // 8, as numpy.packbits(bitorder="little") has it, and the bits behind the
            last entry are 0. This plain tensor is what goes into a checkpoint or a safetensors
            file, and ``BitMask(words, shape)`` makes a mask of it again. Do not write to it.
        shape: the mask's shape, a torch.Size of N entries.

    Args:
        words: as above; they are copied, and bits behind the last entry are cleared in the copy.
        shape: a number or a tuple of numbers.

    Raises:
        TypeError: words or a shape of another kind (a bool tensor goes through `BitMask.pack`).
        ValueError: words that are not 1-dim and contiguous, or not ceil(N / 8) bytes.

    Example::

        layer.update_mask = pp.BitMask.pack(layer.theta.abs() > 0.01)
    """

    __slots__ = ("_shape", "_words")
    __hash__ = None  # type: ignore[assignment]

    _shape: torch.Size
    _words: Tensor

    def __init__(self, words: Tensor, shape: int | Sequence[int]) -> None:
        if isinstance(words, Tensor) and words.dtype == torch.bool:
            raise TypeError(
                "BitMask: words must be the uint8 words of a mask, got a bool tensor; "
                "BitMask.pack(mask) makes a mask of it"
            )
        sizes = checked_shape("BitMask", shape)
        check_words("BitMask", words, math.prod(sizes))
        self._set(_without_padding(words.detach().clone(), sizes), sizes)

    def _set(self, words: Tensor, shape: Sequence[int]) -> None:
        object.__setattr__(self, "_words", words)
        object.__setattr__(self, "_shape", torch.Size(shape))

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"BitMask: masks are immutable, so {name!r} cannot be set")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"BitMask: masks are immutable, so {name!r} cannot be deleted")

    # ---- from and to tensors

    @classmethod
    def pack(cls, mask: Tensor) -> BitMask:
        """The mask that a bool tensor of any shape, strides and device stands for.

        Raises:
            TypeError: ``mask`` is no bool tensor.
        """
        return _made(pack_bits(mask), mask.shape)

    @classmethod
    def ones(cls, shape: int | Sequence[int], device: torch.device | str | None = None) -> BitMask:
        """A mask of ``shape`` in which every entry is set."""
        return ~cls.zeros(shape, device)

    @classmethod
    def zeros(cls, shape: int | Sequence[int], device: torch.device | str | None = None) -> BitMask:
        """A mask of ``shape`` in which no entry is set."""
        sizes = checked_shape("BitMask", shape)
        size = (math.prod(sizes) + 7) // 8
        return _made(torch.zeros(size, dtype=torch.uint8, device=device), sizes)

    def unpack(self) -> Tensor:
        """The mask as a contiguous bool tensor of its shape."""
        return unpack_bits(self._words, self._shape)

    def count(self) -> int:
        """How many entries are set; a GPU is waited for (`pp.count_bits` does not)."""
        return int(count_bits(self._words))

    # ---- what it is

    @property
    def words(self) -> Tensor:
        return self._words

    @property
    def shape(self) -> torch.Size:
        return self._shape

    @property
    def device(self) -> torch.device:
        return self._words.device

    def numel(self) -> int:
        """How many entries the mask has, set or not."""
        return math.prod(self._shape)

    def __repr__(self) -> str:
        size = "x".join(map(str, self._shape)) or "0-dim"
        kept = "meta" if self._words.is_meta else f"{self.count()} of {self.numel()} kept"
        on = "" if self.device.type in ("cpu", "meta") else f", {self.device}"
        return f"BitMask({size}, {kept}{on})"

    # ---- set algebra

    def __and__(self, other: BitMask) -> BitMask:
        if not isinstance(other, BitMask):
            return NotImplemented
        self._check_fits("&", other)
        return _made(self._words & other._words, self._shape)

    def __or__(self, other: BitMask) -> BitMask:
        if not isinstance(other, BitMask):
            return NotImplemented
        self._check_fits("|", other)
        return _made(self._words | other._words, self._shape)

    def __sub__(self, other: BitMask) -> BitMask:
        if not isinstance(other, BitMask):
            return NotImplemented
        self._check_fits("-", other)
        return _made(self._words & ~other._words, self._shape)

    def __invert__(self) -> BitMask:
        return _made(_without_padding(~self._words, self._shape), self._shape)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, BitMask):
            return NotImplemented
        same_shape = self._shape == other._shape
        return same_shape and torch.equal(self._words, other._words.to(self.device))

    def _check_fits(self, operator: str, other: BitMask) -> None:
        if self._shape != other._shape:
            raise ValueError(
                f"BitMask: the masks of a {operator} b must have the same shape, got "
                f"{tuple(self._shape)} and {tuple(other._shape)}"
            )
        if self.device != other.device:
            raise ValueError(
                f"BitMask: the masks of a {operator} b must be on the same device, got "
                f"{self.device} and {other.device}; move one of them with .to()"
            )

    # ---- devices and copies

    def to(self, device: torch.device | str | int, *, non_blocking: bool = False) -> BitMask:
        """The mask on another device; itself if it is there already."""
        words = self._words.to(torch.device(device), non_blocking=non_blocking)
        return self if words is self._words else _made(words, self._shape)

    def cpu(self) -> BitMask:
        """The mask on the CPU."""
        return self.to("cpu")

    def cuda(self, device: torch.device | str | int | None = None) -> BitMask:
        """The mask on a GPU, the current one by default."""
        return self.to("cuda" if device is None else device)

    def __deepcopy__(self, memo: dict[int, Any]) -> BitMask:
        return _made(self._words.clone(), self._shape)

    def __reduce__(self) -> tuple[Any, ...]:
        return BitMask, (self._words, tuple(self._shape))


def _made(words: Tensor, shape: Sequence[int]) -> BitMask:
    """The mask of words that are known to be right, without a copy."""
    mask = object.__new__(BitMask)
    mask._set(words, shape)
    return mask


def _without_padding(words: Tensor, shape: Sequence[int]) -> Tensor:
    """``words`` with the bits behind the last entry cleared, in place."""
    used = math.prod(shape) % 8
    if used:
        words[-1:] &= (1 << used) - 1
    return words


# torch.load with weights_only=True, its default, makes objects of known classes alone.
torch.serialization.add_safe_globals([BitMask])


def words_within(op: str, mask: Any, name: str, tensor: Tensor) -> Tensor:
    """The words of ``mask``, an argument ``within`` for the tensor that errors call ``name``.

    Raises:
        TypeError, ValueError: no `BitMask`, or one of another shape or on another device.
    """
    if not isinstance(mask, BitMask):
        raise TypeError(f"{op}: within must be a pp.BitMask for {name}, got {type(mask).__name__}")
    if mask.shape != tensor.shape:
        raise ValueError(
            f"{op}: within must have the shape of {name}, {tuple(tensor.shape)}, got "
            f"{tuple(mask.shape)}"
        )
    check_words_for(op, mask.words, tensor)
    return mask.words
