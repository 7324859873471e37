"""Op `sparse_conv2d`: geometry, images of three dimensions and errors. What it shares with linear
layers is tested in test_sparse_products.py, its values in tests/test_contract.py."""

from __future__ import annotations

import itertools
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ppkernels as pp


def weight(*shape: int, kept: float = 0.4) -> tuple[Tensor, pp.Topology, Tensor]:
    """A dense θ, its topology and its values."""
    theta = torch.randn(shape) * (torch.rand(shape) < kept)
    topology = pp.Topology.of(theta)
    return theta, topology, topology.gather(theta)


@pytest.mark.parametrize("stride", [1, 2, (3, 1)])
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (2, 5)])
def test_every_geometry_gives_the_size_of_the_dense_layer(kernel, stride):
    """Or is refused where that refuses it."""
    _, topology, values = weight(2, 3, *kernel)
    compared = refused = 0
    for size, padding, dilation in itertools.product(
        itertools.product((1, 2, 5, 8), repeat=2), (0, 1, (0, 3)), (1, 2, (1, 3))
    ):
        x = torch.randn(2, 3, *size)
        options = {"stride": stride, "padding": padding, "dilation": dilation}
        try:
            expected = F.conv2d(x, topology.scatter(values), **options)
        except RuntimeError:
            refused += 1
            with pytest.raises(ValueError, match="too small for the kernel"):
                pp.sparse_conv2d(x, values, topology, **options)
            continue
        compared += 1
        torch.testing.assert_close(pp.sparse_conv2d(x, values, topology, **options), expected)
    assert compared > 30
    assert refused > 10 or kernel == (1, 1)


def test_a_number_and_a_pair_mean_the_same():
    _, topology, values = weight(4, 3, 3, 3)
    x = torch.randn(2, 3, 9, 8)
    expected = pp.sparse_conv2d(x, values, topology, None, (2, 2), (1, 1), (2, 2))
    for kind in (int, np.int64, lambda number: [number, number], lambda number: (number, number)):
        moves = [kind(number) for number in (2, 1, 2)]
        assert torch.equal(pp.sparse_conv2d(x, values, topology, None, *moves), expected)
    square = torch.randn(2, 4, 5, 5)
    assert torch.equal(
        pp.sparse_conv2d_grad_input(square, values, topology, 7),
        pp.sparse_conv2d_grad_input(square, values, topology, (7, 7)),
    )


