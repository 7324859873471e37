"""The sparse layers against the dense ones that they stand for: outputs, gradients, training."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrizations, prune

import ppkernels as pp

FORMS = [None, "theta", "phi"]
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def gradients(layer: nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The output, and the gradients of input and parameters, dense where the layer is sparse."""
    layer.zero_grad()
    x = x.clone().requires_grad_()
    out = layer(x)
    out.square().sum().backward()
    grads = [parameter.grad for parameter in layer.parameters()]
    if hasattr(layer, "topology"):
        grads[0] = layer.topology.scatter(grads[0])
    elif isinstance(layer, pp.nn.Masked):
        grads[0] = pp.apply_mask(grads[0], layer.update_mask.words)
    return out.detach(), [x.grad, *grads]


# ---- from the dense layer and back


@pytest.mark.parametrize("stores", FORMS)
def test_outputs_and_gradients_are_the_dense_ones(
    sparse_pair: Callable[..., tuple], stores: str | None
) -> None:
    dense, sparse, x = sparse_pair(stores)
    torch.testing.assert_close(gradients(sparse, x), gradients(dense, x), **CLOSE)
    assert sparse.weight.shape == (dense.update_mask.count(),)
    assert torch.equal(sparse.dense(), dense.theta)
    with torch.no_grad():
        torch.testing.assert_close(sparse(x), dense(x), **CLOSE)


@pytest.mark.parametrize("stores", FORMS)
def test_to_dense_gives_the_layer_back(
    sparse_pair: Callable[..., tuple], stores: str | None
) -> None:
    dense, sparse, x = sparse_pair(stores)
    sparse.weight.requires_grad_(False)
    back = sparse.eval().to_dense()
    assert type(back) is type(dense)
    assert repr(back) == repr(dense)
    assert torch.equal(back.weight, dense.weight)
    assert back.update_mask == dense.update_mask
    assert back.bias is sparse.bias is dense.bias
    assert not back.training
    assert not back.weight.requires_grad
    assert torch.equal(back(x), dense(x))


def test_what_is_kept() -> None:
    # Of each column of the weight: θ ≠ 0, trained, seen, and whether it is kept.
    table = [
        (1, 1, 1, True),
        (0, 1, 1, True),
        (1, 0, 1, True),
        (0, 0, 1, False),
        (1, 1, 0, True),
        (0, 1, 0, True),
        (1, 0, 0, False),
        (0, 0, 0, False),
    ]
    columns = torch.tensor([row[:3] for row in table], dtype=torch.bool).t()
    dense = pp.nn.PowerLinear(8, 2, alpha=1.5)
    with torch.no_grad():
        dense.weight.mul_(columns[0])
    dense.update_mask = pp.BitMask.pack(columns[1].expand(2, 8))
    dense.mask = pp.BitMask.pack(columns[2].expand(2, 8))
    sparse = pp.nn.SparseLinear.from_linear(dense)
    kept = torch.tensor([row[3] for row in table])
    assert torch.equal(sparse.topology.mask().unpack(), kept.expand(2, 8))
    assert torch.equal(sparse.update_mask.unpack().view(2, -1)[0], columns[1][kept])
    assert torch.equal(sparse.mask.unpack().view(2, -1)[0], columns[2][kept])
    x = torch.randn(3, 8)
    torch.testing.assert_close(sparse(x), dense(x))
    back = sparse.to_dense()
    assert back.update_mask.unpack()[0].tolist() == [bool(row[1] and row[3]) for row in table]
    assert torch.equal(back.weight, dense.weight * kept)
    torch.testing.assert_close(back(x), dense(x))


def test_a_plain_layer_keeps_what_is_not_0() -> None:
    dense = nn.Linear(6, 4).eval()
    with torch.no_grad():
        dense.weight[:, ::2] = 0
        dense.weight[0, 0] = float("nan")
    sparse = pp.nn.SparseLinear.from_linear(dense)
    assert type(sparse) is pp.nn.SparseLinear
    assert sparse.topology.count() == 13
    assert sparse.update_mask is sparse.mask is None
    assert not sparse.training
    assert type(dense) is nn.Linear


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.Linear(3, 2).double(), "float64, and the kernels have float32 and bfloat16"),
        (nn.Linear(3, 2, device="meta"), "on the meta device"),
        (NonDynamicallyQuantizableLinear(3, 2), "and no subclasses"),
        (pp.nn.add_masks(NonDynamicallyQuantizableLinear(3, 2)), "and no subclasses"),
        (nn.Bilinear(3, 2, 2), "only layers of the classes Linear, MaskedLinear, PowerLinear"),
        (prune.identity(nn.Linear(3, 2), "weight"), "no Parameter of its own"),
        (parametrizations.weight_norm(nn.Linear(3, 2)), "has parametrized it"),
        ("text", "it is no module"),
        (nn.Conv1d(3, 2, 1), "only layers of the classes"),
        (nn.Conv2d(4, 2, 1, groups=2), "it has 2 groups, and the sparse convolution has none"),
        (nn.Conv2d(4, 2, 3, padding=1, padding_mode="circular"), "its padding_mode is 'circular'"),
        (nn.Conv2d(4, 2, 2, padding="same"), "padding='same' would take more on one side"),
    ],
    ids=str,
)
def test_layers_that_cannot_be_sparse(layer: nn.Module, reason: str) -> None:
    is_conv = isinstance(layer, nn.Conv2d)
    convert = pp.nn.SparseConv2d.from_conv if is_conv else pp.nn.SparseLinear.from_linear
    with pytest.raises(TypeError, match=f"cannot be sparse: ((?!: ).)*{reason}"):
        convert(layer)


