"""Checks at the border of the library: each says what was wanted and what came."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor, nn

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check_floating(op: str, name: str, tensor: Tensor) -> None:
    """``tensor`` is a torch.Tensor of a supported dtype."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.dtype not in DTYPES:
        raise TypeError(
            f"{op}: {name} must be float32, float64, bfloat16 or float16, got "
            f"{str(tensor.dtype).removeprefix('torch.')}"
        )
    if tensor.layout is not torch.strided or tensor.is_nested:
        raise TypeError(
            f"{op}: {name} must be a dense tensor, got "
            + ("a nested one" if tensor.is_nested else f"layout {tensor.layout}")
        )


def check_has_values(op: str, name: str, tensor: Tensor) -> None:
    """``tensor`` has values to be asked for."""
    if tensor.is_meta:
        raise ValueError(f"{op}: {name} is on the meta device, where tensors have no values")


def check_like(op: str, name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """``tensor`` has the shape, dtype and device of ``other``; nothing is broadcast or cast."""
    check_floating(op, name, tensor)
    if tensor.shape != other.shape:
        raise ValueError(
            f"{op}: {name} must have the shape of {other_name}, {tuple(other.shape)}, "
            f"got {tuple(tensor.shape)}"
        )
    if tensor.dtype != other.dtype:
        raise TypeError(
            f"{op}: {name} must have the dtype of {other_name}, {other.dtype}, got {tensor.dtype}"
        )
    if tensor.device != other.device:
        raise ValueError(
            f"{op}: {name} must be on the device of {other_name}, {other.device}, "
            f"got {tensor.device}"
        )


def check_alpha(op: str, alpha: float, name: str = "alpha") -> float:
    """The exponent as a Python float, finite and at least 1."""
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
        raise TypeError(
            f"{op}: {name} must be a float or a 0-dim float64 tensor, got {type(alpha).__name__}"
        )
    if not (1 <= alpha <= sys.float_info.max):
        raise ValueError(f"{op}: {name} must be a finite number >= 1, got {alpha}")
    return float(alpha)


def alpha_tensor(
    op: str, alpha: float | Tensor, device: torch.device | None = None, name: str = "alpha"
) -> Tensor:
    """The exponent as a 0-dim float64 tensor, on the CPU or, if one is named, on ``device``.

    A number becomes a CPU tensor; a tensor passes through untouched. Its value is checked where
    that waits for no GPU and breaks no graph that is being captured.
    """
    if not isinstance(alpha, Tensor):
        # The device is named because `with torch.device("meta")` would lose the value.
        value = check_alpha(op, alpha, name)
        return torch.scalar_tensor(value, dtype=torch.float64, device="cpu")
    if alpha.dtype != torch.float64 or alpha.dim() != 0:
        raise TypeError(
            f"{op}: {name} as a tensor must be 0-dim float64 (a rounded exponent is another "
            f"exponent), got {tuple(alpha.shape)} {alpha.dtype}"
        )
    check_no_grad(op, name, alpha)
    if device is not None and alpha.device.type != "cpu" and alpha.device != device:
        raise ValueError(
            f"{op}: {name} must be on the CPU or on the device of the weight, {device}, "
            f"got {alpha.device}"
        )
    is_plain = type(alpha) is Tensor and not torch._C._are_functorch_transforms_active()
    if is_plain and alpha.device.type == "cpu" and not torch.compiler.is_compiling():
        check_alpha(op, alpha.item(), name)
    return alpha


def check_no_grad(op: str, name: str, number: Tensor) -> None:
    """``number`` asks for no gradient: there is none."""
    if number.requires_grad:
        raise ValueError(f"{op}: there is no gradient with respect to {name}; pass {name}.detach()")


def check_tensor(op: str, name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    """``tensor`` is a dense torch.Tensor of one dtype."""
    wanted = str(dtype).removeprefix("torch.")
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: {name} must be a {wanted} tensor, got {type(tensor).__name__}")
    if tensor.dtype != dtype:
        came = str(tensor.dtype).removeprefix("torch.")
        raise TypeError(f"{op}: {name} must be a {wanted} tensor, got {came}")
    if tensor.layout is not torch.strided or tensor.is_nested:
        raise TypeError(
            f"{op}: {name} must be a dense tensor, got "
            + ("a nested one" if tensor.is_nested else f"layout {tensor.layout}")
        )


def check_words(op: str, words: Tensor, entries: int | None = None) -> None:
    """``words`` has the form of a mask's words, and the size for ``entries`` if that is given."""
    check_tensor(op, "words", words, torch.uint8)
    if words.dim() != 1 or not words.is_contiguous():
        raise ValueError(
            f"{op}: words must be a contiguous 1-dim tensor, got shape {tuple(words.shape)}, "
            f"strides {words.stride()}"
        )
    if entries is not None and words.numel() != (entries + 7) // 8:
        raise ValueError(
            f"{op}: words must have one bit for each of {entries} entries, that is "
            f"{(entries + 7) // 8} bytes, got {words.numel()}"
        )


def check_words_for(op: str, words: Tensor, weight: Tensor) -> None:
    """``words`` are those of a mask of ``weight``'s shape, on its device."""
    check_words(op, words, weight.numel())
    if words.device != weight.device:
        raise ValueError(
            f"{op}: words must be on the device of weight, {weight.device}, got {words.device}"
        )


def check_number(op: str, name: str, value: Any, what: str = "a number") -> float:
    """``value`` as a float: any real number."""
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{op}: {name} must be {what}, got {value!r}")
    return float(value)


def check_numbers(op: str, name: str, values: Any) -> list[float]:
    """``values`` as floats: any real numbers, several of them; a generator is read once."""
    if isinstance(values, (str, bytes, Mapping, Tensor)) or not isinstance(values, Iterable):
        raise TypeError(f"{op}: {name} must be a list of numbers, got {values!r}")
    return [check_number(op, name, value, "numbers") for value in values]


def check_whole(op: str, name: str, value: Any, *, at_least: int) -> int:
    """``value`` as an int: any whole number that is large enough, NumPy's included."""
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(f"{op}: {name} must be a whole number >= {at_least}, got {value!r}")
    if value < at_least:
        raise ValueError(f"{op}: {name} must be a whole number >= {at_least}, got {value}")
    return int(value)


def check_model(op: str, model: Any) -> None:
    """``model`` is a torch.nn.Module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{op}: model must be a torch.nn.Module, got {type(model).__name__}")


def check_word(op: str, name: str, word: str, first: str, second: str) -> None:
    """``word`` is one of two."""
    if word not in (first, second):
        raise ValueError(f"{op}: {name} must be {first!r} or {second!r}, got {word!r}")


@contextmanager
def normal_tensors() -> Iterator[None]:
    """What is made in here can be trained, in torch.inference_mode too, which lasts outside."""
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield


def is_captured(device: torch.device) -> bool:
    """Whether a CUDA graph records what is done on ``device``, where no value can be asked for."""
    if device.type != "cuda" or not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return False  # without a GPU the question itself could fail
    return torch.cuda.is_current_stream_capturing()


def check_not_captured(op: str, name: str, device: torch.device) -> None:
    """No CUDA graph is recorded on ``device``, whose replays would not follow ``name``."""
    if is_captured(device):
        raise RuntimeError(
            f"{op}: every replay of the CUDA graph would take the value that {name}, a tensor on "
            f"the CPU, has now; it has to be on {device}"
        )
