"""The contract of every op, on a GPU: values, gradients, opcheck, memory that is not aligned."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch._dynamo
from torch import Tensor

import ppkernels as pp
from ppkernels.testing import DTYPES, PRODUCTS, SAMPLES, SELECTIONS, STATISTICS, STEPS, check_values

pytestmark = pytest.mark.gpu

DIFFERENTIABLE = [op for op in SAMPLES if SAMPLES[op].gradients]
each_op = pytest.mark.parametrize("op", SAMPLES)


def inputs_of(op: str, *shape: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Inputs away from 0, on the GPU."""
    count = len(next(SAMPLES[op].samples(dtype, "cpu")).inputs)
    drawn = [(torch.rand(shape) + 0.5) * torch.randn(shape).sign() for _ in range(count)]
    return [tensor.to("cuda", dtype) for tensor in drawn]


def exponents_of(op: str, device: str) -> list[Tensor]:
    numbers = SAMPLES[op].exponents[2]
    return [torch.tensor(number, dtype=torch.float64, device=device) for number in numbers]


each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])


@each_dtype
@pytest.mark.parametrize("op", [*SAMPLES, *STEPS, *PRODUCTS, *SELECTIONS, *STATISTICS])
def test_values(op: str, dtype: torch.dtype) -> None:
    check_values(op, "cuda", (dtype,))


@pytest.mark.parametrize("alpha_on", ["cpu", "cuda"])
@each_op
def test_opcheck(op: str, alpha_on: str) -> None:
    arguments = [*inputs_of(op, 2, 3, 4, 5), *exponents_of(op, alpha_on)]
    torch.library.opcheck(getattr(torch.ops.ppkernels, op).default, tuple(arguments))


@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_gradcheck(op: str) -> None:
    inputs = [tensor.requires_grad_() for tensor in inputs_of(op, 3, 4, dtype=torch.float64)]
    assert torch.autograd.gradcheck(lambda *args: SAMPLES[op].call(*args, 1.5), inputs)


@each_op
def test_the_cpu_gives_the_same(op: str) -> None:
    inputs, (on_cpu, on_gpu) = inputs_of(op, 1_003), (exponents_of(op, d) for d in ("cpu", "cuda"))
    expected = SAMPLES[op].call(*[tensor.cpu() for tensor in inputs], *on_cpu)
    for exponents in (on_cpu, on_gpu):
        result = SAMPLES[op].call(*inputs, *exponents)
        torch.testing.assert_close(result.cpu(), expected)


@each_op
def test_views_that_are_not_aligned(op: str) -> None:
    for dtype in DTYPES:
        memory = inputs_of(op, 5_000, dtype=dtype)
        for start in (1, 3):
            inputs = [tensor[start : start + 4_099] for tensor in memory]
            aligned = [tensor.clone() for tensor in inputs]
            exponents = SAMPLES[op].exponents[2]
            result = SAMPLES[op].call(*inputs, *exponents)
            assert torch.equal(result, SAMPLES[op].call(*aligned, *exponents))


@each_op
def test_compile_without_recompiling_for_another_exponent(op: str) -> None:
    row = SAMPLES[op]
    inputs = inputs_of(op, 6, 7)
    torch._dynamo.reset()
    compiled = torch.compile(row.call, fullgraph=True, backend="aot_eager")
    for call, numbers in enumerate(row.exponents):
        exponents = [torch.tensor(n, dtype=torch.float64, device="cuda") for n in numbers]
        with torch._dynamo.config.patch(error_on_recompile=call > 0):
            result = compiled(*inputs, *exponents)
        torch.testing.assert_close(result, row.call(*inputs, *exponents))


# ---- masks


def test_masks_are_those_of_the_cpu() -> None:
    mask = torch.rand(67, 129) < 0.4
    words = pp.pack_bits(mask)
    assert torch.equal(pp.pack_bits(mask.cuda()).cpu(), words)
    assert torch.equal(pp.unpack_bits(words.cuda(), mask.shape).cpu(), mask)
    assert pp.count_bits(words.cuda()).item() == mask.sum()
    weight = torch.randn(67, 129)
    for layout in (lambda t: t, lambda t: t.t().contiguous().t()):
        masked = pp.apply_mask(layout(weight).cuda(), words.cuda())
        assert torch.equal(masked.cpu(), weight * mask)


# ---- selection and statistics


