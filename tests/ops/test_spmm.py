"""Op `spmm`: shapes, empty weights and errors. What it shares with convolutions is tested in
test_sparse_products.py, its values in tests/test_contract.py."""

from __future__ import annotations

import math
import re

import pytest
import torch
from torch import Tensor

import ppkernels as pp


def weight(*shape: int, kept: float = 0.4) -> tuple[Tensor, pp.Topology, Tensor]:
    """A dense θ, its topology and its values."""
    theta = torch.randn(shape) * (torch.rand(shape) < kept)
    topology = pp.Topology.of(theta)
    return theta, topology, topology.gather(theta)


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("batch", [(), (0,), (3,), (2, 0)], ids=str)
@pytest.mark.parametrize(("rows", "columns"), [(0, 5), (4, 0), (0, 0), (4, 5)])
def test_a_weight_without_entries(rows, columns, batch, create_graph):
    topology = pp.Topology.of(torch.zeros(rows, columns))
    x, values, bias = torch.randn(*batch, columns), torch.zeros(0), torch.randn(rows)
    inputs = [tensor.requires_grad_() for tensor in (x, values, bias)]
    out = pp.spmm(x, values, topology, bias)
    assert torch.equal(out, bias.expand(*batch, rows))
    grads = torch.autograd.grad(out.sum(), inputs, create_graph=create_graph)
    assert [grad.shape for grad in grads] == [tensor.shape for tensor in inputs]
    assert torch.equal(grads[0], torch.zeros_like(x))
    assert torch.equal(grads[2], torch.full((rows,), float(math.prod(batch))))


def test_a_weight_of_more_dimensions_is_the_matrix_of_its_rows():
    theta, topology, values = weight(6, 3, 2, 2)
    x, g = torch.randn(5, 12, requires_grad=True), torch.randn(5, 6)
    out = pp.spmm(x, values, topology)
    torch.testing.assert_close(out, x @ theta.view(6, 12).t())
    for grad in (*torch.autograd.grad(out, x, g), pp.spmm_grad_input(g, values, topology)):
        torch.testing.assert_close(grad, g @ theta.view(6, 12))
    x = x.detach()
    flat = pp.Topology(topology.offsets, topology.columns, (6, 12))
    grad = pp.spmm_grad_values(g, x, topology)
    torch.testing.assert_close(grad, flat.gather(g.t() @ x))


def test_no_bias_and_a_bias_of_zeros_are_the_same():
    _, topology, values = weight(7, 9)
    x = torch.randn(3, 9)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        zeros = torch.zeros(7, dtype=dtype)
        assert torch.equal(pp.spmm(x, values, topology, zeros), pp.spmm(x, values, topology))


