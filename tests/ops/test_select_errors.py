"""Bad calls of `topk_mask`: each error says what was wanted and what came; NaN is one of them."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

import ppkernels as pp
from ppkernels import BitMask
from ppkernels.testing import DTYPES
from ppkernels.testing_selection import LARGE, weights

BACKENDS = ("kernels", "reference")
NAN = torch.nan

each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])


def drawn(count: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return weights(dtype, count, "drawn", torch.Generator().manual_seed(1))


# ---- NaN


@each_backend
@each_dtype
def test_nan_is_an_error_that_names_the_tensor(dtype: torch.dtype, backend: str) -> None:
    tensors = {name: drawn(5_000, dtype=dtype) for name in "abc"}
    tensors["c"][4_999] = NAN
    named = "^" + re.escape("topk_mask: there is a NaN in tensors['c']") + "$"
    with pp.backend(backend):
        for k in (0, 7, 15_000, {"a": 1, "b": 2, "c": 0}):
            with pytest.raises(ValueError, match=named):
                pp.topk_mask(tensors, k)
        tensors["b"][17] = -torch.tensor(NAN)
        for alpha in (None, {"a": 1.0, "b": 1.5, "c": 2.0}):
            with pytest.raises(ValueError, match=re.escape("NaN in tensors['b']")):
                pp.topk_mask(tensors, 7, alpha)
        with pytest.raises(ValueError, match=re.escape("NaN in tensors[1]")):
            pp.topk_mask(list(tensors.values()), 7)
        with pytest.raises(ValueError, match=r"NaN in tensor$"):
            pp.topk_mask(tensors["b"], 7)


def test_nan_in_the_second_part_of_a_large_tensor() -> None:
    tensors = [drawn(LARGE), drawn(LARGE)]
    tensors[1][LARGE - 1] = NAN
    with pytest.raises(ValueError, match=re.escape("NaN in tensors[1]")):
        pp.topk_mask(tensors, 7)


# ---- the raw op


@pytest.mark.skipif(pp.cpu_capability() == "reference", reason="what the compiled kernels check")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"words": []}, "words must have an entry for each of the 1 tensors, got 0"),
        ({"alphas": [1.0, 1.0]}, "alphas must have an entry for each of the 1 tensors, got 2"),
        ({"counts": []}, "counts must be one number, or one for each of the 1 tensors, got 0"),
        ({"counts": [1, 2]}, "counts must be one number, or one for each of the 1 tensors, got 2"),
        ({"counts": [10]}, "counts must lie between 0 and the 9 entries that may be kept, got 10"),
        ({"counts": [-1]}, "counts must lie between 0 and the 9 entries that may be kept, got -1"),
        ({"alphas": [0.5]}, "alphas must be finite numbers >= 1, got 0.5"),
        ({"alphas": [NAN]}, "alphas must be finite numbers >= 1, got nan"),
        ({"words": [torch.zeros(1, dtype=torch.uint8)]}, "words must be a contiguous uint8 CPU"),
        ({"within": [torch.zeros(2)]}, "words must be a contiguous uint8 CPU tensor of 2 bytes"),
        ({"tensors": [torch.zeros(9).int()]}, "tensors must be float32, float64, bfloat16 or"),
        (
            {"within": [torch.zeros(2, dtype=torch.uint8)]},
            "counts must lie between 0 and the 0 entries that may be kept, got 3",
        ),
        ({"tensors": []}, "words must have an entry for each of the 0 tensors, got 1"),
    ],
)
def test_the_raw_op_refuses_what_it_would_misread(change: dict[str, object], message: str) -> None:
    args = {
        "words": [torch.zeros(2, dtype=torch.uint8)],
        "tensors": [torch.zeros(9)],
        "counts": [3],
        "alphas": [1.0],
        "within": [],
    }
    with pytest.raises(RuntimeError, match="topk_bits_: " + re.escape(message)):
        torch.ops.ppkernels.topk_bits_(*{**args, **change}.values())


# ---- bad arguments

W = torch.zeros(3)
MASK = BitMask.ones(3)
ERRORS = [
    (lambda: pp.topk_mask(W), TypeError, "give either k, a number of entries, or share, from 0"),
    (lambda: pp.topk_mask(W, 1, share=0.1), TypeError, "give either k, a number of entries, or"),
    (lambda: pp.topk_mask("w", 1), TypeError, "tensors must be a tensor, or a list or mapping of"),
    (lambda: pp.topk_mask([[1.0]], 1), TypeError, "tensors[0] must be a torch.Tensor, got list"),
    (
        lambda: pp.topk_mask({"a": W.int()}, 1),
        TypeError,
        "tensors['a'] must be float32, float64, bfloat16 or float16, got int32",
    ),
    (lambda: pp.topk_mask(W.to_sparse(), 1), TypeError, "tensor must be a dense tensor, got"),
    (
        lambda: pp.topk_mask(W.to("meta"), 1),
        ValueError,
        "tensor is on the meta device, where tensors have no values",
    ),
    (
        lambda: pp.topk_mask(W, 1.0),
        TypeError,
        "k must be a whole number of entries, got 1.0; a share goes by the name share=",
    ),
    (lambda: pp.topk_mask(W, True), TypeError, "k must be a whole number of entries, got True"),
    (lambda: pp.topk_mask(W, -1), ValueError, "k must be at least 0, got -1"),
    (
        lambda: pp.topk_mask([W, W], 7),
        ValueError,
        "7 entries of all tensors together are to be kept, but there are 6",
    ),
    (
        lambda: pp.topk_mask([W, W], [1, 4]),
        ValueError,
        "4 entries of tensors[1] are to be kept, but there are 3",
    ),
    (
        lambda: pp.topk_mask(W, 3, within=BitMask.zeros(3)),
        ValueError,
        "3 entries of all tensors together are to be kept, but there are 0 in the masks within",
    ),
    (lambda: pp.topk_mask(W, share=1.5), ValueError, "share must be a number from 0 to 1, got 1.5"),
    (lambda: pp.topk_mask(W, share=NAN), ValueError, "share must be a number from 0 to 1, got nan"),
    (lambda: pp.topk_mask(W, share="x"), TypeError, "share must be a number from 0 to 1, got 'x'"),
    (
        lambda: pp.topk_mask([W], [1, 1]),
        ValueError,
        "k as a list must go with a list of as many tensors, got 2 for 1",
    ),
    (lambda: pp.topk_mask([W], {"a": 1}), TypeError, "k may be a mapping only where tensors are"),
    (
        lambda: pp.topk_mask({"a": W}, {"b": 1}),
        ValueError,
        "k must have the keys of tensors, ['a'], got ['b']",
    ),
    (lambda: pp.topk_mask(W, 1, 0.5), ValueError, "alpha must be a finite number >= 1, got 0.5"),
    (lambda: pp.topk_mask(W, 1, torch.tensor(2.0)), TypeError, "alpha as a tensor must be 0-dim"),
    (
        lambda: pp.topk_mask(W, 1, within=torch.ones(3).bool()),
        TypeError,
        "within must be a pp.BitMask for tensor, got Tensor",
    ),
    (
        lambda: pp.topk_mask(W.view(1, 3), 1, within=MASK),
        ValueError,
        "within must have the shape of tensor, (1, 3), got (3,)",
    ),
    (
        lambda: pp.topk_mask(W, 1, within=MASK.to("meta")),
        ValueError,
        "words must be on the device of weight, cpu, got meta",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), ERRORS, ids=lambda value: str(value)[:50])
def test_errors(call: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match="^topk_mask: " + re.escape(message)):
        call()
