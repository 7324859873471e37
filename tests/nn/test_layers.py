"""The powered layers against torch.nn's own: same constructor, same outputs, same gradients."""

from __future__ import annotations

import inspect
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ppkernels as pp

PAIRS = [
    (pp.nn.PowerLinear, nn.Linear),
    (pp.nn.PowerConv1d, nn.Conv1d),
    (pp.nn.PowerConv2d, nn.Conv2d),
    (pp.nn.PowerConv3d, nn.Conv3d),
]
CONVS = PAIRS[1:]
STORES = ["theta", "phi"]


@pytest.mark.parametrize(("powered", "plain"), PAIRS)
def test_constructor_is_the_plain_one_with_alpha_and_stores(powered: type, plain: type) -> None:
    ours = inspect.signature(powered).parameters
    theirs = inspect.signature(plain).parameters
    assert [(p.name, p.default) for p in ours.values()][:-2] == [
        (p.name, p.default) for p in theirs.values()
    ]
    assert [(p.name, p.kind) for p in ours.values()][-2:] == [
        ("alpha", inspect.Parameter.KEYWORD_ONLY),
        ("stores", inspect.Parameter.KEYWORD_ONLY),
    ]
    assert ours["alpha"].default is inspect.Parameter.empty
    assert issubclass(powered, plain)


@pytest.mark.parametrize("stores", STORES)
@pytest.mark.parametrize("bias", [True, False])
def test_linear(stores: str, bias: bool) -> None:
    layer = pp.nn.PowerLinear(5, 3, bias, dtype=torch.float64, alpha=1.5, stores=stores)
    x = torch.randn(2, 4, 5, dtype=torch.float64)
    phi = pp.inverse_power(layer.theta.detach(), 1.5).requires_grad_()
    theta = pp.power(phi, 1.5)
    expected = F.linear(x, theta, layer.bias)
    torch.testing.assert_close(layer(x), expected)
    (layer.weight.grad,) = torch.autograd.grad(layer(x).sum(), layer.weight)
    wanted = torch.autograd.grad(expected.sum(), theta if stores == "theta" else phi)
    torch.testing.assert_close(layer.weight.grad, *wanted)


@pytest.mark.parametrize("stores", STORES)
@pytest.mark.parametrize(("powered", "plain"), CONVS)
@pytest.mark.parametrize(
    "options",
    [{"padding_mode": mode, "padding": 1} for mode in ("zeros", "reflect", "replicate", "circular")]
    + [
        {"groups": 2},
        {"dilation": 2, "stride": 2, "bias": False},
        {"padding": "same", "dilation": 2, "padding_mode": "circular"},
        {"padding": "valid"},
    ],
    ids=str,
)
def test_conv(powered: type, plain: type, stores: str, options: dict) -> None:
    dims = int(plain.__name__[4])
    torch.manual_seed(0)
    layer = powered(4, 6, 3, **options, dtype=torch.float64, alpha=2.0, stores=stores)
    reference = plain(4, 6, 3, **options, dtype=torch.float64)
    with torch.no_grad():
        reference.weight.copy_(layer.theta)
        if layer.bias is not None:
            reference.bias.copy_(layer.bias)
    x = torch.randn(2, 4, *[7] * dims, dtype=torch.float64)
    out, expected = layer(x), reference(x)
    assert torch.equal(out, expected)
    out.square().sum().backward()
    expected.square().sum().backward()
    grad = reference.weight.grad
    if stores == "phi":
        grad = pp.power_backward(grad, layer.weight.detach(), 2.0)
    assert torch.equal(layer.weight.grad, grad)


@pytest.mark.parametrize(("powered", "plain"), PAIRS)
@pytest.mark.parametrize("stores", STORES)
@pytest.mark.parametrize("alpha", [1.0, 1.5, 4.0])
def test_theta_starts_as_the_plain_weight(
    powered: type, plain: type, stores: str, alpha: float
) -> None:
    sizes = (7, 5) if plain is nn.Linear else (4, 6, 3)
    torch.manual_seed(3)
    reference = plain(*sizes)
    torch.manual_seed(3)
    layer = powered(*sizes, alpha=alpha, stores=stores)
    tolerance = {"rtol": 0, "atol": 0} if stores == "theta" else {"rtol": 1e-6, "atol": 0}
    torch.testing.assert_close(layer.theta, reference.weight, **tolerance)
    assert torch.equal(layer.bias, reference.bias)
    torch.manual_seed(3)
    layer.reset_parameters()
    torch.testing.assert_close(layer.theta, reference.weight, **tolerance)


