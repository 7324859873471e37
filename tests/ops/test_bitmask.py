"""The ops on masks of one bit an entry, against NumPy's bits and torch.where."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
import torch._dynamo
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import ppkernels as pp
from ppkernels.testing import DTYPES, LAYOUTS, random_bits, special_values

SIZES = (0, 1, 7, 8, 9, 31, 37, 64, 65, 4_999, 70_001)
BACKENDS = ("kernels", "reference")

each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
each_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)


def random_mask(*shape: int) -> Tensor:
    return torch.rand(shape) < 0.4


def all_values(count: int, dtype: torch.dtype) -> Tensor:
    """Special values first, then numbers of every exponent."""
    special = torch.tensor(special_values(dtype), dtype=torch.float64).to(dtype)
    values = random_bits(count, dtype, torch.Generator().manual_seed(0))
    values[: min(count, len(special))] = special[:count]
    return values


def assert_same_bits(result: Tensor, expected: Tensor) -> None:
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[expected.element_size()]
    assert result.dtype == expected.dtype
    assert torch.equal(result.view(integers), expected.view(integers))


# ---- values


@each_backend
@pytest.mark.parametrize("size", SIZES)
def test_words_are_those_of_numpy(size: int, backend: str) -> None:
    mask = random_mask(size)
    with pp.backend(backend):
        words = pp.pack_bits(mask)
        assert (words.dtype, words.shape) == (torch.uint8, ((size + 7) // 8,))
        assert np.array_equal(words.numpy(), np.packbits(mask.numpy(), bitorder="little"))
        unpacked = pp.unpack_bits(words, size)
        assert unpacked.dtype == torch.bool
        assert torch.equal(unpacked, mask)
        count = pp.count_bits(words)
        assert (count.dtype, count.shape) == (torch.int64, ())
        assert count == mask.sum()


@each_backend
@each_layout
def test_pack_takes_any_strides(layout: object, backend: str) -> None:
    mask = layout.arrange(random_mask(*layout.shape))
    with pp.backend(backend):
        words = pp.pack_bits(mask)
        assert torch.equal(words, pp.pack_bits(mask.contiguous()))
        unpacked = pp.unpack_bits(words, mask.shape)
        assert unpacked.is_contiguous()
        assert torch.equal(unpacked, mask)


@each_backend
@each_dtype
@each_layout
def test_apply_selects(layout: object, dtype: torch.dtype, backend: str) -> None:
    count = int(np.prod(layout.shape))
    weight = layout.arrange(all_values(count, dtype).reshape(layout.shape))
    mask = random_mask(*weight.shape)
    with pp.backend(backend):
        result = pp.apply_mask(weight, pp.pack_bits(mask))
    assert result.stride() == torch.empty_like(weight).stride()
    expected = torch.zeros_like(weight, memory_format=torch.contiguous_format)
    expected[mask] = weight[mask]
    assert_same_bits(result.contiguous(), expected)


@pytest.mark.parametrize("offset", [0, 3])
def test_apply_to_more_than_any_cache_holds(offset: int) -> None:
    # Kernels may write so much past the cache, in another loop.
    weight = torch.randn(3 << 20)[offset:]
    mask = random_mask(weight.numel())
    result = pp.apply_mask(weight, pp.pack_bits(mask))
    assert torch.equal(result, torch.where(mask, weight, 0.0))
    rows = weight[: 3 << 19].view(-1, 3).t()  # dense, in another order
    result = pp.apply_mask(rows, pp.pack_bits(mask[: 3 << 19].view(3, -1)))
    assert torch.equal(result, torch.where(mask[: 3 << 19].view(3, -1), rows, 0.0))


def test_same_bits_for_any_number_of_threads() -> None:
    weight = torch.randn(401, 503).t()
    words = pp.pack_bits(random_mask(503, 401))
    two = pp.apply_mask(weight, words)
    torch.set_num_threads(1)
    assert torch.equal(pp.apply_mask(weight, words), two)
    assert pp.count_bits(words) == pp.unpack_bits(words, (503, 401)).sum()


def test_words_at_an_odd_address() -> None:
    mask = random_mask(1_000)
    words = torch.cat([torch.zeros(3, dtype=torch.uint8), pp.pack_bits(mask)])[3:]
    assert torch.equal(pp.unpack_bits(words, 1_000), mask)
    assert torch.equal(pp.apply_mask(torch.ones(1_000), words), mask.float())
    assert pp.count_bits(words) == mask.sum()


# ---- gradients


@each_backend
def test_gradient_is_the_masked_gradient(backend: str) -> None:
    weight = torch.tensor([1.0, torch.nan, torch.inf, 2.0], requires_grad=True)
    words = pp.pack_bits(torch.tensor([True, False, False, True]))
    with pp.backend(backend):
        result = pp.apply_mask(weight, words)
        assert result.tolist() == [1, 0, 0, 2]
        incoming = torch.tensor([3.0, torch.nan, torch.inf, torch.inf])
        (grad,) = torch.autograd.grad(result, weight, incoming)
    assert grad.tolist() == [3, 0, 0, torch.inf]


def test_gradcheck() -> None:
    weight = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    words = pp.pack_bits(random_mask(3, 5))
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(lambda w: pp.apply_mask(w, words), [weight], check_batched_grad=True)


def test_third_derivative_through_the_power() -> None:
    weight = torch.tensor([0.5, 0.25, 2.0], dtype=torch.float64, requires_grad=True)
    words = pp.pack_bits(torch.tensor([True, False, True]))
    loss = pp.apply_mask(weight, words).pow(4).sum()
    for factor, power in ((4, 3), (12, 2), (24, 1)):
        (grad,) = torch.autograd.grad(loss, weight, create_graph=True)
        expected = factor * weight.detach() ** power * torch.tensor([1, 0, 1])
        torch.testing.assert_close(grad.detach(), expected)
        loss = grad.sum()


# ---- torch.func


def test_vmap_and_func_gradients() -> None:
    weights, mask = torch.randn(3, 4, 5), random_mask(4, 5)
    words = pp.pack_bits(mask)
    expected = torch.where(mask, weights, 0.0)
    apply = pp.apply_mask
    assert torch.equal(torch.func.vmap(apply, (0, None))(weights, words), expected)
    last = torch.func.vmap(apply, (2, None), 2)(weights.permute(1, 2, 0), words)
    assert torch.equal(last, expected.permute(1, 2, 0))
    grad = torch.func.grad(lambda w: apply(w, words).square().sum())
    assert torch.equal(grad(weights[0]), 2 * expected[0])
    assert torch.equal(torch.func.vmap(grad)(weights), 2 * expected)
    jacobian = torch.func.jacrev(lambda w: apply(w, words))(weights[0]).view(20, 20)
    assert torch.equal(jacobian, mask.float().flatten().diag())


def test_vmap_over_masks() -> None:
    weight, masks = torch.randn(4, 5), random_mask(3, 4, 5)
    words = torch.stack([pp.pack_bits(mask) for mask in masks])
    result = torch.func.vmap(pp.apply_mask, (None, 0))(weight, words)
    assert torch.equal(result, torch.where(masks, weight, 0.0))


@pytest.mark.parametrize("fullgraph", [False, True])
def test_torch_func_inside_torch_compile(fullgraph: bool) -> None:
    weight, mask = torch.randn(4, 5), random_mask(4, 5)
    words = pp.pack_bits(mask)

    def gradient(weight: Tensor) -> Tensor:
        return torch.func.grad(lambda w: pp.apply_mask(w, words).square().sum())(weight)

    torch._dynamo.reset()
    result = torch.compile(gradient, backend="aot_eager", fullgraph=fullgraph)(weight)
    assert torch.equal(result, 2 * torch.where(mask, weight, 0.0))


# ---- the raw ops, meta tensors, torch.compile

RAW = {
    "pack_bits": lambda weight, mask: (mask,),
    "unpack_bits": lambda weight, mask: (pp.pack_bits(mask), list(mask.shape)),
    "count_bits": lambda weight, mask: (pp.pack_bits(mask),),
    "apply_mask": lambda weight, mask: (weight, pp.pack_bits(mask)),
}
RAW_LAYOUTS = {
    "contiguous": lambda tensor: tensor,
    "channels_last": lambda tensor: tensor.contiguous(memory_format=torch.channels_last),
    "step 2": lambda tensor: tensor[..., ::2],
    "empty": lambda tensor: tensor[:0],
    "expanded": lambda tensor: tensor[:1].expand(2, 3, 4, 5),
}


@pytest.mark.parametrize("layout", RAW_LAYOUTS)
@pytest.mark.parametrize("op", RAW)
def test_opcheck(op: str, layout: str) -> None:
    arrange = RAW_LAYOUTS[layout]
    weight, mask = arrange(torch.randn(2, 3, 4, 5)), arrange(random_mask(2, 3, 4, 5))
    torch.library.opcheck(getattr(torch.ops.ppkernels, op).default, RAW[op](weight, mask))


def test_meta_tensors() -> None:
    mask = random_mask(2, 3, 4, 5).to("meta")
    words = pp.pack_bits(mask)
    assert (words.is_meta, words.dtype, words.shape) == (True, torch.uint8, (15,))
    unpacked = pp.unpack_bits(words, (2, 3, 4, 5))
    assert (unpacked.is_meta, unpacked.dtype, unpacked.shape) == (True, torch.bool, mask.shape)
    count = pp.count_bits(words)
    assert (count.is_meta, count.dtype, count.shape) == (True, torch.int64, ())
    weight = torch.empty(5, 4, 3, 2, device="meta", dtype=torch.bfloat16).permute(3, 2, 1, 0)
    masked = pp.apply_mask(weight, words)
    assert (masked.is_meta, masked.dtype, masked.stride()) == (True, weight.dtype, weight.stride())


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_without_recompiling_for_another_mask(backend: str) -> None:
    def function(weight: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        words = pp.pack_bits(mask)
        unpacked = pp.unpack_bits(words, mask.shape)
        return pp.apply_mask(weight * 2, words), unpacked, pp.count_bits(words)

    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    weight = torch.randn(33, 65, requires_grad=True)
    for _ in range(3):
        mask = random_mask(33, 65)
        masked, unpacked, count = compiled(weight, mask)
        assert torch.equal(masked, torch.where(mask, 2 * weight, 0.0))
        assert torch.equal(unpacked, mask)
        assert count == mask.sum()
        (grad,) = torch.autograd.grad(masked.sum(), weight)
        assert torch.equal(grad, 2 * mask.float())
    assert counter.frame_count == 1


# ---- errors

BOOL = torch.zeros(9, dtype=torch.bool)
WORDS = torch.zeros(2, dtype=torch.uint8)
SPARSE = torch.zeros(9).to_sparse()
ERRORS = [
    (lambda: pp.pack_bits([True]), TypeError, "pack_bits: mask must be a bool tensor, got list"),
    (lambda: pp.pack_bits(WORDS), TypeError, "pack_bits: mask must be a bool tensor, got uint8"),
    (lambda: pp.pack_bits(SPARSE.bool()), TypeError, "pack_bits: mask must be a dense tensor, got"),
    (lambda: pp.unpack_bits(BOOL, 9), TypeError, "unpack_bits: words must be a uint8 tensor, got"),
    (
        lambda: pp.unpack_bits(WORDS, 17),
        ValueError,
        "unpack_bits: words must have one bit for each of 17 entries, that is 3 bytes, got 2",
    ),
    (
        lambda: pp.unpack_bits(WORDS, (3, -3)),
        ValueError,
        "unpack_bits: shape must have no negative sizes, got (3, -3)",
    ),
    (
        lambda: pp.unpack_bits(WORDS, (3, 3.0)),
        TypeError,
        "unpack_bits: shape must be a number or a tuple of numbers, got (3, 3.0)",
    ),
    (
        lambda: pp.count_bits(WORDS.view(1, 2)),
        ValueError,
        "count_bits: words must be a contiguous 1-dim tensor, got shape (1, 2), strides (2, 1)",
    ),
    (
        lambda: pp.count_bits(torch.zeros(4, dtype=torch.uint8)[::2]),
        ValueError,
        "count_bits: words must be a contiguous 1-dim tensor, got shape (2,), strides (2,)",
    ),
    (
        lambda: pp.apply_mask(torch.zeros(17), WORDS),
        ValueError,
        "apply_mask: words must have one bit for each of 17 entries, that is 3 bytes, got 2",
    ),
    (
        lambda: pp.apply_mask(torch.zeros(9, dtype=torch.int32), WORDS),
        TypeError,
        "apply_mask: weight must be float32, float64, bfloat16 or float16, got int32",
    ),
    (
        lambda: pp.apply_mask(torch.zeros(9), BOOL),
        TypeError,
        "apply_mask: words must be a uint8 tensor, got bool",
    ),
    (
        lambda: pp.apply_mask(torch.zeros(9, device="meta"), WORDS),
        ValueError,
        "apply_mask: words must be on the device of weight, meta, got cpu",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), ERRORS, ids=lambda value: str(value)[:60])
def test_errors(call: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match="^" + re.escape(message)):
        call()


@pytest.mark.skipif(pp.cpu_capability() == "reference", reason="what the compiled kernels check")
@pytest.mark.parametrize(
    ("op", "args"),
    [
        ("pack_bits", (WORDS,)),
        ("unpack_bits", (WORDS, [17])),
        ("count_bits", (torch.zeros(4, dtype=torch.uint8)[::2],)),
        ("apply_mask", (torch.zeros(17), WORDS)),
        ("apply_mask", (torch.zeros(9), BOOL[:2])),
        ("apply_mask", (torch.zeros(9, dtype=torch.int32), WORDS)),
    ],
)
def test_the_raw_ops_refuse_what_they_would_misread(op: str, args: tuple[object, ...]) -> None:
    with pytest.raises(RuntimeError, match=f"{op}: (words|mask|tensors) must be"):
        getattr(torch.ops.ppkernels, op)(*args)