# ---- the constructor


@pytest.mark.parametrize(
    ("sparse", "plain"), [("SparseLinear", nn.Linear), ("SparseConv2d", nn.Conv2d)]
)
def test_constructors_are_the_plain_ones_with_kept(sparse: str, plain: type) -> None:
    theirs = inspect.signature(plain).parameters
    wanted = [(p.name, p.default) for p in theirs.values() if p.name not in NOT_SPARSE]
    for name, more in ((sparse, ["kept"]), (f"Power{sparse}", ["kept", "alpha", "stores"])):
        ours = list(inspect.signature(getattr(pp.nn, name)).parameters.values())
        assert [(p.name, p.default) for p in ours[: len(wanted)]] == wanted
        assert [p.name for p in ours[len(wanted) :]] == more
        assert {p.kind for p in ours[len(wanted) :]} == {inspect.Parameter.KEYWORD_ONLY}


NOT_SPARSE = ("groups", "padding_mode")


@pytest.mark.parametrize("stores", FORMS)
def test_values_start_as_the_dense_ones_do(stores: str | None) -> None:
    form = {} if stores is None else {"alpha": 3.0, "stores": stores}
    prefix = "" if stores is None else "Power"
    linear = getattr(pp.nn, f"{prefix}SparseLinear")(100, 300, kept=0.29, **form)
    conv = getattr(pp.nn, f"{prefix}SparseConv2d")(25, 300, 2, kept=0.29, **form)
    for layer in (linear, conv):
        assert layer.topology.count() == layer.weight.numel() == 8700
        # 1/√fan_in; a powered φ is θ but for its rounding.
        assert 0.095 < layer.theta.abs().max() <= 0.1 * (1 + 1e-6)
        assert abs(layer.theta.std() - 0.1 / 3**0.5) < 2e-3
        assert (layer.theta != 0).all()
        assert 0.09 < layer.bias.abs().max() <= 0.1
        before = layer.weight.clone()
        layer.reset_parameters()
        assert not torch.equal(layer.weight, before)
    # Places are spread over the whole weight.
    rows = linear.topology.offsets.diff()
    assert 15 <= rows.min() < rows.max() <= 45


def test_no_value_starts_as_0() -> None:
    layer = pp.nn.SparseLinear(64, 64, kept=1, dtype=torch.bfloat16)
    for _ in range(5):  # bfloat16 draws 0 once in 2^8 or so
        layer.reset_parameters()
        assert (layer.weight != 0).all()


def test_kept_as_a_mask_or_a_topology() -> None:
    mask = pp.BitMask.pack(torch.rand(4, 6) < 0.5)
    topology = pp.Topology.of_mask(mask)
    for kept in (mask, topology):
        assert pp.nn.SparseLinear(6, 4, kept=kept).topology == topology
    assert pp.nn.SparseLinear(6, 4, kept=topology).topology is topology


@pytest.mark.parametrize(
    ("convert", "dense"),
    [
        (pp.nn.SparseLinear.from_linear, nn.Linear(6, 4)),
        (pp.nn.SparseConv2d.from_conv, nn.Conv2d(6, 4, 3)),
    ],
    ids=["linear", "conv"],
)
def test_a_dense_layer_is_given_what_to_keep(convert: Callable, dense: nn.Module) -> None:
    mask = pp.BitMask.pack(torch.rand_like(dense.weight) < 0.5)
    topology = pp.Topology.of_mask(mask)
    for kept in (mask, topology):
        sparse = convert(dense, kept)
        assert sparse.topology == topology
        assert torch.equal(sparse.weight, topology.gather(dense.weight))
    share = convert(dense, kept=0.5)
    assert share.topology.count() == dense.weight.numel() // 2
    assert torch.equal(share.weight, share.topology.gather(dense.weight))
    with pytest.raises(TypeError, match=r"^Sparse.*from_.*: kept must be"):
        convert(dense, "all")


