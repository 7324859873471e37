"""pp.powerize and pp.fold: what changes, what stays, what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import ppkernels as pp


class TiedModel(nn.Module):
    """A small language model whose output layer shares its weight with the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(11, 8)
        self.mix = nn.Linear(8, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.mix(self.tokens(x))))


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
    pp.powerize(model, 2.0, select=lambda name, module: False)
    partly = nn.Sequential(pp.nn.PowerLinear(3, 3, alpha=2), nn.Linear(3, 3))
    pp.powerize(partly, 1.5, select=["1"])
    assert [layer.alpha.item() for layer in partly] == [2.0, 1.5]


def powered_names(model: nn.Module) -> dict[str, float]:
    return {
        name: module.alpha.item()
        for name, module in model.named_modules()
        if isinstance(module, pp.nn.Powered)
    }


def test_choice_of_layers_and_of_alpha() -> None:
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
    asked = []
    pp.powerize(TiedModel(), 2, select=lambda name, _: bool(asked.append(name)))
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


# ---- weights that are shared, or read by others


@pytest.mark.parametrize("stores", ["theta", "phi"])
def test_tied_layers_stay_tied(stores: str) -> None:
    model = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5))
    model[2].weight = model[0].weight
    x, expected = torch.randn(3, 5), None
    expected = model(x)
    pp.powerize(model, 2.0, stores)
    assert model[2].weight is model[0].weight
    out = model(x)
    torch.testing.assert_close(out, expected)
    pp.fold(model)
    assert model[2].weight is model[0].weight
    assert torch.equal(model(x), out)
    with pytest.raises(
        ValueError, match="share one weight, so they need the same alpha and stores"
    ):
        pp.powerize(model, {"0": 2.0, "2": 3.0}, stores)
    twin = copy.deepcopy(pp.powerize(model, 2.0, stores))
    assert twin[2].weight is twin[0].weight


def test_a_layer_used_twice() -> None:
    shared = nn.Linear(3, 3)
    model = pp.powerize(nn.Sequential(shared, shared), 2.0, "phi")
    assert model[0] is model[1]
    pp.fold(model)
    assert type(shared) is nn.Linear


def test_a_tied_embedding() -> None:
    model, x = TiedModel(), torch.randint(11, (2, 4))
    expected = model(x)
    with pytest.raises(
        ValueError, match=r"'head' \(Linear\) and 'tokens' \(Embedding\) share one weight"
    ):
        pp.powerize(model, 2.0, "phi")
    assert powered_names(model) == {}
    pp.powerize(model, 2.0, "phi", select=["mix"])
    pp.fold(model)
    model = TiedModel()
    expected = model(x)
    pp.powerize(model, 2.0)
    assert model.head.weight is model.tokens.weight
    assert torch.equal(model(x), expected)


def test_a_plain_layer_tied_to_a_powered_one() -> None:
    for stores, message in (("phi", "holds phi for the second already"), ("theta", None)):
        model = nn.Sequential(pp.nn.PowerLinear(3, 3, alpha=2, stores=stores), nn.Linear(3, 3))
        model[1].weight = model[0].weight
        if message is None:
            pp.powerize(model, 2.0)
            continue
        with pytest.raises(ValueError, match=message):
            pp.powerize(model, 2.0, stores)


@pytest.mark.parametrize(
    ("model", "reader"),
    [
        (nn.MultiheadAttention(4, 2), r"'out_proj' .*the MultiheadAttention given reads"),
        (nn.TransformerEncoderLayer(4, 2, 8), r"'linear1' .*the TransformerEncoderLayer given"),
        (
            nn.Sequential(nn.TransformerEncoderLayer(4, 2, 8)),
            r"cannot store phi, because '0.*reads its weight and would take phi for theta",
        ),
    ],
)
def test_readers_of_a_weight_refuse_phi(model: nn.Module, reader: str) -> None:
    with pytest.raises(ValueError, match=reader):
        pp.powerize(model, 2.0, "phi")
    assert powered_names(model) == {}
    pp.powerize(model, 2.0, "theta")
    assert powered_names(model)


def test_the_fast_path_of_an_encoder_layer_is_left_out_for_phi() -> None:
    model = nn.TransformerEncoderLayer(4, 2, 8)
    with pytest.raises(ValueError, match=r"'linear1' \(Linear\) cannot store phi, because the Tra"):
        pp.powerize(model, 2.0, "phi", select=["linear1"])


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
