"""Every op × every check. The ops and their inputs are the rows of `ppkernels.testing.SAMPLES`."""
# Longer than 350 lines: the point of it is that all checks of an op stand in one place.

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._dynamo
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import ppkernels as pp
from ppkernels.testing import (
    DTYPES,
    PRODUCTS,
    SAMPLES,
    SELECTIONS,
    SPARSE,
    STATISTICS,
    STEPS,
    Sample,
    check_sample,
    check_values,
    value_table,
)

OPS = tuple(SAMPLES)
# Ops on bits, which have neither exponents nor rounding: tests/ops/test_bitmask.py.
ON_BITS = {"apply_mask", "count_bits", "pack_bits", "unpack_bits"}
WITH_OUT = tuple(op for op in OPS if SAMPLES[op].has_out)
DIFFERENTIABLE = tuple(op for op in OPS if SAMPLES[op].gradients)
# An op whose gradient has a gradient.
TWICE = tuple(
    op for op in DIFFERENTIABLE if all(g in DIFFERENTIABLE for g in SAMPLES[op].gradients)
)

MASKED = tuple(op for op in OPS if SAMPLES[op].has_mask)


def each_way(ops: tuple[str, ...]) -> pytest.MarkDecorator:
    """Each of ``ops`` without a mask, and with one where it takes one."""
    ways = [pytest.param(op, False, id=op) for op in ops]
    ways += [pytest.param(op, True, id=f"{op} masked") for op in ops if op in MASKED]
    return pytest.mark.parametrize(("op", "masked"), ways)