@pytest.mark.parametrize(
    ("kept", "error", "message"),
    [
        (0.0, ValueError, "kept must be a share above 0 and up to 1, got 0.0"),
        (1.5, ValueError, "kept must be a number from 0 to 1, got 1.5"),
        (10, ValueError, "kept must be a number from 0 to 1, got 10"),
        ("0.1", TypeError, r"a share from 0 to 1, a pp\.Topology or a pp\.BitMask, got '0\.1'"),
        (None, TypeError, r"a share from 0 to 1, a pp\.Topology or a pp\.BitMask, got None"),
        (True, TypeError, "a share from 0 to 1, .*, got True"),
        (torch.ones(4, 6).bool(), TypeError, r"got a tensor; pp\.BitMask\.pack makes a mask"),
        (pp.BitMask.ones((6, 4)), ValueError, r"shape of the weight, \(4, 6\), got \(6, 4\)"),
        (pp.Topology.of(torch.ones(6, 4)), ValueError, r"weight, \(4, 6\), got \(6, 4\)"),
    ],
)
def test_kept_that_is_none(kept: object, error: type, message: str) -> None:
    with pytest.raises(error, match=f"^SparseLinear: .*{message}"):
        pp.nn.SparseLinear(6, 4, kept=kept)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"padding": "full"}, "padding must be 'same', 'valid' or numbers, got 'full'"),
        ({"padding": "same", "stride": 2}, "padding='same' needs stride 1"),
        ({"padding": "same", "kernel_size": (3, 4)}, "more on one side than on the other"),
        ({"stride": 0}, "stride must be"),
        ({"kernel_size": (1, 2, 3)}, "kernel_size must be"),
    ],
    ids=str,
)
def test_convolutions_that_are_none(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pp.nn.SparseConv2d(
            **{"in_channels": 2, "out_channels": 3, "kernel_size": 3, "kept": 1.0, **options}
        )


def test_repr() -> None:
    linear = pp.nn.SparseLinear(8, 4, kept=0.25)
    linear.update_mask = pp.BitMask.pack(torch.arange(8) < 3)
    assert repr(linear) == (
        "SparseLinear(in_features=8, out_features=4, bias=True, kept=8/32, update_mask=3/8)"
    )
    conv = pp.nn.PowerSparseConv2d(2, 4, 3, 2, "valid", bias=False, kept=0.5, alpha=2.0)
    assert repr(conv) == (
        "PowerSparseConv2d(2, 4, kernel_size=(3, 3), stride=(2, 2), padding=valid, bias=False, "
        "alpha=2.0, stores='theta', kept=36/72)"
    )


# ---- what a forward refuses


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.randn(2, 7), ValueError, "input has 7 features, the topology expects 6"),
        (torch.randn(()), ValueError, "input has no dimension, the topology expects 6"),
        (torch.randn(2, 6).double(), TypeError, "input must be float64 where the values are"),
        (torch.ones(2, 6).long(), TypeError, "input must be float32"),
    ],
    ids=str,
)
def test_inputs_that_do_not_fit(x: Tensor, error: type, message: str) -> None:
    for layer in (
        pp.nn.SparseLinear(6, 4, kept=0.5),
        pp.fold(pp.nn.SparseLinear(6, 4, kept=0.5)),
    ):
        with pytest.raises(error, match=message):
            layer(x)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((2, 4, 5, 5), "images of 3 channels"),
        ((3, 5), "images of 3 channels"),
        ((2, 3, 2, 5), "(small|smaller)"),
        ((2, 3, 5, 1), "(small|smaller)"),
    ],
)
def test_images_that_do_not_fit(size: tuple[int, ...], message: str) -> None:
    for layer in (
        pp.nn.SparseConv2d(3, 4, 3, kept=0.5),
        pp.fold(pp.nn.SparseConv2d(3, 4, 3, kept=0.5)),
    ):
        assert layer(torch.randn(3, 5, 5)).shape == (4, 3, 3)
        with pytest.raises(ValueError, match=message):
            layer(torch.randn(size))


def test_weights_that_do_not_fit() -> None:
    layer = pp.nn.SparseLinear(6, 4, kept=0.5)
    with pytest.raises(
        ValueError, match=r"a value for each of the 12 entries .* got shape \(4, 6\)"
    ):
        layer.weight = nn.Parameter(torch.randn(4, 6))
    with pytest.raises(ValueError, match=r"values must have shape \(12,\)"):
        functional_call(layer, {"weight": torch.randn(11)}, torch.randn(2, 6))
    with pytest.raises(AttributeError, match="topology"):
        layer.topology = pp.Topology.of(torch.ones(4, 6))
    with pytest.raises(ValueError, match=r"update_mask must have the shape of weight, \(12,\)"):
        layer.update_mask = pp.BitMask.ones((4, 6))