@pytest.mark.parametrize("backend", ["kernels", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_image_of_three_dimensions(dtype, backend):
    _, topology, values = weight(4, 3, 3, 3)
    x, bias = torch.randn(3, 6, 7, dtype=dtype), torch.randn(4)
    inputs = [tensor.requires_grad_() for tensor in (x, values.to(dtype), bias)]
    with pp.backend(backend):
        out = pp.sparse_conv2d(x, inputs[1], topology, bias, padding=1)
        (expected,) = pp.sparse_conv2d(x[None], inputs[1], topology, bias, padding=1)
        assert out.is_contiguous()
        assert torch.equal(out, expected)
        ours = torch.autograd.grad(out.sum(), inputs)
        theirs = torch.autograd.grad(expected.sum(), inputs)
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(mine, other)


def test_rows_and_columns_that_a_stride_leaves_out_have_no_gradient():
    _, topology, values = weight(4, 3, 2, 2, kept=1.0)
    x = torch.randn(2, 3, 8, 9, requires_grad=True)
    out = pp.sparse_conv2d(x, values, topology, stride=(3, 3))
    out.sum().backward()
    seen = torch.zeros(8, 9, dtype=torch.bool)
    seen[[[0], [1], [3], [4], [6], [7]], [0, 1, 3, 4, 6, 7]] = True
    assert torch.equal((x.grad != 0).all(0).all(0), seen)
    assert torch.equal(x.grad[:, :, ~seen], torch.zeros(2, 3, int((~seen).sum())))


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("kernel", [1, 3])
def test_no_images_and_no_entries(kernel, create_graph):
    for batch, kept in ((0, 0.5), (0, 0.0), (2, 0.0)):
        _, topology, values = weight(4, 3, kernel, kernel, kept=kept)
        x, bias = torch.randn(batch, 3, 6, 7), torch.randn(4)
        inputs = [tensor.requires_grad_() for tensor in (x, values, bias)]
        out = pp.sparse_conv2d(x, values, topology, bias, padding=1)
        assert torch.equal(out, bias[:, None, None].expand_as(out))
        grads = torch.autograd.grad(out.sum(), inputs, create_graph=create_graph)
        assert [grad.shape for grad in grads] == [tensor.shape for tensor in inputs]
        assert torch.equal(grads[0], torch.zeros_like(x))
        assert torch.equal(grads[1], torch.zeros_like(values))


@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("kernel", [1, 3])
def test_nan_and_infinity_come_from_the_image_alone(kernel, padding):
    """Not from what lies around it: an image between others that are not finite."""
    theta, topology, values = weight(5, 4, kernel, kernel)
    around = torch.full((3, 4, 9, 11), torch.nan)
    around[1, :, 1:-1, 2:-1] = image = torch.randn(4, 7, 8)
    inside = around[1:2, :, 1:-1, 2:-1]
    out = pp.sparse_conv2d(inside, values, topology, padding=padding)
    torch.testing.assert_close(out, F.conv2d(image[None], theta, padding=padding))
    size = out.shape[-2:]
    wide = torch.full((1, 5, size[0] + 2, size[1] + 3), torch.inf)
    wide[:, :, 1:-1, 1:-2] = out
    g = wide[:, :, 1:-1, 1:-2]
    for found, expected in (
        (
            pp.sparse_conv2d_grad_input(g, values, topology, (7, 8), padding=padding),
            pp.sparse_conv2d_grad_input(out, values, topology, (7, 8), padding=padding),
        ),
        (
            pp.sparse_conv2d_grad_values(g, inside, topology, padding=padding),
            pp.sparse_conv2d_grad_values(out, image[None], topology, padding=padding),
        ),
    ):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("stride", [1, 2])
def test_one_image_does_not_see_the_other(stride):
    _, topology, values = weight(5, 4, 3, 3)
    x = torch.randn(3, 4, 7, 8)
    x[1] = torch.nan
    out = pp.sparse_conv2d(x, values, topology, stride=stride, padding=1)
    assert out[0].isfinite().all()
    assert out[2].isfinite().all()
    g = torch.randn_like(out)
    g[1] = torch.inf
    moves = {"stride": stride, "padding": 1}
    grad = pp.sparse_conv2d_grad_input(g, values, topology, (7, 8), **moves)
    assert grad[0].isfinite().all()
    assert grad[2].isfinite().all()


def test_a_layer_of_torch_with_its_zeros():
    layer = nn.Conv2d(6, 8, 3, stride=2, padding=1)
    with torch.no_grad():
        layer.weight[torch.rand(layer.weight.shape) < 0.9] = 0
    topology = pp.Topology.of(layer.weight)
    x = torch.randn(4, 6, 15, 14)
    values = topology.gather(layer.weight)
    out = pp.sparse_conv2d(x, values, topology, layer.bias, layer.stride, layer.padding)
    torch.testing.assert_close(out, layer(x))
    out.square().sum().backward()
    ours = layer.bias.grad.clone()
    layer.bias.grad = None
    layer(x).square().sum().backward()
    torch.testing.assert_close(ours, layer.bias.grad)


# ---- errors


def refused(error: type[Exception], message: str, call, *args, **options) -> None:
    """With ``message`` at the beginning of what it says."""
    with pytest.raises(error, match="^" + re.escape(message)):
        call(*args, **options)


def test_errors_of_the_product():
    _, topology, values = weight(4, 3, 3, 2)
    x, bias, conv = torch.randn(2, 3, 6, 7), torch.randn(4), pp.sparse_conv2d
    ours = "sparse_conv2d: "
    message = f"{ours}topology must be a pp.Topology, got Tensor"
    refused(TypeError, message, conv, x, values, x)
    message = f"{ours}the topology must have shape [N, C, H, W], none of them 0, got "
    for shape in ((4, 18), (4, 3, 6), (4, 3, 2, 3, 1)):
        flat = pp.Topology(topology.offsets, topology.columns, shape)
        refused(ValueError, message + str(shape), conv, x, values, flat)
    for shape in ((0, 3, 3, 2), (4, 0, 3, 2), (4, 3, 0, 2), (4, 3, 3, 0)):
        none = pp.Topology.of(torch.zeros(shape))
        refused(ValueError, message, conv, x[:, : shape[1]], torch.zeros(0), none)
    refused(TypeError, f"{ours}input must be a torch.Tensor, got list", conv, [], values, topology)
    message = f"{ours}input must be float32, float64, bfloat16 or float16, got int64"
    refused(TypeError, message, conv, x.long(), values, topology)
    refused(ValueError, f"{ours}values must have shape", conv, x, values[1:], topology)
    message = f"{ours}input must be images of 3 channels in 3 or 4 dimensions, got shape "
    for wrong in (x[:, :2], x[0, 0], x[None], x[0, 0, 0, 0], x[:, :2][0]):
        refused(ValueError, message + str(tuple(wrong.shape)), conv, wrong, values, topology)
    message = f"{ours}input must be float64 where the values are, and only there, got torch.float64"
    refused(TypeError, message, conv, x.double(), values, topology)
    message = f"{ours}bias must have shape (4,) on cpu, got (3,) on cpu"
    refused(ValueError, message, conv, x, values, topology, bias[:3])
    message = f"{ours}an input of size (2, 7) is too small for the kernel (3, 2) with padding "
    message += "(0, 0) and dilation (1, 1)"
    refused(ValueError, message, conv, x[:, :, :2], values, topology)
    message = f"{ours}an input of size (0, 7) is too small"
    refused(ValueError, message, conv, x[:, :, :0], values, topology, padding=2)
    message = f"{ours}an input of size (6, 0) is too small"
    refused(ValueError, message, conv, x[..., :0], values, topology, padding=2)


@pytest.mark.parametrize(("name", "least"), [("stride", 1), ("padding", 0), ("dilation", 1)])
def test_errors_of_the_geometry(name, least):
    _, topology, values = weight(4, 3, 3, 2)
    x, conv = torch.randn(2, 3, 6, 7), pp.sparse_conv2d
    whole = f"sparse_conv2d: {name} must be a whole number >= {least}, got "
    for wrong, error, came in (
        (least - 1, ValueError, str(least - 1)),
        ((1, least - 1), ValueError, str(least - 1)),
        (1.5, TypeError, "1.5"),
        ((1, 1.0), TypeError, "1.0"),
        ("same", TypeError, "'same'"),
        (True, TypeError, "True"),
        (None, TypeError, "None"),
    ):
        refused(error, whole + came, conv, x, values, topology, **{name: wrong})
    message = f"sparse_conv2d: {name} must be one number or two, got (1, 2, 3)"
    refused(ValueError, message, conv, x, values, topology, **{name: (1, 2, 3)})
    message = f"sparse_conv2d: {name} must be one number or two, got []"
    refused(ValueError, message, conv, x, values, topology, **{name: []})


def test_errors_of_the_gradients():
    _, topology, values = weight(4, 3, 3, 2)
    x, g = torch.randn(2, 3, 6, 7), torch.randn(2, 4, 4, 6)
    grad_input, grad_values = pp.sparse_conv2d_grad_input, pp.sparse_conv2d_grad_values
    ours = "sparse_conv2d_grad_input: "
    message = f"{ours}topology must be a pp.Topology, got Tensor"
    refused(TypeError, message, grad_input, g, values, g, (6, 7))
    message = f"{ours}grad_output must be images of 4 channels in 4 dimensions, got shape (2, 3, "
    refused(ValueError, message, grad_input, x, values, topology, (6, 7))
    message = f"{ours}grad_output must be images of 4 channels in 4 dimensions, got shape (4, 4, "
    refused(ValueError, message, grad_input, g[0], values, topology, (6, 7))
    message = f"{ours}for an input of size (6, 8), grad_output must have size (4, 7), got (4, 6)"
    refused(ValueError, message, grad_input, g, values, topology, (6, 8))
    message = f"{ours}input_size must be one number or two, got (6, 7, 8)"
    refused(ValueError, message, grad_input, g, values, topology, (6, 7, 8))
    message = f"{ours}input_size must be a whole number >= 1, got "
    refused(ValueError, message + "0", grad_input, g, values, topology, (0, 7))
    refused(TypeError, message + "7.5", grad_input, g, values, topology, (6, 7.5))
    message = f"{ours}an input of size (2, 7) is too small for the kernel"
    refused(ValueError, message, grad_input, g[:, :, :0], values, topology, (2, 7))
    ours = "sparse_conv2d_grad_values: "
    message = f"{ours}input must be images of 3 channels in 4 dimensions"
    refused(ValueError, message, grad_values, g, x[0], topology)
    refused(ValueError, f"{ours}for an input of size", grad_values, g, x[..., 1:], topology)
    message = (
        f"{ours}grad_output and input must agree in dtype and in the number of images, got "
        "(1, 4, 4, 6) torch.float32 and (2, 3, 6, 7) torch.float32"
    )
    refused(ValueError, message, grad_values, g[1:], x, topology)
    message = f"{ours}grad_output and input must agree in dtype"
    refused(ValueError, message, grad_values, g.half(), x, topology)
    message = f"{ours}dtype must be float32, float64, bfloat16 or float16, got int64"
    refused(TypeError, message, grad_values, g, x, topology, dtype=torch.int64)