each_op = pytest.mark.parametrize("op", OPS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
kernels_only = pytest.mark.skipif(
    pp.cpu_capability() == "reference",
    reason="no compiled kernels: PyTorch's own pow rounds differently from place to place",
)


def as_tensors(numbers: tuple[float, ...]) -> list[Tensor]:
    """Exponents in the form that the raw ops take."""
    return [torch.tensor(number, dtype=torch.float64) for number in numbers]


def ordinary_inputs(op: str, *shape: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Inputs of ``shape`` away from 0 and without special values, one for each input of ``op``."""
    magnitudes = [torch.rand(shape) + 0.5 for _ in value_columns(op)]
    return [(m * torch.randn(shape).sign()).to(dtype) for m in magnitudes]


def mask_for(masked: bool, *shape: int) -> dict[str, Tensor]:
    """The keyword argument for a mask of ``shape``, or none."""
    return {"words": pp.pack_bits(torch.rand(shape) < 0.6)} if masked else {}


def value_columns(op: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """The op's whole table of values, special ones first: one column for each tensor input."""
    return value_table(dtype, len(next(SAMPLES[op].samples(dtype, "cpu")).inputs))


def assert_same_bits(result: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(result, expected, rtol=0, atol=0, equal_nan=True)
    signs_differ = (result.signbit() != expected.signbit()) & ~result.isnan()
    assert not signs_differ.any(), f"signs of zeros differ at {signs_differ.nonzero().tolist()}"


# ---- values


@each_dtype
@pytest.mark.parametrize("op", [*OPS, *STEPS, *PRODUCTS, *SPARSE, *SELECTIONS, *STATISTICS])
def test_values(op: str, dtype: torch.dtype) -> None:
    check_values(op, dtypes=(dtype,))


@each_op
def test_values_on_the_reference_backend(op: str) -> None:
    with pp.backend("reference"):
        for sample in SAMPLES[op].samples(torch.float32, "cpu"):
            row, exponents = SAMPLES[op], as_tensors(sample.exponents)
            result = row.call(*sample.inputs, *sample.exponents, **sample.options)
            expected = row.reference(*sample.inputs, *exponents, **sample.options)
            assert_same_bits(result, expected)


@each_op
def test_a_float_and_a_tensor_as_exponent_give_the_same(op: str) -> None:
    row = SAMPLES[op]
    inputs = value_columns(op)
    for numbers in row.exponents:
        assert_same_bits(row.call(*inputs, *numbers), row.call(*inputs, *as_tensors(numbers)))


def test_new_memory_is_poisoned() -> None:
    like = torch.randn(1_000).view(10, 100).t()
    for tensor in (torch.empty(1_000), torch.empty_like(like), torch.empty_strided((9,), (2,))):
        assert tensor.isnan().all()


# ---- out=


def poisoned_out(sample: Sample) -> Iterator[tuple[str, Tensor]]:
    """Tensors to write into, full of NaN, each laid out in another way."""
    like = sample.inputs[-1]
    nan = torch.full_like(like, torch.nan)
    yield "as torch.empty_like", nan
    yield "contiguous", torch.full(like.shape, torch.nan, dtype=like.dtype)
    if like.dim() > 0:
        wide = torch.full((*like.shape, 3), torch.nan, dtype=like.dtype)
        yield "with gaps", wide[..., 1]
        reversed_dims = torch.full(like.shape[::-1], torch.nan, dtype=like.dtype)
        yield "reversed dimensions", reversed_dims.permute(*reversed(range(like.dim())))


@each_dtype
@pytest.mark.parametrize("op", WITH_OUT)
def test_out_is_written_everywhere(op: str, dtype: torch.dtype) -> None:
    row = SAMPLES[op]
    samples = [s for s in row.samples(dtype, "cpu") if s.exponents in row.exponents[1:5:3]]
    for sample in samples:
        expected = row.call(*sample.inputs, *sample.exponents, **sample.options)
        check_sample(op, sample, expected)
        for name, out in poisoned_out(sample):
            version = out._version
            written = row.call(*sample.inputs, *sample.exponents, **sample.options, out=out)
            assert written is out
            assert out._version > version, f"{name}: autograd was not told that out changed"
            if pp.cpu_capability() == "reference":
                torch.testing.assert_close(out, expected, equal_nan=True)
            else:
                assert_same_bits(out, expected)


@pytest.mark.parametrize("op", WITH_OUT)
def test_out_leaves_the_gaps_alone(op: str) -> None:
    wide = torch.full((50, 3), 7.0)
    SAMPLES[op].call(*ordinary_inputs(op, 50, dtype=torch.float32), 1.5, out=wide[:, 1])
    assert (wide[:, 0] == 7).all()
    assert (wide[:, 2] == 7).all()


@each_way(WITH_OUT)
def test_out_may_be_an_input(op: str, masked: bool) -> None:
    row, mask = SAMPLES[op], mask_for(masked, 4_099)
    for position in range(len(ordinary_inputs(op, 1))):
        inputs = ordinary_inputs(op, 4_099, dtype=torch.float32)
        expected = row.call(*inputs, 1.25, **mask)
        result = row.call(*inputs, 1.25, **mask, out=inputs[position])
        assert result is inputs[position]
        torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("shift", [1, 3, 64])
@each_way(WITH_OUT)
def test_out_may_overlap_an_input_partly(op: str, masked: bool, shift: int) -> None:
    row, mask = SAMPLES[op], mask_for(masked, 4_099)
    for position in range(len(ordinary_inputs(op, 1))):
        for forwards in (True, False):
            inputs = ordinary_inputs(op, 4_099, dtype=torch.float32)
            whole = torch.randn(4_099 + shift)
            first, second = whole[:4_099], whole[shift:]
            inputs[position], out = (first, second) if forwards else (second, first)
            expected = row.call(*inputs, 1.25, **mask)
            row.call(*inputs, 1.25, **mask, out=out)
            torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("offset", [0, 3])
@each_way(WITH_OUT)
def test_out_larger_than_any_cache(op: str, masked: bool, offset: int) -> None:
    # 9 Mi elements: kernels may write so much past the cache, in another loop.
    row = SAMPLES[op]
    part = ordinary_inputs(op, 1_021, dtype=torch.float32)
    inputs = [tensor.repeat(9_243)[offset:] for tensor in part]
    out = torch.full((9_243 * 1_021,), torch.nan)[offset:]
    mask = mask_for(masked, len(out))
    row.call(*inputs, 1.25, **mask, out=out)
    expected = row.call(*part, 1.25).repeat(9_243)[offset:]
    if masked:
        expected = pp.apply_mask(expected, **mask)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=0)


# ---- the same element gives the same bits


@kernels_only
@each_way(OPS)
def test_same_bits_for_any_number_of_threads(op: str, masked: bool) -> None:
    row, mask = SAMPLES[op], mask_for(masked, 200_003)
    inputs = [column.repeat(100)[:200_003] for column in value_columns(op)]
    for numbers in row.exponents:
        two = row.call(*inputs, *numbers, **mask)
        torch.set_num_threads(1)
        one = row.call(*inputs, *numbers, **mask)
        torch.set_num_threads(2)
        assert_same_bits(one, two)


@kernels_only
@each_dtype
@each_op
def test_same_bits_wherever_an_element_lies(op: str, dtype: torch.dtype) -> None:
    row = SAMPLES[op]
    inputs = [column[:131] for column in value_columns(op, dtype)]
    for numbers in row.exponents:
        whole = row.call(*inputs, *numbers)
        single = [row.call(*[x[i : i + 1] for x in inputs], *numbers) for i in range(131)]
        assert_same_bits(torch.cat(single), whole)
        for start, length in ((1, 130), (3, 63), (5, 33), (64, 67)):
            place = slice(start, start + length)
            assert_same_bits(row.call(*[x[place] for x in inputs], *numbers), whole[place])


@kernels_only
@each_dtype
@pytest.mark.parametrize("op", MASKED)
def test_a_mask_changes_no_bits_of_what_it_keeps(op: str, dtype: torch.dtype) -> None:
    row = SAMPLES[op]
    columns = value_columns(op, dtype)
    for numbers in row.exponents:
        for length in (1, 7, 8, 9, 33, 64, 131, len(columns[0])):
            inputs = [column[:length] for column in columns]
            mask = mask_for(True, length)
            expected = pp.apply_mask(row.call(*inputs, *numbers), **mask)
            assert_same_bits(row.call(*inputs, *numbers, **mask), expected)


# ---- gradients


@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_gradients_are_those_of_the_gradient_ops(op: str) -> None:
    # Whose values are compared with float64 in test_values.
    row = SAMPLES[op]
    for sample in row.samples(torch.float32, "cpu"):
        inputs = [tensor.detach().requires_grad_() for tensor in sample.inputs]
        result = row.call(*inputs, *sample.exponents, **sample.options)
        incoming = torch.randn_like(result)
        grads = torch.autograd.grad(result, inputs, incoming)
        for position, (gradient, grad) in enumerate(zip(row.gradients, grads, strict=True)):
            # Where an op is linear in an input, that input drops out of the gradient.
            rest = sample.inputs if gradient != op else sample.inputs[position + 1 :]
            call = SAMPLES[gradient].call
            expected = call(incoming, *rest, *sample.exponents, **sample.options)
            if pp.cpu_capability() == "reference":
                torch.testing.assert_close(grad, expected, equal_nan=True)
            else:
                assert_same_bits(grad, expected)


@pytest.mark.parametrize("alpha", [1.0, 1.25, 1.5, 2.0, 3.3, 8.0])
@each_way(DIFFERENTIABLE)
def test_gradcheck(op: str, masked: bool, alpha: float) -> None:
    inputs = [tensor.requires_grad_() for tensor in ordinary_inputs(op, 3, 4)]
    mask = mask_for(masked, 3, 4)

    def function(*args: Tensor) -> Tensor:
        return SAMPLES[op].call(*args, alpha, **mask)

    assert torch.autograd.gradcheck(function, inputs, check_batched_grad=True)
    if op in TWICE:
        assert torch.autograd.gradgradcheck(function, inputs, check_batched_grad=True)


@pytest.mark.parametrize("alpha", [1.0, 2.5, 3.0, 4.0])
def test_gradcheck_at_zero(alpha: float) -> None:
    weight = torch.tensor([0.0, -0.0, 0.3], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w: pp.power(w, alpha), [weight], atol=1e-4)
    if alpha != 2.5:
        assert torch.autograd.gradgradcheck(lambda w: pp.power(w, alpha), [weight], atol=1e-4)


@pytest.mark.parametrize("op", [op for op in OPS if op not in DIFFERENTIABLE])
def test_no_gradient_is_an_error(op: str) -> None:
    row = SAMPLES[op]
    inputs = ordinary_inputs(op, 5)
    inputs[-1].requires_grad_()
    with pytest.raises(RuntimeError, match=f"^{op}: this op has no gradient; call it under"):
        row.call(*inputs, *row.exponents[2])
    with torch.no_grad():
        assert not row.call(*inputs, *row.exponents[2]).requires_grad


# ---- the raw ops


def raw_calls(op: str, layout: Callable[[Tensor], Tensor]) -> Iterator[tuple[str, list[Tensor]]]:
    """Names under torch.ops.ppkernels and arguments."""
    inputs = [layout(tensor) for tensor in ordinary_inputs(op, 2, 3, 4, 5, dtype=torch.float32)]
    exponents = as_tensors(SAMPLES[op].exponents[2])
    for masked in (False, True) if op in MASKED else (False,):
        words = mask_for(masked, *inputs[-1].shape).values()
        yield op, [*inputs, *exponents, *words]
        if op in WITH_OUT:
            yield f"{op}_out", [*inputs, *exponents, torch.empty_like(inputs[-1]), *words]


RAW_LAYOUTS = {
    "contiguous": lambda tensor: tensor,
    "channels_last": lambda tensor: tensor.contiguous(memory_format=torch.channels_last),
    "step 2": lambda tensor: tensor[..., ::2],
    "empty": lambda tensor: tensor[:0],
    "expanded": lambda tensor: tensor[:1].expand(2, 3, 4, 5),
}


@pytest.mark.parametrize("layout", RAW_LAYOUTS)
@each_op
def test_opcheck(op: str, layout: str) -> None:
    for name, args in raw_calls(op, RAW_LAYOUTS[layout]):
        torch.library.opcheck(getattr(torch.ops.ppkernels, name).default, tuple(args))


@each_op
def test_meta_tensors_give_shape_dtype_and_strides(op: str) -> None:
    for sample in SAMPLES[op].samples(torch.bfloat16, "cpu"):
        if sample.exponents == SAMPLES[op].exponents[2]:
            inputs = [tensor.to("meta") for tensor in sample.inputs]
            options = {name: value.to("meta") for name, value in sample.options.items()}
            result = SAMPLES[op].call(*inputs, *sample.exponents, **options)
            like = torch.empty_like(inputs[-1])
            assert (result.shape, result.dtype) == (like.shape, like.dtype)
            assert result.stride() == like.stride()


# ---- torch.compile


@each_way(OPS)
def test_compile_without_recompiling_for_another_exponent(op: str, masked: bool) -> None:
    row = SAMPLES[op]
    inputs = ordinary_inputs(op, 6, 7, dtype=torch.float32)
    if op in DIFFERENTIABLE:
        inputs = [tensor.requires_grad_() for tensor in inputs]
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(row.call, fullgraph=True, backend=counter)
    for call, numbers in enumerate(row.exponents):
        exponents, mask = as_tensors(numbers), mask_for(masked, 6, 7)
        result = compiled(*inputs, *exponents, **mask)
        expected = row.call(*inputs, *exponents, **mask)
        torch.testing.assert_close(result, expected)
        if op in DIFFERENTIABLE:
            incoming = torch.randn(6, 7)
            grads = torch.autograd.grad(result, inputs, incoming)
            torch.testing.assert_close(grads, torch.autograd.grad(expected, inputs, incoming))
        if call == 0:
            # PyTorch itself traces some first calls twice.
            counter.frame_count = 0
    assert counter.frame_count == 0, f"compiled again, {counter.frame_count} times"


@each_way(WITH_OUT)
def test_compile_with_out(op: str, masked: bool) -> None:
    inputs, mask = ordinary_inputs(op, 6, 7, dtype=torch.float32), mask_for(masked, 6, 7)
    out = torch.full((6, 7), torch.nan)

    def function(alpha: Tensor) -> Tensor:
        SAMPLES[op].call(*inputs, alpha, **mask, out=out)
        return out + 1

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for alpha in as_tensors((1.25, 2.0, 3.7)):
        result = compiled(alpha)
        expected = SAMPLES[op].call(*inputs, alpha, **mask)
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(result, expected + 1)
        if alpha == 1.25:
            counter.frame_count = 0
    assert counter.frame_count == 0


def test_compile_with_inductor() -> None:
    def loss(weight: Tensor, alpha: Tensor) -> Tensor:
        return (pp.power(weight * 2, alpha) + 1).square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True)
    weight = torch.randn(33, 65, requires_grad=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for alpha in as_tensors((1.25, 2.0, 3.7)):
            grad = torch.autograd.grad(compiled(weight, alpha), weight)
            expected = torch.autograd.grad(loss(weight, alpha), weight)
            torch.testing.assert_close(grad, expected)


# ---- torch.func


@each_op
def test_vmap_over_the_inputs(op: str) -> None:
    row = SAMPLES[op]
    inputs = ordinary_inputs(op, 3, 4, 5)
    numbers = row.exponents[2]
    for dim in (0, 2):
        batched = torch.func.vmap(lambda *args: row.call(*args, *numbers), dim, dim)(*inputs)
        torch.testing.assert_close(batched, row.call(*inputs, *numbers))
    # One input alone has a batch dimension.
    in_dims = (None,) * (len(inputs) - 1) + (0,)
    shared = [tensor[0] for tensor in inputs[:-1]]
    batched = torch.func.vmap(lambda *args: row.call(*args, *numbers), in_dims)(*shared, inputs[-1])
    expected = row.call(*[tensor.expand(3, 4, 5) for tensor in shared], inputs[-1], *numbers)
    torch.testing.assert_close(batched, expected)


@each_way(DIFFERENTIABLE)
def test_func_grad_and_jacrev(op: str, masked: bool) -> None:
    row, mask = SAMPLES[op], mask_for(masked, 6)
    inputs = ordinary_inputs(op, 6)
    plain = [tensor.clone().requires_grad_() for tensor in inputs]
    positions = tuple(range(len(inputs)))

    def function(*args: Tensor) -> Tensor:
        return row.call(*args, 1.5, **mask)

    grads = torch.func.grad(lambda *args: function(*args).sum(), positions)(*inputs)
    expected = torch.autograd.grad(function(*plain).sum(), plain)
    torch.testing.assert_close(grads, expected)
    jacobians = torch.func.jacrev(function, positions)(*inputs)
    torch.testing.assert_close(jacobians, tuple(grad.diag() for grad in expected))


@pytest.mark.parametrize("op", TWICE)
def test_func_grad_of_grad(op: str) -> None:
    call = SAMPLES[op].call
    weight = ordinary_inputs(op, 6)[0]
    second = torch.func.grad(torch.func.grad(lambda x: call(x, 1.5)))
    result = torch.stack([second(x) for x in weight])
    torch.testing.assert_close(result, 1.5 * 0.5 * weight.sign() * weight.abs() ** -0.5)


def test_torch_func_inside_torch_compile() -> None:
    # The tracer would take the op for a constant: the graph breaks there, or full graphs fail.
    def gradient(weight: Tensor) -> Any:
        return torch.func.grad(lambda w: pp.power(w, 3.0).sum())(weight)

    weight = torch.rand(7)
    torch._dynamo.reset()
    result = torch.compile(gradient, backend="aot_eager")(weight)
    torch.testing.assert_close(result, 3 * weight.square())
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(gradient, backend="aot_eager", fullgraph=True)(weight)
    compiled = torch.compile(lambda w: pp.power(w, 3.0).sum(), backend="aot_eager")
    torch.testing.assert_close(torch.func.grad(compiled)(weight), 3 * weight.square())


@pytest.mark.parametrize("op", MASKED)
def test_vmap_under_masks(op: str) -> None:
    row, inputs = SAMPLES[op], ordinary_inputs(op, 3, 4, 5)
    numbers = row.exponents[2]

    def call(words: Tensor, *args: Tensor) -> Tensor:
        return row.call(*args, *numbers, words=words)

    each = [tuple(tensor[i] for tensor in inputs) for i in range(3)]
    one = mask_for(True, 4, 5)["words"]
    in_dims = (None,) + (0,) * len(inputs)
    batched = torch.func.vmap(call, in_dims)(one, *inputs)
    assert_same_bits(batched, torch.stack([call(one, *args) for args in each]))
    words = torch.stack([mask_for(True, 4, 5)["words"] for _ in range(3)])
    expected = torch.stack([call(mask, *args) for mask, args in zip(words, each, strict=True)])
    for dim in (0, 1):
        in_dims = (dim,) + (0,) * len(inputs)
        batched = torch.func.vmap(call, in_dims)(words.movedim(0, dim), *inputs)
        assert_same_bits(batched, expected)
    expected = torch.stack([call(mask, *each[0]) for mask in words])
    batched = torch.func.vmap(call, (0,) + (None,) * len(inputs))(words, *each[0])
    assert_same_bits(batched, expected)


@each_op
def test_vmap_over_an_exponent_is_an_error(op: str) -> None:
    row = SAMPLES[op]
    inputs = ordinary_inputs(op, 5)
    exponents = [tensor.expand(3) for tensor in as_tensors(row.exponents[2])]
    in_dims = (None,) * len(inputs) + (0,) * len(exponents)
    with pytest.raises(RuntimeError, match="the exponent cannot be batched"):
        torch.func.vmap(row.call, in_dims)(*inputs, *exponents)


# torch.func.jvp warns, on its first call, about another part of PyTorch.
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated")
@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_forward_mode_is_an_error(op: str) -> None:
    inputs = tuple(ordinary_inputs(op, 5))
    function = SAMPLES[op].call
    with pytest.raises((RuntimeError, NotImplementedError), match=r"forward|jvp"):
        torch.func.jvp(lambda *args: function(*args, 1.5), inputs, inputs)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(tensor, tensor) for tensor in inputs]
        with pytest.raises((RuntimeError, NotImplementedError), match=r"forward|jvp"):
            function(*duals, 1.5)


# ---- the table itself


def test_every_public_op_has_a_row() -> None:
    public = {name for name, member in vars(pp.ops).items() if inspect.isfunction(member)}
    missing = public - ON_BITS - {*SAMPLES, *STEPS, *PRODUCTS, *SPARSE, *SELECTIONS, *STATISTICS}
    assert not missing, f"no samples for {sorted(missing)}"
