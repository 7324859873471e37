"""pp.set_alpha: what stays, what jumps, and that it all happens in place."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import ppkernels as pp


def layer(stores: str, alpha: float = 1.5) -> nn.Module:
    return pp.nn.PowerLinear(7, 5, dtype=torch.float64, alpha=alpha, stores=stores)


def phi_of(layer: nn.Module) -> torch.Tensor:
    stored = layer.weight.detach()
    return stored if layer.stores == "phi" else pp.inverse_power(stored, layer.alpha)


@pytest.mark.parametrize("alpha", [1.0, 1.5, 2.5])
@pytest.mark.parametrize("stores", ["theta", "phi"])
@pytest.mark.parametrize("keep", ["theta", "phi"])
def test_what_is_kept(stores: str, keep: str, alpha: float) -> None:
    powered = layer(stores)
    weight, buffer, version = powered.weight, powered.alpha, powered.weight._version
    stored, theta, phi = weight.detach().clone(), powered.theta.detach().clone(), phi_of(powered)
    pp.set_alpha(powered, alpha, keep=keep)
    assert powered.alpha is buffer
    assert buffer.item() == alpha
    assert powered.weight is weight
    assert weight.requires_grad
    if keep == stores:
        assert torch.equal(weight, stored)
    else:
        assert weight._version > version
    kept, before = (powered.theta, theta) if keep == "theta" else (phi_of(powered), phi)
    torch.testing.assert_close(kept.detach(), before, rtol=1e-12, atol=0)
    if keep == "phi":
        expected = theta.sign() * theta.abs() ** (alpha / 1.5)
        torch.testing.assert_close(powered.theta.detach(), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("keep", ["theta", "phi"])
def test_the_same_alpha_changes_no_bit(keep: str) -> None:
    for stores in ("theta", "phi"):
        powered = pp.nn.PowerLinear(50, 40, alpha=1.3, stores=stores)
        before = powered.weight.detach().clone()
        pp.set_alpha(powered, torch.tensor(1.3, dtype=torch.float64), keep=keep)
        assert torch.equal(powered.weight, before)


def test_every_layer_of_a_model() -> None:
    model = nn.Sequential(layer("theta"), nn.ReLU(), nn.Sequential(layer("phi", 2.0)))
    pp.set_alpha(model, 3.0, keep="theta")
    assert [model[0].alpha.item(), model[2][0].alpha.item()] == [3.0, 3.0]


@pytest.mark.parametrize("stores", ["theta", "phi"])
@pytest.mark.parametrize("keep", ["theta", "phi"])
def test_tied_layers_change_once_and_together(stores: str, keep: str) -> None:
    first, second, single = layer(stores), layer(stores), layer(stores)
    second.weight = first.weight
    with torch.no_grad():
        single.weight.copy_(first.weight)
    pp.set_alpha(single, 2.0, keep=keep)
    pp.set_alpha(nn.Sequential(first, second), 2.0, keep=keep)
    assert torch.equal(first.weight, single.weight)
    pp.set_alpha(single, 3.0, keep=keep)
    pp.set_alpha(second, 3.0, keep=keep)  # the first is outside the module given
    assert first.alpha.item() == 3.0
    assert torch.equal(first.weight, single.weight)


def test_errors() -> None:
    powered = layer("theta")
    with pytest.raises(TypeError, match="keep"):
        pp.set_alpha(powered, 2.0)
    with pytest.raises(ValueError, match="keep must be 'phi' or 'theta', got 'both'"):
        pp.set_alpha(powered, 2.0, keep="both")
    with pytest.raises(ValueError, match=r"alpha must be a finite number >= 1, got 0\.9"):
        pp.set_alpha(powered, 0.9, keep="phi")
    with pytest.raises(ValueError, match=r"Linear holds no powered layer; pp\.powerize"):
        pp.set_alpha(nn.Linear(2, 2), 2.0, keep="phi")
    other = layer("phi")
    other.weight = powered.weight
    with pytest.raises(ValueError, match="shares its weight with a layer that stores phi"):
        pp.set_alpha(powered, 2.0, keep="phi")
    assert powered.alpha.item() == 1.5


def test_a_replaced_weight_is_refused() -> None:
    powered = layer("theta")
    prune.l1_unstructured(powered, "weight", 0.5)
    with pytest.raises(RuntimeError, match="no longer a Parameter of its own"):
        pp.set_alpha(powered, 2.0, keep="phi")


def test_all_layers_or_none() -> None:
    model = nn.Sequential(layer("theta"), prune.identity(layer("theta"), "weight"))
    before = model[0].weight.detach().clone()
    with pytest.raises(RuntimeError, match="no longer a Parameter of its own"):
        pp.set_alpha(model, 2.0, keep="phi")
    assert model[0].alpha.item() == 1.5
    assert torch.equal(model[0].weight, before)


# ---- assignment


def tensor_of(alpha: float) -> torch.Tensor:
    return torch.tensor(alpha, dtype=torch.float64)


@pytest.mark.parametrize("stores", ["theta", "phi"])
def test_an_exponent_that_is_assigned_leaves_the_weight(stores: str) -> None:
    powered = layer(stores)
    stored = powered.weight.detach().clone()
    powered.alpha = tensor_of(2.0)
    assert torch.equal(powered.weight, stored)
    assert "alpha" in powered.state_dict()
    assert copy.deepcopy(powered).alpha.item() == powered.double().alpha.item() == 2.0
    other = layer(stores)
    other.load_state_dict(powered.state_dict(), assign=True)
    assert other.alpha.item() == 2.0


@pytest.mark.parametrize(
    ("alpha", "error", "message"),
    [
        (tensor_of(0.5), ValueError, r"^PowerLinear: alpha must be a finite number >= 1, got 0\.5"),
        (tensor_of(torch.nan), ValueError, "alpha must be a finite number >= 1, got nan"),
        (torch.tensor(2.0), TypeError, "alpha as a tensor must be 0-dim float64"),
        (tensor_of(2.0).view(1), TypeError, "alpha as a tensor must be 0-dim float64"),
        (None, TypeError, "alpha must be a float or a 0-dim float64 tensor, got NoneType"),
        (2.0, TypeError, "cannot assign 'float' as buffer 'alpha'"),
    ],
)
def test_what_cannot_be_assigned(alpha: object, error: type[Exception], message: str) -> None:
    powered = layer("theta")
    with pytest.raises(error, match=message):
        powered.alpha = alpha
    assert powered.alpha.item() == 1.5
