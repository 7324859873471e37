"""The ops `spmm` and `sparse_conv2d` and their gradients: what holds for both alike.
Longer than 350 lines: every check of a linear layer is one of a convolution, so they share a file.

Values are compared with exact ones in tests/test_contract.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad

import ppkernels as pp
from ppkernels.testing_sparse import (
    CONVOLUTION,
    LINEAR,
    SPARSE,
    SparseCall,
    SparseCase,
    channels_last,
    check_sparse_call,
    constant,
    exact_result,
    has_kernel,
    share,
    sparse_call,
    transposed,
    unaligned,
    with_gaps,
)

FLOAT = (torch.float32, torch.float32)
DTYPES = {
    "float32": FLOAT,
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "bfloat16 beside float32": (torch.bfloat16, torch.float32),
    "float32 beside bfloat16": (torch.float32, torch.bfloat16),
    "float16 beside float32": (torch.float16, torch.float32),
    "float64": (torch.float64, torch.float64),
}
LAYERS = {
    "spmm": SparseCase("", (4, 7), (3, 2), bias=torch.float32),
    "sparse_conv2d": SparseCase(
        "", (4, 3, 3, 2), (2, 5, 4), bias=torch.float32, stride=(2, 1), padding=(1, 2)
    ),
}
# More entries and more places than one thread is given.
LARGER = {
    "spmm": SparseCase("", (300, 400), (133,), share(0.1), bias=torch.float32),
    "sparse_conv2d": SparseCase(
        "", (40, 33, 3, 3), (5, 14, 14), share(0.1), bias=torch.float32, padding=(1, 1)
    ),
}

each_layer = pytest.mark.parametrize("layer", LAYERS)
each_op = pytest.mark.parametrize("op", SPARSE)
each_dtype = pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)

Layer = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def layer_of(op: str) -> str:
    return "spmm" if op in LINEAR else "sparse_conv2d"


def call_for(layer: str, *dtypes: torch.dtype, **changes: object) -> SparseCall:
    dtypes = dtypes or FLOAT
    case = replace(LAYERS[layer], bias=dtypes[1])
    return sparse_call(replace(case, **changes), *dtypes)


def sparse_layer(layer: str, call: SparseCall) -> Layer:
    """``f(x, values, bias)``."""
    moves = call.case.moves if call.case.is_convolution else ()
    return lambda x, values, bias: getattr(pp, layer)(x, values, call.topology, bias, *moves)


def dense_layer(call: SparseCall) -> Layer:
    """The same by PyTorch's own layer."""
    mask, places = call.topology.mask().unpack(), call.topology.places()

    def layer(x: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
        theta = torch.zeros(mask.numel(), dtype=values.dtype).index_put((places,), values)
        if call.case.is_convolution:
            return F.conv2d(x, theta.view(mask.shape), bias, *call.case.moves)
        return F.linear(x, theta.view(mask.shape), bias)

    return layer


def trained(call: SparseCall) -> list[Tensor]:
    """Input, values and bias, that ask for gradients."""
    inputs = (call.input, call.values, call.bias)
    return [tensor.detach().clone().requires_grad_() for tensor in inputs]


def assert_same_bits(result: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(result, expected, rtol=0, atol=0, equal_nan=True)


# ---- the rule


@each_op
def test_the_rule_refuses_what_it_should(op: str) -> None:
    call = call_for(layer_of(op))
    right, magnitude = exact_result(call, op)
    check_sparse_call(call, op, right.float())
    wrong = [right + 1e-5 * magnitude, right.roll(1), torch.full_like(right, torch.nan)]
    for each in wrong:
        with pytest.raises(AssertionError, match="elements fail"):
            check_sparse_call(call, op, each.float())
    with pytest.raises(AssertionError, match="wanted"):
        check_sparse_call(call, op, right)
    with pytest.raises(AssertionError, match="wanted"):
        check_sparse_call(call, op, right[1:].float())
    if right.dim() > 1:
        with pytest.raises(AssertionError, match="strides"):
            check_sparse_call(call, op, right.float().mT.contiguous().mT)


@each_op
def test_the_rule_for_entries_that_are_not_kept(op: str) -> None:
    case = replace(LAYERS[layer_of(op)], special=True, bias=None)
    call = sparse_call(case, *FLOAT)
    check_sparse_call(call, op, exact_result(call, op)[0].float())
    if has_kernel(op, call) and not op.endswith("grad_values"):
        with pytest.raises(AssertionError, match="got nan"):
            check_sparse_call(call, op, call.plain(op))


# ---- gradients


@pytest.mark.parametrize("backend", ["kernels", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@each_layer
def test_equals_the_dense_layer(layer: str, dtype: torch.dtype, backend: str) -> None:
    call = call_for(layer, dtype, dtype)
    inputs = trained(call)
    with pp.backend(backend):
        out = sparse_layer(layer, call)(*inputs)
        grads = torch.autograd.grad(out.square().sum(), inputs)
    expected = dense_layer(call)(*inputs)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(grads, torch.autograd.grad(expected.square().sum(), inputs))
    assert out.is_contiguous()


@each_dtype
@each_layer
def test_gradients_are_those_of_the_gradient_ops(layer: str, dtypes: tuple) -> None:
    call = call_for(layer, *dtypes)
    inputs = trained(call)
    grads = torch.autograd.grad(sparse_layer(layer, call)(*inputs), inputs, call.grad_output)
    assert_same_bits(grads[0], call.run(f"{layer}_grad_input"))
    assert_same_bits(grads[1], call.run(f"{layer}_grad_values"))
    dims = tuple(i for i in range(call.grad_output.dim()) if i != (1 if "conv" in layer else 2))
    exact = call.grad_output.double().sum(dims)
    rounding = torch.finfo(dtypes[1]).eps * exact.abs() + 1e-6 * call.grad_output.abs().max()
    assert grads[2].dtype == dtypes[1]
    assert ((grads[2].double() - exact).abs() <= rounding).all()


@pytest.mark.parametrize("pattern", [share(0.0), share(0.3), share(1.0)], ids=["none", "", "all"])
@each_layer
def test_gradcheck(layer: str, pattern) -> None:
    call = call_for(layer, torch.float64, torch.float64, pattern=pattern)
    function, inputs = sparse_layer(layer, call), tuple(trained(call))
    assert torch.autograd.gradcheck(function, inputs, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(function, inputs, check_batched_grad=True)


@each_dtype
@each_layer
def test_double_backward_is_that_of_float64(layer: str, dtypes: tuple) -> None:
    call = call_for(layer, *dtypes)

    def penalty(inputs: list[Tensor], function: Layer) -> list[Tensor]:
        out = function(*inputs)
        grads = torch.autograd.grad(out.double().square().sum(), inputs, create_graph=True)
        norm = sum(grad.double().square().sum() for grad in grads)
        return [out, *grads, *torch.autograd.grad(norm, inputs)]

    inputs = trained(call)
    found = penalty(inputs, sparse_layer(layer, call))
    wide = [tensor.detach().double().requires_grad_() for tensor in inputs]
    exact = penalty(wide, dense_layer(call))
    own = [found[0].dtype, *[tensor.dtype for tensor in (*inputs, *inputs)]]
    assert [tensor.dtype for tensor in found] == own
    # y and the gradients are rounded to half types on the way, some times over.
    share_of_largest = 16 * max(torch.finfo(dtype).eps for dtype in dtypes)
    for mine, theirs in zip(found, exact, strict=True):
        assert (mine.double() - theirs).abs().max() <= share_of_largest * theirs.abs().max()


@each_layer
def test_the_gradient_of_values_may_be_larger_than_a_half_type_holds(layer: str) -> None:
    call = call_for(layer, torch.float16, torch.float32)
    x, g = torch.full_like(call.input, 300), torch.full_like(call.grad_output, 300)
    for create_graph in (False, True):
        values = call.values.clone().requires_grad_()
        out = sparse_layer(layer, call)(x, values, None)
        (grad,) = torch.autograd.grad(out, values, g, create_graph=create_graph)
        assert grad.isfinite().all()
        assert grad.max() > 2 * 300**2


def test_the_gradient_of_a_half_bias_is_rounded_once() -> None:
    # 4096 ones in float16: added up one by one they stop at 2048.
    x, topology = torch.randn(4097, 2), pp.Topology.of(torch.ones(1, 2))
    bias = torch.zeros(1, dtype=torch.bfloat16, requires_grad=True)
    pp.spmm(x, torch.ones(2), topology, bias).backward(torch.full((4097, 1), 1.001))
    assert bias.grad.dtype == torch.bfloat16
    assert bias.grad.item() == torch.tensor(4097 * 1.001).bfloat16().item()


WHICH = [which for count in (1, 2, 3) for which in itertools.combinations(range(3), count)]


@pytest.mark.parametrize("which", WHICH, ids=str)
@each_layer
def test_only_some_inputs_need_gradients(layer: str, which: tuple[int, ...]) -> None:
    call = call_for(layer)
    inputs = trained(call)
    out = sparse_layer(layer, call)(*inputs)
    expected = torch.autograd.grad(out, inputs, call.grad_output)
    inputs = [tensor.detach().requires_grad_(i in which) for i, tensor in enumerate(inputs)]
    call = replace(call, topology=call.case.topology.__deepcopy__({}))
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = sparse_layer(layer, call)(*inputs)
    out.backward(call.grad_output)
    for i, tensor in enumerate(inputs):
        assert (tensor.grad is not None) == (i in which)
        if i in which:
            assert_same_bits(tensor.grad, expected[i])
    # Only what gradients need is kept, and only who needs it has the indices of the transpose made.
    kept = {tensor.data_ptr() for tensor in saved if tensor.is_floating_point()}
    needed = {inputs[0].data_ptr()} if 1 in which else set()
    needed |= {inputs[1].data_ptr()} if 0 in which else set()
    assert kept == needed
    own = sum(index.nbytes for index in (call.topology.offsets, call.topology.columns))
    assert (call.topology.nbytes > own) == (0 in which)


@each_layer
def test_values_may_change_where_no_gradient_needs_them(layer: str) -> None:
    # As weights of a first layer may, between the forward passes and backward passes of two losses.
    call = call_for(layer)
    x, values, bias = trained(call)
    out = sparse_layer(layer, call)(call.input, values, bias)
    expected = torch.autograd.grad(out, values, call.grad_output, retain_graph=True)[0]
    with torch.no_grad():
        values.add_(1)
    assert_same_bits(torch.autograd.grad(out, values, call.grad_output)[0], expected)
    out = sparse_layer(layer, call)(x, values, bias)
    with torch.no_grad():
        values.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward(call.grad_output)


# The first dual tensor of a process warns about another part of PyTorch.
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated")
@pytest.mark.parametrize("place", [0, 1, 2], ids=["input", "values", "bias"])
@each_layer
def test_forward_mode_is_an_error(layer: str, place: int) -> None:
    call = call_for(layer)
    inputs = [call.input, call.values, call.bias]
    with forward_ad.dual_level():
        inputs[place] = forward_ad.make_dual(inputs[place], torch.ones_like(inputs[place]))
        with pytest.raises(NotImplementedError, match="jvp"):
            sparse_layer(layer, call)(*inputs)


@each_layer
def test_no_gradients_are_asked_for(layer: str) -> None:
    call = call_for(layer)
    expected = sparse_layer(layer, call)(call.input, call.values, call.bias)
    assert not expected.requires_grad
    for mode in (torch.no_grad, torch.inference_mode):
        call = replace(call, topology=call.case.topology.__deepcopy__({}))
        before = call.topology.nbytes
        with mode():
            out = sparse_layer(layer, call)(*trained(call))
        assert not out.requires_grad
        assert_same_bits(out, expected)
        assert call.topology.nbytes == before


@each_layer
def test_the_expanded_gradient_of_a_sum(layer: str) -> None:
    call = call_for(layer)
    inputs = trained(call)
    out = sparse_layer(layer, call)(*inputs)
    ones = torch.ones_like(out)
    expected = torch.autograd.grad(out, inputs, ones, retain_graph=True)
    for grad, other in zip(torch.autograd.grad(out.sum(), inputs), expected, strict=True):
        torch.testing.assert_close(grad, other)
    same = replace(call, grad_output=ones[(slice(0, 1),) * ones.dim()].expand_as(ones))
    for op in (f"{layer}_grad_input", f"{layer}_grad_values"):
        assert_same_bits(same.run(op), replace(call, grad_output=ones).run(op))


@pytest.mark.parametrize("place", [0, -1])
@each_layer
def test_a_nan_among_the_values_stays_in_its_row(layer: str, place: int) -> None:
    call = call_for(layer)
    call.values[place] = torch.nan
    rows = call.topology.places() // call.topology.in_features
    out = call.run(layer).movedim(1 if "conv" in layer else -1, 0).flatten(1)
    has_nan = out.isnan().any(1)
    assert has_nan.nonzero().flatten().tolist() == [rows[place].item()]


# ---- whatever lies around


@each_dtype
@each_op
def test_arguments_stay_as_they_are(op: str, dtypes: tuple) -> None:
    call = call_for(layer_of(op), *dtypes)
    tensors = [tensor for tensor in call.raw(op) if isinstance(tensor, Tensor)]
    before = [tensor.clone() for tensor in tensors]
    result = call.run(op)
    assert result.data_ptr() not in {tensor.data_ptr() for tensor in tensors}
    for tensor, copy in zip(tensors, before, strict=True):
        assert torch.equal(tensor, copy)


@each_dtype
@each_op
def test_same_bits_for_any_number_of_threads(op: str, dtypes: tuple) -> None:
    call = sparse_call(LARGER[layer_of(op)], *dtypes)
    if not has_kernel(op, call):
        pytest.skip("PyTorch's own products round differently on one thread")
    two = call.run(op)
    for threads in (1, 3, 7):
        torch.set_num_threads(threads)
        assert_same_bits(call.run(op), two)


@each_dtype
@each_op
def test_nothing_of_an_earlier_call_remains(op: str, dtypes: tuple) -> None:
    """Memory that is kept from call to call may hold NaN beside what is used of it."""
    layer = layer_of(op)
    before = sparse_call(LARGER[layer], *dtypes)
    nans = [
        torch.full_like(t, torch.nan) for t in (before.values, before.input, before.grad_output)
    ]
    before = replace(before, values=nans[0], input=nans[1], grad_output=nans[2])
    for batch in (1, 2, 3, 5, 9, 33):
        call = call_for(layer, *dtypes, batch=(batch, *LAYERS[layer].batch[1:]))
        before.run(op)
        check_sparse_call(call, op, call.run(op))


@each_layer
def test_two_python_threads_at_the_same_time(layer: str) -> None:
    call = sparse_call(LARGER[layer], *FLOAT)

    def step(topology: pp.Topology) -> list[Tensor]:
        inputs = trained(call)
        out = sparse_layer(layer, replace(call, topology=topology))(*inputs)
        return [out, *torch.autograd.grad(out, inputs, call.grad_output)]

    expected = step(call.topology)
    for _ in range(3):
        # Whose transposed indices both threads want first.
        fresh = call.topology.__deepcopy__({})
        with ThreadPoolExecutor(2) as threads:
            for result in threads.map(step, [fresh] * 4):
                torch.testing.assert_close(result, expected)


@each_dtype
@each_op
def test_the_reference_backend(op: str, dtypes: tuple) -> None:
    call = call_for(layer_of(op), *dtypes)
    with pp.backend("reference"):
        assert_same_bits(call.run(op), call.plain(op))


@each_dtype
@each_op
def test_meta_tensors_give_shape_and_dtype(op: str, dtypes: tuple) -> None:
    call = call_for(layer_of(op), *dtypes)
    expected, meta = call.run(op), sparse_call(call.case, *dtypes, "meta")
    result = meta.run(op)
    assert result.is_meta
    assert (result.shape, result.dtype) == (expected.shape, expected.dtype)
    assert result.stride() == expected.stride()


# ---- the raw ops


def raw(op: str, args: list) -> Tensor:
    return getattr(torch.ops.ppkernels, op).default(*args)


LAYOUTS = (transposed, with_gaps, unaligned, constant)


@pytest.mark.parametrize(
    ("op", "layout"),
    [*itertools.product(SPARSE, LAYOUTS), *itertools.product(CONVOLUTION, [channels_last])],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_opcheck(op: str, layout) -> None:
    for dtypes in ("float32", "bfloat16", "bfloat16 beside float32"):
        call = call_for(layer_of(op), *DTYPES[dtypes], layout=layout)
        torch.library.opcheck(getattr(torch.ops.ppkernels, op).default, tuple(call.raw(op)))
    batch = (0, 5, 4) if call.case.is_convolution else (0,)
    empty = sparse_call(replace(call.case, batch=batch), *FLOAT)
    torch.library.opcheck(getattr(torch.ops.ppkernels, op).default, tuple(empty.raw(op)))


def wrong_tensors(tensor: Tensor, operand: bool) -> Iterator[tuple[str, object]]:
    """``tensor`` in other shapes and dtypes. That indices are in range is for `Topology` to say."""
    for dtype in (torch.int64, torch.int32, torch.uint8, torch.float64, torch.float16):
        if dtype != tensor.dtype:
            yield f"in {dtype}", tensor.to(dtype)
    yield "sparse", tensor.long().to_sparse()
    yield "without dimensions", tensor.flatten()[0]
    yield "None", None
    if not operand:
        wide = tensor.long() if not tensor.is_floating_point() else tensor
        yield "one less", tensor[:-1]
        yield "one more", torch.cat([wide, wide[-1:]]).to(tensor.dtype)
        yield "none", tensor[:0]
        yield "one dimension more", tensor.unsqueeze(0)


def wrong_numbers(numbers: list[int]) -> Iterator[tuple[str, object]]:
    for each in ([], numbers[:1], [*numbers, 1], [0, 0], [-1, 1], [1, -1], [-3, -3]):
        if each != numbers:
            yield str(each), each


def wrong_calls(op: str) -> Iterator[tuple[str, list]]:
    call = call_for(layer_of(op))
    args = call.raw(op)
    for position, arg in enumerate(args):
        operand = any(arg is each for each in (call.input, call.grad_output))
        changes = wrong_tensors(arg, operand) if isinstance(arg, Tensor) else wrong_numbers(arg)
        for what, changed in changes:
            yield f"argument {position} {what}", [*args[:position], changed, *args[position + 1 :]]
    if op.endswith("grad_values"):
        yield "gradient of another batch", [args[0][1:], *args[1:]]
        yield "gradient of another weight", [args[0].narrow(-1, 0, 3), *args[1:]]
    if op in LINEAR:
        return
    yield "images of three dimensions", [args[0][0], *args[1:]]
    yield "images of five dimensions", [args[0][None], *args[1:]]
    yield "a larger kernel", [*args[:-4], [4, 2], *args[-3:]]
    yield "a kernel larger than the image", [*args[:-4], [30, 20], *args[-3:]]
    yield "another dilation", [*args[:-1], [2, 2]]
    yield "a dilation past the image", [*args[:-1], [100, 100]]
    if op == "sparse_conv2d_grad_input":
        yield "another size", [*args[:5], [50, 50], *args[6:]]


@each_op
def test_raw_ops_refuse_what_does_not_go_together(op: str) -> None:
    """Or they agree with the reference; nothing is read or written past its end."""
    refused = 0
    for what, args in wrong_calls(op):
        try:
            result = raw(op, args)
        except Exception:  # whatever the reference or the dispatcher says
            refused += 1
            continue
        expected = getattr(pp.reference, op)(*args)
        assert result.shape == expected.shape, what
        torch.testing.assert_close(result, expected, msg=lambda text, what=what: f"{what}: {text}")
    assert refused > 20


@pytest.mark.skipif(pp.cpu_capability() == "reference", reason="what the compiled kernels check")
@each_op
def test_raw_ops_take_indices_of_the_dtype_that_goes_with_the_sizes(op: str) -> None:
    args = call_for(layer_of(op)).raw(op)
    (place,) = (i for i, arg in enumerate(args) if getattr(arg, "dtype", None) == torch.uint16)
    name = "rows" if op.endswith("grad_input") else "columns"
    args[place] = args[place].int()
    with pytest.raises(RuntimeError, match=f"^{op}: {name} must be .* tensor of UInt16, got .*Int"):
        raw(op, args)


# ---- under PyTorch's transforms


@each_layer
def test_compiled_without_a_graph_break(layer: str) -> None:
    call = call_for(layer)
    function = sparse_layer(layer, call)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, backend=counter, dynamic=True)
    # Not the number of channels at first: the tracer would take the two for one.
    for batch in (6, 7, 9, 20):
        changed = (batch, *call.case.batch[1:])
        inputs = trained(call_for(layer, batch=changed))
        out, expected = compiled(*inputs), function(*inputs)
        torch.testing.assert_close(out, expected)
        ours = torch.autograd.grad(out.square().sum(), inputs)
        torch.testing.assert_close(ours, torch.autograd.grad(expected.square().sum(), inputs))
    assert counter.frame_count == 1, "compiled again for another batch"


@each_layer
def test_the_reference_is_compiled(layer: str) -> None:
    call = call_for(layer, torch.float64, torch.float64)
    inputs, function = trained(call), sparse_layer(layer, call)
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    out, expected = compiled(*inputs), function(*inputs)
    torch.testing.assert_close(out, expected)
    ours = torch.autograd.grad(out.sum(), inputs)
    torch.testing.assert_close(ours, torch.autograd.grad(expected.sum(), inputs))


@each_layer
def test_compiled_for_one_topology_after_another(layer: str) -> None:
    call = call_for(layer)
    moves = call.case.moves if call.case.is_convolution else ()

    def function(topology: pp.Topology, x: Tensor, values: Tensor) -> Tensor:
        return getattr(pp, layer)(x, values, topology, None, *moves)

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for pattern in (share(0.2), share(0.5), share(0.0)):
        other = call_for(layer, pattern=pattern)
        x, values, _ = trained(other)
        fresh = other.topology.__deepcopy__({})
        out, expected = compiled(fresh, x, values), function(other.topology, x, values)
        torch.testing.assert_close(out, expected)
        ours = torch.autograd.grad(out.sum(), (x, values))
        torch.testing.assert_close(ours, torch.autograd.grad(expected.sum(), (x, values)))


@each_layer
def test_exported(layer: str) -> None:
    call = call_for(layer)

    class Model(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return sparse_layer(layer, call)(x, call.values, call.bias)

    batch = torch.export.Dim("batch", min=2)
    model = torch.export.export(Model(), (call.input,), dynamic_shapes=({0: batch},)).module()
    other = call_for(layer, batch=(5, *call.case.batch[1:]))
    torch.testing.assert_close(model(other.input), Model()(other.input))


@each_layer
def test_a_tracer_leaves_nothing_in_the_topology(layer: str) -> None:
    call = call_for(layer)
    topology = call.case.topology.__deepcopy__({})

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor) -> Tensor:
            own = replace(call, topology=topology)
            return sparse_layer(layer, own)(x * self.scale, call.values, call.bias)

    own = topology.nbytes
    torch.export.export(Model(), (call.input,))
    assert topology.nbytes == own
    Model()(call.input).sum().backward()
    assert type(topology.transposed().order) is Tensor


@each_layer
def test_a_topology_made_in_inference_mode_can_be_trained(layer: str) -> None:
    call = call_for(layer)
    with torch.inference_mode():
        topology = call.case.topology.__deepcopy__({})
        replace(call, topology=topology).run(f"{layer}_grad_input")
    inputs = trained(call)
    out = sparse_layer(layer, replace(call, topology=topology))(*inputs)
    grads = torch.autograd.grad(out, inputs, call.grad_output)
    assert_same_bits(grads[0], call.run(f"{layer}_grad_input"))


@each_layer
def test_gradients_of_each_sample(layer: str) -> None:
    call = call_for(layer)
    function = sparse_layer(layer, call)

    def loss(x: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        return function(x[None], values, bias).square().sum()

    each = torch.func.grad(loss, argnums=(0, 1, 2))
    found = torch.func.vmap(each, in_dims=(0, None, None))(call.input, call.values, call.bias)
    for sample, x in enumerate(call.input):
        inputs = [tensor.clone().requires_grad_() for tensor in (x, call.values, call.bias)]
        expected = torch.autograd.grad(loss(*inputs), inputs)
        torch.testing.assert_close(tuple(grad[sample] for grad in found), expected)


@each_layer
def test_vmap_over_the_values(layer: str) -> None:
    call = call_for(layer)
    function = sparse_layer(layer, call)
    models = torch.randn(3, call.topology.count())
    found = torch.func.vmap(lambda values: function(call.input, values, call.bias))(models)
    for values, out in zip(models, found, strict=True):
        torch.testing.assert_close(out, function(call.input, values, call.bias))


@each_layer
def test_func_grad_of_grad(layer: str) -> None:
    call = call_for(layer, torch.float64, torch.float64)

    def loss(function: Layer) -> Callable[[Tensor], Tensor]:
        return lambda values: function(call.input, values, call.bias).pow(3).sum()

    ours, theirs = (
        torch.func.jacrev(torch.func.grad(loss(function)))(call.values)
        for function in (sparse_layer(layer, call), dense_layer(call))
    )
    torch.testing.assert_close(ours, theirs)


# ---- autocast


@pytest.mark.parametrize("backend", ["kernels", "reference"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@each_layer
def test_autocast_casts_the_input_and_leaves_the_values(
    layer: str, dtype: torch.dtype, backend: str
) -> None:
    call = call_for(layer)
    with pp.backend(backend):
        half = trained(replace(call, input=call.input.to(dtype)))
        expected = sparse_layer(layer, call)(*half)
        grads = torch.autograd.grad(expected, half, call.grad_output.to(dtype))
        inputs = trained(call)
        with torch.autocast("cpu", dtype):
            out = sparse_layer(layer, call)(*inputs)
            # Whether the backward pass is inside or outside of the block makes no difference.
            inside = torch.autograd.grad(out, inputs, call.grad_output.to(dtype), retain_graph=True)
        outside = torch.autograd.grad(out, inputs, call.grad_output.to(dtype))
    assert out.dtype == dtype
    assert_same_bits(out, expected)
    for each in (inside, outside):
        assert [grad.dtype for grad in each] == [torch.float32] * 3
        for mine, theirs in zip(each, grads, strict=True):
            assert_same_bits(mine, theirs.float())


@each_layer
def test_autocast_leaves_float64_alone(layer: str) -> None:
    call = call_for(layer, torch.float64, torch.float64)
    expected = call.run(layer)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_bits(call.run(layer), expected)


@each_layer
def test_double_backward_under_autocast(layer: str) -> None:
    call = call_for(layer)
    with torch.autocast("cpu", torch.bfloat16):
        inputs = trained(call)
        out = sparse_layer(layer, call)(*inputs)
        grads = torch.autograd.grad(out.float().square().sum(), inputs, create_graph=True)
        second = torch.autograd.grad(sum(grad.square().sum() for grad in grads), inputs)
    wide = [tensor.detach().double().requires_grad_() for tensor in inputs]
    loss = dense_layer(call)(*wide).square().sum()
    exact = torch.autograd.grad(loss, wide, create_graph=True)
    exact += torch.autograd.grad(sum(grad.square().sum() for grad in exact), wide)
    for mine, theirs in zip((*grads, *second), exact, strict=True):
        assert mine.dtype == torch.float32
        error = (mine.double() - theirs).abs().max()
        assert error <= 16 * torch.finfo(torch.bfloat16).eps * theirs.abs().max()
