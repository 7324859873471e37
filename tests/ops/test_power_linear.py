"""Op `power_linear` where no GPU is needed: values, gradients, transforms, errors, the model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import ppkernels as pp
from ppkernels.ops.power_linear.model import A100, B200, H100, MI300X, Product

ALPHA = torch.tensor(1.5, dtype=torch.float64)


def layer(dtype: torch.dtype = torch.float64, *leading: int) -> tuple[Tensor, Tensor, Tensor]:
    """x, φ and b that ask for gradients."""
    x = torch.randn(*(leading or (6,)), 5, dtype=dtype)
    weight, bias = torch.randn(4, 5, dtype=dtype), torch.randn(4, dtype=dtype)
    return x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()


def words_of_half() -> Tensor:
    return pp.pack_bits(torch.arange(20).view(4, 5) % 2 == 0)


def composed(x: Tensor, weight: Tensor, bias: Tensor | None, words: Tensor | None) -> Tensor:
    return F.linear(x, pp.power(weight, ALPHA, words=words), bias)


@pytest.mark.parametrize("backend", ["kernels", "reference"])
@pytest.mark.parametrize("is_masked", [False, True])
@pytest.mark.parametrize("leading", [(), (6,), (2, 3), (0,)], ids=str)
def test_equals_power_and_a_linear_layer(leading, is_masked, backend):
    x, weight, bias = torch.randn(*leading, 5), torch.randn(4, 5), torch.randn(4)
    inputs = [tensor.requires_grad_() for tensor in (x, weight, bias)]
    words = words_of_half() if is_masked else None
    with pp.backend(backend):
        out = pp.power_linear(x, weight, 1.5, bias, words=words)
        grads = torch.autograd.grad(out.square().sum(), inputs)
    expected = composed(x, weight, bias, words)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(grads, torch.autograd.grad(expected.square().sum(), inputs))
    assert out.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_input_beside_a_single_weight(dtype):
    """Each result has the dtype of what it belongs to; the bias may have its own."""
    x, weight, bias = torch.randn(7, 64), torch.randn(32, 64), torch.randn(32)
    half = x.to(dtype)
    inputs = [tensor.requires_grad_() for tensor in (half, weight, bias)]
    out = pp.power_linear(half, weight, 1.5, bias)
    assert out.dtype == dtype
    grads = torch.autograd.grad(out.float().square().sum(), inputs)
    assert [grad.dtype for grad in grads] == [dtype, torch.float32, torch.float32]
    wide = [tensor.detach().double().requires_grad_() for tensor in inputs]
    exact = pp.power_linear(wide[0], wide[1], 1.5, wide[2])
    # Half types keep 8 or 11 bits of x, θ, y and ∂L/∂y, each of which is rounded once.
    rounding = 4 * torch.finfo(dtype).eps
    for mine, theirs in zip(
        (out, *grads), (exact, *torch.autograd.grad(exact.square().sum(), wide)), strict=True
    ):
        assert (mine.double() - theirs).abs().max() <= rounding * theirs.abs().max()


def test_the_gradients_as_functions():
    x, weight, bias = layer(torch.float32, 2, 3)
    words = words_of_half()
    out = pp.power_linear(x, weight, 1.5, bias, words=words)
    g = torch.randn_like(out)
    grad_x, grad_weight = torch.autograd.grad(out, (x, weight), g)
    assert torch.equal(pp.power_linear_grad_input(g, weight, 1.5, words=words), grad_x)
    assert torch.equal(pp.power_linear_grad_weight(g, x, weight, 1.5, words=words), grad_weight)
    assert grad_weight.flatten()[1::2].eq(0).all()


@pytest.mark.parametrize("is_masked", [False, True])
def test_derivatives_twice(is_masked):
    x, weight, bias = layer()
    words = words_of_half() if is_masked else None

    def function(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return pp.power_linear(x, weight, ALPHA, bias, words=words)

    assert torch.autograd.gradcheck(function, (x, weight, bias))
    assert torch.autograd.gradgradcheck(function, (x, weight, bias))


def test_theta_is_not_kept_for_the_backward_pass():
    x, weight, _ = layer(torch.float32)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        pp.power_linear(x, weight, ALPHA)
    own = {x.data_ptr(), weight.data_ptr(), ALPHA.data_ptr()}
    assert {tensor.data_ptr() for tensor in kept} == own


@pytest.mark.parametrize(("trained", "kept"), [("x", "w"), ("w", "xw"), ("b", "")])
def test_only_what_gradients_need_is_kept(trained, kept):
    tensors = dict(zip("xwb", (tensor.detach() for tensor in layer(torch.float32)), strict=True))
    tensors[trained].requires_grad_()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        pp.power_linear(tensors["x"], tensors["w"], ALPHA, tensors["b"]).sum().backward()
    places = {tensor.data_ptr() for tensor in saved if tensor is not None}
    assert places - {ALPHA.data_ptr()} == {tensors[name].data_ptr() for name in kept}
    assert tensors[trained].grad is not None


@pytest.mark.parametrize(("rows", "columns"), [(0, 5), (4, 0)])
def test_a_weight_without_elements(rows, columns):
    x, weight = torch.randn(3, columns), torch.randn(rows, columns)
    bias = torch.randn(rows)
    inputs = [tensor.requires_grad_() for tensor in (x, weight, bias)]
    out = pp.power_linear(x, weight, 1.5, bias)
    assert torch.equal(out, bias.expand(3, rows))
    for create_graph in (False, True):
        grads = torch.autograd.grad(out.sum(), inputs, retain_graph=True, create_graph=create_graph)
        assert [grad.shape for grad in grads] == [tensor.shape for tensor in inputs]
        assert torch.equal(grads[2], torch.full((rows,), 3.0))


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.float16])
def test_the_gradient_of_theta_may_be_larger_than_a_half_type_holds(weight_dtype, create_graph):
    x, g = torch.full((1, 2), 300.0).half(), torch.full((1, 3), 300.0).half()
    weight = torch.full((3, 2), 1e-4, dtype=weight_dtype, requires_grad=True)
    for backend in ("kernels", "reference"):
        with pp.backend(backend):
            out = pp.power_linear(x, weight, 1.5)
            (grad,) = torch.autograd.grad(out, weight, g, create_graph=create_graph)
        torch.testing.assert_close(grad, torch.full_like(grad, 1350.0), rtol=2e-2, atol=0)


def test_a_hidden_weight_is_not_seen():
    x, weight, _ = layer(torch.float32)
    with torch.no_grad():
        weight[0, 1] = float("nan")
    words = words_of_half()
    out = pp.power_linear(x, weight, 1.5, words=words)
    out.sum().backward()
    assert out.isfinite().all()
    assert x.grad.isfinite().all()
    assert weight.grad[0, 1] == 0


# ---- under PyTorch's transforms


@pytest.mark.parametrize("is_masked", [False, True])
def test_ops_pass_opcheck(is_masked):
    x, weight, bias = (tensor.detach() for tensor in layer(torch.float32, 2, 3))
    g, words = torch.randn(2, 3, 4), words_of_half() if is_masked else None
    ops = torch.ops.ppkernels
    torch.library.opcheck(ops.power_linear, (x, weight, ALPHA, bias, words))
    torch.library.opcheck(ops.power_linear_grad_input, (g, weight, ALPHA, words))
    torch.library.opcheck(ops.power_linear_grad_weight, (g, x, weight, ALPHA, words))


def test_compiled_without_a_graph_break():
    x, weight, bias = layer(torch.float32)
    alpha, words = ALPHA.clone(), words_of_half()
    function = torch.compile(pp.power_linear, fullgraph=True, backend="aot_eager")
    for value in (1.5, 2.0):
        alpha.fill_(value)
        out = function(x, weight, alpha, bias, words=words)
        expected = pp.power_linear(x, weight, alpha, bias, words=words)
        torch.testing.assert_close(out, expected)
        ours = torch.autograd.grad(out.sum(), (x, weight, bias))
        theirs = torch.autograd.grad(expected.sum(), (x, weight, bias))
        torch.testing.assert_close(ours, theirs)


def test_gradients_of_each_sample():
    x, weight, bias = (tensor.detach() for tensor in layer(torch.float32))

    def loss(weight: Tensor, x: Tensor) -> Tensor:
        return pp.power_linear(x, weight, ALPHA, bias).square().sum()

    grads = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weight, x)
    for sample, grad in zip(x, grads, strict=True):
        torch.testing.assert_close(grad, torch.func.grad(loss)(weight, sample))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_the_input_and_leaves_the_weight(dtype):
    x, weight, bias = layer(torch.float32)
    with torch.autocast("cpu", dtype):
        out = pp.power_linear(x, weight, ALPHA, bias)
        assert out.dtype == dtype
        (grad,) = torch.autograd.grad(out.float().sum(), weight)
        assert grad.dtype == torch.float32
        x64, weight64, _ = layer()
        assert pp.power_linear(x64, weight64, ALPHA).dtype == torch.float64


@pytest.mark.parametrize(
    ("weight_dtype", "dtype"), [(torch.bfloat16, torch.float16), (torch.float16, torch.bfloat16)]
)
def test_autocast_to_the_other_half_type(weight_dtype, dtype):
    x, weight, _ = layer(torch.float32)
    half = weight.detach().to(weight_dtype).requires_grad_()
    with torch.autocast("cpu", dtype):
        out = pp.power_linear(x, half, ALPHA)
    assert out.dtype == dtype
    out.float().sum().backward()
    assert half.grad.dtype == weight_dtype


# ---- errors


def test_errors_say_what_was_wanted_and_what_came():
    x, weight, bias = (tensor.detach() for tensor in layer(torch.float32))
    with pytest.raises(ValueError, match=r"input has 3 features, weight \(4, 5\) expects 5"):
        pp.power_linear(x[:, :3], weight, 1.5)
    with pytest.raises(ValueError, match="input has 3 features"):
        pp.power_linear(x[0, :3], weight, 1.5)
    with pytest.raises(ValueError, match="input has no dimension"):
        pp.power_linear(x[0, 0], weight, 1.5)
    with pytest.raises(ValueError, match="weight must have two dimensions"):
        pp.power_linear(x, weight[0], 1.5)
    with pytest.raises(ValueError, match=r"bias must have shape \(4,\)"):
        pp.power_linear(x, weight, 1.5, bias[:3])
    with pytest.raises(ValueError, match="alpha must be a finite number >= 1"):
        pp.power_linear(x, weight, 0.5)
    with pytest.raises(TypeError, match="beside a float32 weight"):
        pp.power_linear(x, weight.half(), 1.5)
    with pytest.raises(TypeError, match="beside a float32 weight"):
        pp.power_linear(x.double(), weight, 1.5)
    with pytest.raises(ValueError, match="one bit for each of 20 entries"):
        pp.power_linear(x, weight, 1.5, words=words_of_half()[:1])
    with pytest.raises(ValueError, match="agree in dtype and in all dimensions but the last"):
        pp.power_linear_grad_weight(torch.randn(3, 4), x, weight, 1.5)
    with pytest.raises(ValueError, match="grad_output has 5 features"):
        pp.power_linear_grad_input(x, weight, 1.5)


# ---- Note [Fused, or by a buffer]

MACHINES = {"A100": A100, "H100": H100, "B200": B200, "MI300X": MI300X}
each_machine = pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES.keys())


@pytest.mark.parametrize("sizes", [(4, 2), (2, 2), (4, 4)], ids=["autocast", "half", "single"])
@each_machine
def test_small_batches_are_fused_and_large_ones_are_not(machine, sizes):
    """And between the two the choice changes once."""
    product = Product(1, 2048, 2048, *sizes)
    fused = []
    for batch in (1, 16, 64, 128, 256, 512, 2048, 16384):
        this = replace(product, batch=batch)
        # As many programs as processors: the product is split into parts for that.
        seconds = this.fused_seconds(64, machine.processors, 4, machine)
        fused.append(seconds < this.buffered_seconds(machine))
    assert fused[0]
    assert not fused[-1]
    assert fused == sorted(fused, reverse=True)


@each_machine
def test_the_gradient_of_the_weight_is_fused_up_to_a_batch(machine):
    small, large = Product(64, 2048, 2048, 4, 2), Product(2**16, 2048, 2048, 4, 2)
    fused = small.fused_gradient_seconds(1024, machine)
    assert fused < small.buffered_gradient_seconds(machine)
    fused = large.fused_gradient_seconds(1024, machine)
    assert fused > large.buffered_gradient_seconds(machine)


@pytest.mark.parametrize("sizes", [(4, 2), (4, 4)], ids=["autocast", "single"])
@each_machine
def test_a_few_programs_do_not_have_the_whole_gpu(machine, sizes):
    """A small weight with a large batch, whose gradient is not split."""
    product = Product(2**16, 256, 256, *sizes)
    fused = product.fused_gradient_seconds(16, machine)
    assert fused > product.buffered_gradient_seconds(machine)
    assert product.fused_seconds(64, 1, 1, machine) > product.buffered_seconds(machine)


def test_parts_are_not_free():
    product = Product(128, 2048, 2048, 2, 2)
    one, eight = (product.fused_seconds(128, 132, parts, H100) for parts in (1, 8))
    assert eight - one == pytest.approx(8 * 8 * 128 * 2048 / H100.bandwidth)


README = Path(pp.ops.__file__).with_name("power_linear") / "README.md"
BATCHES = (1, 16, 64, 128, 256, 1024)


def predictions() -> str:
    """The table of the lab note: time by a buffer over fused time, on an H100."""
    tiles = pytest.importorskip("ppkernels.ops.power_linear.tiles")
    lines = [
        f"| W, X | product | {' | '.join(f'batch {batch}' for batch in BATCHES)} |",
        "|---|---|" + "---|" * len(BATCHES),
    ]
    for dtype, weight_bytes in ((torch.bfloat16, 4), (torch.bfloat16, 2), (torch.float32, 4)):
        ratios: dict[str, list[float]] = {"x·θᵀ, g·θ": [], "∂L/∂φ": []}
        for batch in BATCHES:
            product = Product(batch, 2048, 2048, weight_bytes, dtype.itemsize)
            plan = tiles.plan_product(dtype, batch, 2048, 2048, False, H100)
            tile = plan.choices["BATCH"]
            fused = product.fused_seconds(tile, plan.programs, plan.splits, H100)
            ratios["x·θᵀ, g·θ"].append(product.buffered_seconds(H100) / fused)
            plan = tiles.plan_gradient(dtype, batch, 2048, 2048, H100)
            fused = product.fused_gradient_seconds(plan.programs, H100)
            ratios["∂L/∂φ"].append(product.buffered_gradient_seconds(H100) / fused)
        for name, row in ratios.items():
            cells = " | ".join(f"{ratio:.2f}" for ratio in row)
            lines.append(f"| {weight_bytes}, {dtype.itemsize} | {name} | {cells} |")
    return "\n".join(lines) + "\n"


def test_the_predictions_of_the_lab_note():
    assert predictions() in README.read_text()
