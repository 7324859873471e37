"""pp.powerize and pp.fold: what changes, what stays, what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import ppkernels as pp


def mlp() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(6, 5), nn.ReLU(), nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 3))
    )


def ulp(x: torch.Tensor) -> torch.Tensor:
    return torch.nextafter(x.abs(), torch.tensor(torch.inf)) - x.abs()


@pytest.mark.parametrize("stores", ["theta", "phi"])
def test_a_model_changes_in_place_and_back(stores: str) -> None:
    model = nn.Sequential(nn.Conv1d(6, 6, 3), nn.Conv1d(6, 6, 1), nn.Flatten(), nn.Linear(24, 3))
    x, seen = torch.randn(2, 6, 6), []
    model[3].register_forward_hook(lambda *_: seen.append(1))
    modules, parameters = list(model.modules()), list(model.parameters())
    expected, keys = model(x), list(model.state_dict())
    assert pp.powerize(model, 1.5, stores) is model
    assert [type(module).__name__ for module in model] == [
        "PowerConv1d",
        "PowerConv1d",
        "Flatten",
        "PowerLinear",
    ]
    out = model(x)
    assert torch.equal(out, expected) if stores == "theta" else torch.allclose(out, expected)
    assert pp.fold(model) is model
    assert torch.equal(model(x), out)
    assert [type(module) for module in model] == [nn.Conv1d, nn.Conv1d, nn.Flatten, nn.Linear]
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert list(model.state_dict()) == keys
    assert len(seen) == 3
    torch.optim.SGD(model.parameters(), 0.1).step()


def test_every_kind() -> None:
    kinds = [nn.Linear(4, 3), nn.Conv1d(4, 3, 1), nn.Conv2d(4, 3, 1), nn.Conv3d(4, 3, 1)]
    for plain in kinds:
        cls = type(plain)
        powered = pp.powerize(plain, 2.0)
        assert powered is plain
        assert type(powered).__name__ == f"Power{cls.__name__}"
        assert type(pp.fold(powered)) is cls
    assert type(pp.fold(pp.nn.PowerConv2d(2, 2, 1, alpha=2))) is nn.Conv2d


@pytest.mark.skipif(pp.cpu_capability() == "reference", reason="torch's pow is less exact")
@pytest.mark.parametrize("alpha", [1.0, 1.1, 1.5, 2.0, 3.0, 4.0, 7.3])
def test_theta_is_within_alpha_plus_1_ulp_where_phi_is_stored(alpha: float) -> None:
    layer = nn.Linear(400, 100)
    with torch.no_grad():
        layer.weight.mul_(10.0 ** torch.empty(100, 1).uniform_(-12, 3))
    before = layer.weight.detach().clone()
    after = pp.powerize(layer, alpha, "phi").theta.detach()
    assert ((after.double() - before).abs() / ulp(before)).max() <= alpha + 1


def test_idempotent() -> None:
    model = pp.powerize(mlp(), 1.5)
    weights = [parameter.detach().clone() for parameter in model.parameters()]
    assert pp.powerize(model, 1.5) is model
    assert all(map(torch.equal, model.parameters(), weights))
    with pytest.raises(
        ValueError, match=r"'0' \(PowerLinear\) is powered already with alpha 1.5, "
    ):
        pp.powerize(model, 2.0)
    with pytest.raises(ValueError, match=r"powered already and stores theta, not phi; .* pp\.fold"):
        pp.powerize(model, 1.5, "phi")
    partly = nn.Sequential(pp.nn.PowerLinear(3, 3, alpha=2), nn.Linear(3, 3))
    pp.powerize(partly, 1.5, select=["1"])
    assert [layer.alpha.item() for layer in partly] == [2.0, 1.5]


def powered_names(model: nn.Module) -> dict[str, float]:
    return {
        name: module.alpha.item()
        for name, module in model.named_modules()
        if isinstance(module, pp.nn.Powered)
    }


def test_choice_of_layers_and_of_alpha(tied_model: type[nn.Module]) -> None:
    assert powered_names(pp.powerize(mlp(), 2, select=lambda name, _: name != "2.1")) == {
        "0": 2.0,
        "2.0": 2.0,
    }
    assert powered_names(pp.powerize(mlp(), 2, select=["2.1"])) == {"2.1": 2.0}
    assert powered_names(pp.powerize(mlp(), {"0": 1.5, "2.0": 3})) == {"0": 1.5, "2.0": 3.0}
    assert powered_names(pp.powerize(mlp(), lambda name, layer: layer.in_features / 2)) == {
        "0": 3.0,
        "2.0": 2.5,
        "2.1": 2.5,
    }
    model, asked = tied_model(), []
    del model.encoder
    pp.powerize(model, 2, select=lambda name, _: asked.append(name) or name == "mix")
    assert asked == ["mix", "head"]


def test_choices_that_make_no_sense() -> None:
    with pytest.raises(ValueError, match="Sequential has no module named '7'"):
        pp.powerize(mlp(), {"7": 2.0})
    with pytest.raises(
        ValueError, match=r"'2.0' \(Linear\) is selected, but the mapping alpha has"
    ):
        pp.powerize(mlp(), {"0": 2.0}, select=["0", "2.0"])
    with pytest.raises(TypeError, match=r"select must be several names or a function, got '2\.0'"):
        pp.powerize(mlp(), 2.0, select="2.0")
    with pytest.raises(ValueError, match=r"'2.1' \(Linear\): alpha must be a finite number >= 1"):
        pp.powerize(mlp(), lambda name, _: 0.5 if name == "2.1" else 2.0)
    with pytest.raises(ValueError, match="stores must be 'theta' or 'phi', got 'psi'"):
        pp.powerize(mlp(), 2.0, "psi")
    shared = nn.Linear(3, 3)
    with pytest.raises(ValueError, match="mean the same layer"):
        pp.powerize(nn.Sequential(shared, shared), {"0": 2.0, "1": 2.0})
    assert type(shared) is nn.Linear


@pytest.mark.parametrize(
    ("model", "kind", "message"),
    [
        (
            nn.ConvTranspose2d(2, 2, 1),
            TypeError,
            "the ConvTranspose2d given cannot be .*: only nn.L",
        ),
        (nn.Embedding(2, 2), TypeError, "the Embedding given cannot be powered: only nn.Linear"),
        (nn.LazyLinear(2), TypeError, "the LazyLinear given cannot be powered: it is lazy"),
        (nn.Sequential(), ValueError, "Sequential holds no layer that can be powered: only nn.Lin"),
        (nn.ReLU(), ValueError, "ReLU holds no layer that can be powered: only nn.Linear"),
        (
            nn.Sequential(nn.ReLU(), nn.LazyLinear(2)),
            ValueError,
            r"Sequential holds no layer that can be powered: '1' \(LazyLinear\): it is lazy",
        ),
        ("x", TypeError, "powerize: model must be a torch.nn.Module, got str"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_nothing_to_power(model: object, kind: type, message: str) -> None:
    with pytest.raises(kind, match=message):
        pp.powerize(model, 2.0)


def test_nothing_selected() -> None:
    for alpha, select in ((2.0, lambda *_: False), (2.0, []), ({}, None), ({"0": 2.0}, [])):
        with pytest.raises(ValueError, match="of Sequential no layer at all was selected"):
            pp.powerize(mlp(), alpha, select=select)
    with pytest.raises(TypeError, match="select must be several names or a function, got 5"):
        pp.powerize(mlp(), 2.0, select=5)
    with pytest.raises(ValueError, match="Sequential has no module named 'typo'"):
        pp.powerize(mlp(), {"0": 2.0, "typo": 3.0}, select=["0"])
    with pytest.raises(TypeError, match=r"fold: model must be a torch\.nn\.Module, got int"):
        pp.fold(3)


def test_gradients_of_weights_that_change_their_meaning_are_dropped() -> None:
    for stores in ("theta", "phi"):
        layer = nn.Linear(3, 3)
        layer(torch.ones(1, 3)).sum().backward()
        pp.powerize(layer, 2.0, stores)
        assert (layer.weight.grad is None) == (stores == "phi")
        assert layer.bias.grad is not None
        layer(torch.ones(1, 3)).sum().backward()
        pp.fold(layer)
        assert (layer.weight.grad is None) == (stores == "phi")


def test_a_pruned_layer_that_is_powered_already_stays() -> None:
    model = nn.Sequential(prune.identity(pp.nn.PowerLinear(3, 3, alpha=2), "weight"))
    pp.powerize(model, 2.0)


class OwnLinear(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.T


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (nn.ConvTranspose2d(2, 2, 1), "only nn.Linear, nn.Conv1d, nn.Conv2d and nn.Conv3d can be"),
        (nn.Embedding(2, 2), "only nn.Linear"),
        (nn.Bilinear(2, 2, 2), "only nn.Linear"),
        (nn.LSTM(2, 2), "only nn.Linear"),
        (OwnLinear(2, 2), "and no subclasses"),
        (nn.MultiheadAttention(2, 1), "only nn.Linear"),
        (nn.LazyLinear(2), "it is lazy; run a batch"),
        (nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)), "has parametrized it"),
        (prune.identity(nn.Linear(2, 2), "weight"), "normalised or pruned it"),
        (nn.Linear(2, 2, dtype=torch.complex64), "its weight is torch.complex64"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_cannot_be_powered(module: nn.Module, reason: str) -> None:
    model = nn.Sequential(nn.Linear(2, 2), module)
    with pytest.raises(TypeError, match=rf"'1' \({type(module).__name__}\) cannot be .*{reason}"):
        pp.powerize(model, 2.0, select=["0", "1"])
    assert type(model[0]) is nn.Linear
    own = {name for name, _ in model.named_parameters()}
    pp.powerize(model, 2.0, select=lambda name, _: "out_proj" not in name)
    assert list(powered_names(model)) == ["0"]
    assert {name for name, _ in model.named_parameters()} == own


def test_an_attribute_in_the_way() -> None:
    layer = nn.Linear(2, 2)
    layer.alpha = 16
    with pytest.raises(TypeError, match="it has an attribute 'alpha' of its own"):
        pp.powerize(nn.Sequential(layer), 2.0, select=["0"])


# ---- fold


def test_fold_refuses() -> None:
    first, second = (pp.nn.PowerLinear(3, 3, alpha=2, stores="phi") for _ in range(2))
    second.weight = first.weight
    with pytest.raises(ValueError, match="shares its weight, which holds phi, with PowerLinear"):
        pp.fold(nn.Sequential(first))

    class OwnPowerLinear(pp.nn.PowerLinear):
        pass

    with pytest.raises(TypeError, match=r"'0' \(OwnPowerLinear\) is a subclass of a powered layer"):
        pp.fold(nn.Sequential(OwnPowerLinear(3, 3, alpha=2)))
    pruned = prune.identity(pp.nn.PowerLinear(3, 3, alpha=2), "weight")
    with pytest.raises(RuntimeError, match="no longer a Parameter of its own"):
        pp.fold(pruned)


def test_attention_keeps_its_projection_class() -> None:
    model = nn.MultiheadAttention(4, 2)
    before = type(model.out_proj)
    pp.powerize(model, 2.0)
    assert type(model.out_proj) is pp.nn.PowerLinear
    twin = pp.fold(copy.deepcopy(model))
    pp.fold(model)
    assert type(model.out_proj) is type(twin.out_proj) is before