def test_theta_is_differentiable() -> None:
    for stores in STORES:
        layer = pp.nn.PowerLinear(3, 2, alpha=2, stores=stores)
        (grad,) = torch.autograd.grad(layer.theta.sum(), layer.weight)
        expected = torch.ones(2, 3) if stores == "theta" else 2 * layer.weight.abs()
        torch.testing.assert_close(grad, expected)


def test_double_backward_through_a_layer() -> None:
    layer = pp.nn.PowerLinear(3, 2, dtype=torch.float64, alpha=2.5, stores="phi")
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in layer.named_parameters()]

    def output(x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), x)

    assert torch.autograd.gradgradcheck(output, (x, *layer.parameters()))


def test_set_theta() -> None:
    values = torch.randn(2, 3)
    for stores in STORES:
        layer = pp.nn.PowerLinear(3, 2, alpha=3, stores=stores)
        weight, version = layer.weight, layer.weight._version
        layer.set_theta(values.double())
        torch.testing.assert_close(layer.theta.detach(), values)
        assert layer.weight is weight
        assert weight._version > version
    with pytest.raises(ValueError, match=r"must have the shape of weight, \(2, 3\), got \(3,\)"):
        layer.set_theta(values[0])
    with pytest.raises(TypeError, match="values must be float32"):
        layer.set_theta(torch.ones(2, 3, dtype=torch.int64))


def test_truncated_normal() -> None:
    for stores, (scale, std) in product(STORES, [(1.0, 0.05), (4.0, 0.1)]):
        layer = pp.nn.PowerLinear(400, 50, alpha=2, stores=stores)
        pp.nn.init.truncated_normal_(layer, scale, torch.Generator().manual_seed(0))
        theta = layer.theta.detach()
        assert theta.std().item() == pytest.approx(std, rel=0.04)
        # Cut off at two standard deviations of the normal before the cut.
        assert theta.abs().max().item() == pytest.approx(2 * std / 0.8796, rel=0.01)
        assert not layer.bias.any()
    with pytest.raises(TypeError, match="Linear is not a powered layer"):
        pp.nn.init.truncated_normal_(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="scale must be a positive number, got 0"):
        pp.nn.init.truncated_normal_(layer, 0)


def test_repr() -> None:
    assert repr(pp.nn.PowerLinear(64, 32, alpha=1.5)) == (
        "PowerLinear(in_features=64, out_features=32, bias=True, alpha=1.5, stores='theta')"
    )
    assert repr(pp.nn.PowerConv1d(4, 8, 3, groups=2, alpha=2, stores="phi")) == (
        "PowerConv1d(4, 8, kernel_size=(3,), stride=(1,), groups=2, alpha=2.0, stores='phi')"
    )


def test_bad_arguments() -> None:
    with pytest.raises(TypeError, match="alpha"):
        pp.nn.PowerLinear(2, 2)
    with pytest.raises(
        ValueError, match=r"PowerLinear: alpha must be a finite number >= 1, got 0.5"
    ):
        pp.nn.PowerLinear(2, 2, alpha=0.5)
    with pytest.raises(ValueError, match="got nan"):
        pp.nn.PowerConv1d(2, 2, 1, alpha=torch.tensor(float("nan"), dtype=torch.float64))
    with pytest.raises(TypeError, match="must be 0-dim float64"):
        pp.nn.PowerLinear(2, 2, alpha=torch.tensor(1.5))
    with pytest.raises(ValueError, match="stores must be 'theta' or 'phi', got 'both'"):
        pp.nn.PowerLinear(2, 2, alpha=2, stores="both")


def test_alpha_given_as_a_tensor_is_copied() -> None:
    alpha = torch.tensor(1.5, dtype=torch.float64)
    layer = pp.nn.PowerLinear(2, 2, alpha=alpha)
    alpha.fill_(3)
    assert layer.alpha.item() == 1.5
