"""pp.powerize where a weight is shared, or read by somebody else than its layer."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import ppkernels as pp


def powered_names(model: nn.Module) -> dict[str, float]:
    return {
        name: module.alpha.item()
        for name, module in model.named_modules()
        if isinstance(module, pp.nn.Powered)
    }


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


def test_a_tied_embedding(tied_model: type[nn.Module]) -> None:
    model, x = tied_model(), torch.randint(17, (2, 4))
    with pytest.raises(
        ValueError, match=r"'head' \(Linear\) and 'tokens' \(Embedding\) share one weight"
    ):
        pp.powerize(model, 2.0, "phi", select=["head"])
    assert powered_names(model) == {}
    pp.powerize(model, 2.0, "phi", select=["mix"])
    pp.fold(model)
    model = tied_model()
    expected = model(x)
    pp.powerize(model, 2.0)
    assert model.head.weight is model.tokens.weight
    assert torch.equal(model(x), expected)


def test_ties_to_a_powered_layer_outside_the_model() -> None:
    def tied() -> nn.Sequential:
        model = nn.Sequential(nn.Sequential(nn.Linear(3, 3)), nn.Sequential(nn.Linear(3, 3)))
        model[1][0].weight = model[0][0].weight
        return model

    model = tied()
    pp.powerize(model[0], 2.0, "phi")
    stored = model[0][0].weight.detach().clone()
    with pytest.raises(
        ValueError, match=r"'0' \(Linear\) and PowerLinear.* outside the model share"
    ):
        pp.powerize(model[1], 2.0, "phi")
    with pytest.raises(ValueError, match="so they need the same alpha and stores"):
        pp.powerize(model[1], 2.0, "theta")
    assert torch.equal(model[0][0].weight, stored)
    model = tied()
    pp.powerize(model[0], 2.0)
    with pytest.raises(ValueError, match=r"same alpha and stores; got alpha=3\.0"):
        pp.powerize(model[1], 3.0)
    pp.powerize(model[1], 2.0)
    assert powered_names(model) == {"0.0": 2.0, "1.0": 2.0}


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


def test_readers_elsewhere_refuse_phi() -> None:
    pytest.importorskip("torchvision")
    from torchvision.models.swin_transformer import ShiftedWindowAttentionV2
    from torchvision.models.video.swin_transformer import ShiftedWindowAttention3d

    class OwnAttention(ShiftedWindowAttentionV2):
        pass

    for reader in (
        ShiftedWindowAttentionV2(8, [2, 2], [0, 0], 2),
        OwnAttention(8, [2, 2], [0, 0], 2),
        ShiftedWindowAttention3d(8, [2, 2, 2], [0, 0, 0], 2),
    ):
        for child in ("qkv", "proj"):
            with pytest.raises(ValueError, match=rf"'{child}' \(Linear\) cannot store phi"):
                pp.powerize(reader, 2.0, "phi", select=[child])
        assert powered_names(pp.powerize(reader, 2.0))


@pytest.mark.skipif(not hasattr(nn, "LinearCrossEntropyLoss"), reason="this PyTorch has none")
def test_a_loss_with_a_layer_refuses_phi() -> None:
    with pytest.raises(ValueError, match="the LinearCrossEntropyLoss given reads its weight"):
        pp.powerize(nn.LinearCrossEntropyLoss(4, 3), 2.0, "phi")


def test_the_fast_path_of_an_encoder_layer_is_left_out_for_phi() -> None:
    model = nn.TransformerEncoderLayer(4, 2, 8)
    with pytest.raises(ValueError, match=r"'linear1' \(Linear\) cannot store phi, because the Tra"):
        pp.powerize(model, 2.0, "phi", select=["linear1"])