@pytest.mark.parametrize("bias_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_each_result_has_the_dtype_of_what_it_belongs_to(dtype, bias_dtype):
    for values_dtype in (torch.float32, torch.bfloat16, torch.float16):
        _, topology, values = weight(7, 9)
        x, bias = torch.randn(3, 9).to(dtype), torch.randn(7).to(bias_dtype)
        inputs = [x, values.to(values_dtype), bias]
        for tensor in inputs:
            tensor.requires_grad_()
        out = pp.spmm(inputs[0], inputs[1], topology, bias)
        assert out.dtype == dtype
        for create_graph in (False, True):
            options = {"retain_graph": True, "create_graph": create_graph}
            grads = torch.autograd.grad(out.sum(), inputs, **options)
            assert [grad.dtype for grad in grads] == [dtype, values_dtype, bias_dtype]
        given = pp.spmm_grad_values(out.detach(), x, topology, dtype=values_dtype)
        assert given.dtype == values_dtype


def test_a_gradient_step_stays_on_the_entries():
    """Training the values is training a dense weight under a mask."""
    theta, topology, values = weight(7, 9)
    mask = theta != 0
    x, target = torch.randn(20, 9), torch.randn(20, 7)
    theta.requires_grad_(), values.requires_grad_()
    for _ in range(5):
        for parameter, out in ((theta, x @ theta.t()), (values, pp.spmm(x, values, topology))):
            (grad,) = torch.autograd.grad((out - target).square().mean(), parameter)
            with torch.no_grad():
                parameter -= 0.1 * (grad * mask if parameter is theta else grad)
    torch.testing.assert_close(topology.scatter(values), theta.detach())


# ---- errors


def refused(error: type[Exception], message: str, call, *args, **options) -> None:
    """With ``message`` at the beginning of what it says."""
    with pytest.raises(error, match="^" + re.escape(message)):
        call(*args, **options)


def test_errors_of_the_product():
    _, topology, values = weight(4, 5)
    x, bias = torch.randn(3, 5), torch.randn(4)
    spmm = pp.spmm
    refused(TypeError, "spmm: topology must be a pp.Topology, got Tensor", spmm, x, values, x)
    refused(TypeError, "spmm: topology must be a pp.Topology, got NoneType", spmm, x, values, None)
    refused(TypeError, "spmm: input must be a torch.Tensor, got list", spmm, [1], values, topology)
    message = "spmm: input must be float32, float64, bfloat16 or float16, got int64"
    refused(TypeError, message, spmm, x.long(), values, topology)
    refused(TypeError, "spmm: input must be a dense tensor", spmm, x.to_sparse(), values, topology)
    message = "spmm: values must be float32, float64, bfloat16 or float16, got int64"
    refused(TypeError, message, spmm, x, values.long(), topology)
    count = topology.count()
    message = f"spmm: values must have shape ({count},), one for each entry of the topology, got "
    refused(ValueError, message + f"({count - 1},)", spmm, x, values[1:], topology)
    refused(ValueError, message + f"(1, {count})", spmm, x, values[None], topology)
    message = "spmm: input has 4 features, the topology expects 5"
    refused(ValueError, message, spmm, x[:, :4], values, topology)
    message = "spmm: input has no dimension, the topology expects 5"
    refused(ValueError, message, spmm, x[0, 0], values, topology)
    message = "spmm: input must be float64 where the values are, and only there, got torch.float"
    refused(TypeError, message + "64 beside torch.float32", spmm, x.double(), values, topology)
    refused(TypeError, message + "32 beside torch.float64", spmm, x, values.double(), topology)
    message = "spmm: bias must have shape (4,) on cpu, got "
    refused(ValueError, message + "(3,) on cpu", spmm, x, values, topology, bias[:3])
    refused(ValueError, message + "(1, 4) on cpu", spmm, x, values, topology, bias[None])
    refused(ValueError, message + "(4,) on meta", spmm, x, values, topology, bias.to("meta"))
    message = "spmm: bias must be float32, float64, bfloat16 or float16, got int64"
    refused(TypeError, message, spmm, x, values, topology, bias.long())
    message = "spmm: values must be on the device of the topology, cpu, got meta"
    refused(ValueError, message, spmm, x, values.to("meta"), topology)
    message = "spmm: input must be on the device of the values, cpu, got meta"
    refused(ValueError, message, spmm, x.to("meta"), values, topology)


def test_errors_of_the_gradients():
    _, topology, values = weight(4, 5)
    x, g = torch.randn(3, 5), torch.randn(3, 4)
    grad_input, grad_values = pp.spmm_grad_input, pp.spmm_grad_values
    message = "spmm_grad_input: topology must be a pp.Topology, got Tensor"
    refused(TypeError, message, grad_input, g, values, g)
    message = "spmm_grad_input: grad_output has 5 features, the topology expects 4"
    refused(ValueError, message, grad_input, x, values, topology)
    message = "spmm_grad_input: values must have shape"
    refused(ValueError, message, grad_input, g, values[1:], topology)
    message = "spmm_grad_input: grad_output must be float64 where the values are"
    refused(TypeError, message, grad_input, g.double(), values, topology)
    message = "spmm_grad_values: topology must be a pp.Topology, got Tensor"
    refused(TypeError, message, grad_values, g, x, x)
    message = "spmm_grad_values: grad_output has 5 features, the topology expects 4"
    refused(ValueError, message, grad_values, x, x, topology)
    message = "spmm_grad_values: input has 4 features, the topology expects 5"
    refused(ValueError, message, grad_values, g, g, topology)
    message = (
        "spmm_grad_values: grad_output and input must agree in dtype and in all dimensions but "
        "the last, got (2, 4) torch.float32 and (3, 5) torch.float32"
    )
    refused(ValueError, message, grad_values, g[1:], x, topology)
    message = "spmm_grad_values: grad_output and input must agree in dtype"
    refused(ValueError, message, grad_values, g.half(), x, topology)
    message = "spmm_grad_values: dtype must be float32, float64, bfloat16 or float16, got int64"
    refused(TypeError, message, grad_values, g, x, topology, dtype=torch.int64)
    message = "spmm_grad_values: grad_output must be float64 where the values are"
    refused(TypeError, message, grad_values, g, x, topology, dtype=torch.float64)