@pytest.mark.parametrize("alphas", [None, [1.5, 1.5, None]], ids=["one alpha", "several"])
@each_dtype
def test_selected_are_those_of_the_cpu(
    dtype: torch.dtype, alphas: list[float | None] | None
) -> None:
    tensors = [torch.randn(shape).to(dtype) for shape in ((300, 70), (5_000,), (4, 3, 5))]
    tensors[1][::2] = 0.5  # ties
    tensors[0] = tensors[0].t()
    within = [pp.BitMask.pack(torch.rand(t.shape) < 0.7) for t in tensors]
    on_gpu = [tensor.cuda() for tensor in tensors]
    for options in ({"k": 4_321}, {"share": [0.1, 0.5, 1.0]}, {"k": 6_000, "within": within}):
        expected = pp.topk_mask(tensors, alpha=alphas, **options)
        if "within" in options:
            options = {**options, "within": [mask.to("cuda") for mask in within]}
        for found, mask in zip(
            pp.topk_mask(on_gpu, alpha=alphas, **options), expected, strict=True
        ):
            assert torch.equal(found.words.cpu(), mask.words)
    on_gpu[2][1, 2, 3] = torch.nan
    with pytest.raises(ValueError, match=r"NaN in tensors\[2\]"):
        pp.topk_mask(on_gpu, 10, alphas)


@each_dtype
def test_statistics_are_those_of_the_cpu(dtype: torch.dtype) -> None:
    weight, mask = torch.randn(300, 70).to(dtype), pp.BitMask.pack(torch.rand(300, 70) < 0.7)
    options = {"bins": 600, "range": (-2.0, 2.0)}
    for within, there in ((None, None), (mask, mask.to("cuda"))):
        expected = pp.statistics(weight, (0.01, 1.0), within=within, **options)
        found = pp.statistics(weight.cuda(), (0.01, 1.0), within=there, **options)
        assert (found.count, found.below) == (expected.count, expected.below)
        assert found.histogram == expected.histogram
        assert (found.min, found.max) == (expected.min, expected.max)
        assert found.sum == pytest.approx(expected.sum, abs=1e-12 * expected.sum_abs)
        assert found.sum_abs == pytest.approx(expected.sum_abs, rel=1e-12)
        assert found.sum_square == pytest.approx(expected.sum_square, rel=1e-12)
        again = pp.statistics(weight.cuda(), (0.01, 1.0), within=there, **options)
        assert again == found
    powered = pp.statistics(weight, (0.01,), 1.5), pp.statistics(weight.cuda(), (0.01,), 1.5)
    assert powered[1].sum_abs == pytest.approx(powered[0].sum_abs, rel=1e-3)
    weight[7, 7] = torch.nan
    with pytest.raises(ValueError, match="NaN in tensor"):
        pp.statistics(weight.cuda())


# ---- streams and devices


def calls(device: str) -> list[Callable[[Tensor], Tensor]]:
    """Forward, backward, mask, step, selection and statistics as functions of a weight."""
    alpha = torch.tensor(1.5, dtype=torch.float64, device=device)
    words = torch.full((2**15,), 0b10110101, dtype=torch.uint8, device=device)

    def step(weight: Tensor) -> Tensor:
        stepped = weight.clone()
        pp.sgd_step_([stepped], [weight], masks=[words], alphas=[alpha], lr=0.1)
        return stepped

    def select(weight: Tensor) -> Tensor:
        kept = torch.empty_like(words)
        torch.ops.ppkernels.topk_bits_([kept], [weight], [1_000], [1.0], [words])
        return kept

    def measure(weight: Tensor) -> Tensor:
        moments, _ = torch.ops.ppkernels.statistics(weight, alpha, [0.5], 10, 0.0, 1.0, words)
        return moments

    return [
        lambda weight: pp.power(weight, alpha),
        lambda weight: pp.power_backward(weight, weight, alpha),
        lambda weight: pp.apply_mask(weight, words),
        step,
        select,
        measure,
    ]


def test_work_goes_to_the_current_stream() -> None:
    """On another stream it would be done before the weight has its value, and would not wait."""
    values = torch.rand(2**18, device="cuda") + 0.5
    stream = torch.cuda.Stream()
    for call in calls("cuda"):
        expected = call(values)
        weight = torch.ones_like(values)
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(100_000_000)
            weight.copy_(values)
            result = call(weight)
            assert not stream.query(), "the host has waited"
        stream.synchronize()
        assert torch.equal(result, expected)


def test_steps_on_two_streams_by_turns() -> None:
    """Each stream has its tables; what one has let go must not be overwritten under the other."""
    weight, grad = torch.rand(1_000_003, device="cuda"), torch.rand(1_000_003, device="cuda")
    expected = weight.cpu()
    for _ in range(20):
        pp.sgd_step_([expected], [grad.cpu()], alphas=[1.5], lr=0.01)
    alpha = torch.tensor(1.5, dtype=torch.float64, device="cuda")
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    for i in range(20):
        streams[i % 2].wait_stream(streams[1 - i % 2])
        with torch.cuda.stream(streams[i % 2]):
            pp.sgd_step_([weight], [grad], alphas=[alpha], lr=0.01)
    torch.cuda.synchronize()
    torch.testing.assert_close(weight.cpu(), expected)


def test_another_device_than_the_current_one() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    weight = torch.rand(2**18, device="cuda:1") + 0.5
    for call in calls("cuda:1"):
        with torch.cuda.device(0):
            result = call(weight)
        assert result.device == torch.device("cuda:1")
        with torch.cuda.device(1):
            assert torch.equal(result, call(weight))
