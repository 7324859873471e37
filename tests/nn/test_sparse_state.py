"""Sparse layers: checkpoints of any kept share, copies, casts, devices, averages.
Longer than 350 lines: one subject, of layers that are all made by the functions at its head.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import ppkernels as pp

FORMS = [None, "theta", "phi"]
ALPHA = 1.1  # not representable in bfloat16: 1.1016


def linear(kept: object = 0.3, stores: str | None = None, **options: object) -> nn.Module:
    if stores is None:
        return pp.nn.SparseLinear(16, 12, kept=kept, **options)
    return pp.nn.PowerSparseLinear(16, 12, kept=kept, alpha=ALPHA, stores=stores, **options)


def conv(kept: object = 0.3, stores: str | None = None, **options: object) -> nn.Module:
    if stores is None:
        return pp.nn.SparseConv2d(4, 6, 3, kept=kept, **options)
    return pp.nn.PowerSparseConv2d(4, 6, 3, kept=kept, alpha=ALPHA, stores=stores, **options)


KINDS = {"linear": (linear, (5, 16)), "conv": (conv, (2, 4, 6, 6))}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> tuple[Callable[..., nn.Module], Tensor]:
    """What makes a layer, and an input of it."""
    make, size = KINDS[request.param]
    return make, torch.randn(size)


def saved_and_loaded(state: dict) -> dict:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def masked(layer: nn.Module) -> nn.Module:
    """``layer`` with both masks."""
    layer.update_mask = pp.BitMask.pack(torch.rand(layer.weight.shape) < 0.7)
    layer.mask = pp.BitMask.pack(torch.rand(layer.weight.shape) < 0.8)
    return layer


# ---- checkpoints


def test_what_a_checkpoint_holds() -> None:
    indices, masks = ["offsets", "columns"], ["update_mask", "mask"]
    assert list(linear().state_dict()) == ["weight", "bias", *indices]
    assert list(linear(bias=False).state_dict()) == ["weight", *indices]
    state = masked(linear(stores="phi")).state_dict()
    assert list(state) == ["weight", "bias", "alpha", "stores_phi", *masks, *indices]
    assert state["offsets"].dtype == torch.int32
    assert state["columns"].dtype == torch.uint16
    assert pp.nn.SparseLinear(70_000, 1, kept=0.01).state_dict()["columns"].dtype == torch.int32
    state["offsets"].zero_()  # a copy


@pytest.mark.parametrize("own_kept", [0.1, 0.3, 1.0])
@pytest.mark.parametrize("target", FORMS)
@pytest.mark.parametrize("source", FORMS)
def test_a_checkpoint_of_any_kept_share_loads(
    kind: tuple, source: str | None, target: str | None, own_kept: float
) -> None:
    make, x = kind
    saved, layer = nn.Sequential(masked(make(0.3, source))), nn.Sequential(make(own_kept, target))
    weight = layer[0].weight
    # A graph that is alive while the number of entries changes.
    loss = layer(x).sum()
    loss.backward()
    state = saved_and_loaded(saved.state_dict())
    keys = list(state)
    if source is not None and target is None:
        with pytest.raises(RuntimeError, match=r"phi, under an exponent|Unexpected key.*alpha"):
            layer.load_state_dict(state)
        return
    layer.load_state_dict(state)
    assert list(state) == keys
    assert layer[0].weight is weight
    assert weight.grad is None
    assert layer[0].topology == saved[0].topology
    for name in ("update_mask", "mask"):
        assert getattr(layer[0], name) == getattr(saved[0], name)
    if source == target:
        assert torch.equal(weight, saved[0].weight)
    torch.testing.assert_close(layer[0].dense(), saved[0].dense(), rtol=1e-6, atol=0)
    torch.testing.assert_close(layer(x), saved(x))
    layer(x).sum().backward()
    assert weight.grad.shape == weight.shape


@pytest.mark.parametrize("stores", FORMS)
def test_a_checkpoint_is_assigned(kind: tuple, stores: str | None) -> None:
    make, x = kind
    saved = masked(make(0.3, stores))
    state = saved_and_loaded(saved.state_dict())
    with torch.device("meta"):
        fresh = make(0.1, stores)
    assert fresh.weight.is_meta
    assert fresh(torch.empty_like(x, device="meta")).is_meta
    for layer in (make(0.5, stores), fresh):
        layer.load_state_dict(state, assign=True)
        assert torch.equal(layer(x), saved(x))
        layer(x).sum().backward()
        assert layer.weight.grad.shape == saved.weight.shape


@pytest.fixture
def swaps_parameters() -> Iterator[None]:
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


@pytest.mark.usefixtures("swaps_parameters")
def test_parameters_that_are_swapped(kind: tuple) -> None:
    make, x = kind
    model = nn.Sequential(make(0.1))
    for kept in (0.3, 0.2):
        saved = nn.Sequential(make(kept))
        model.load_state_dict(saved.state_dict())
        assert torch.equal(model(x), saved(x))
    pp.densify(model.to(torch.bfloat16)).to(torch.float32)
    torch.testing.assert_close(model(x), saved(x), rtol=0.05, atol=0.05)


def test_a_checkpoint_without_masks_takes_them_away() -> None:
    layer = masked(linear())
    layer.load_state_dict(linear(0.1).state_dict())
    assert layer.update_mask is layer.mask is None
    same = masked(linear(layer.topology))
    same.load_state_dict(layer.state_dict())
    assert same.update_mask is same.mask is None


def exchanged(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict], dict]:
    return lambda state: {**state, name: change(state[name])}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (exchanged("columns", lambda t: t.int()), "columns must be a uint16 tensor, got int32"),
        (exchanged("columns", lambda t: t[1:]), "end with the number of columns"),
        (
            exchanged("columns", lambda t: torch.full_like(t.int(), 999).to(t.dtype)),
            "columns must be >= 0 and < ",
        ),
        (exchanged("columns", lambda t: t.int().flip(0).to(t.dtype)), "must ascend"),
        (exchanged("offsets", lambda t: t.flip(0)), "offsets must begin with 0"),
        (exchanged("offsets", lambda t: t[1:]), "offsets must have shape"),
        (exchanged("offsets", lambda t: t.tolist()), "offsets must be a int32 tensor, got list"),
        (exchanged("weight", lambda t: t[1:]), "entries, and the weight beside it has shape"),
        (lambda state: {k: v for k, v in state.items() if k != "columns"}, "has offsets, and not"),
    ],
)
@pytest.mark.parametrize("kept", [0.1, 0.3])
def test_damaged_indices_change_nothing(
    kind: tuple, damage: Callable[[dict], dict], message: str, kept: float
) -> None:
    make, _ = kind
    model = nn.Sequential(masked(make(kept)))
    weight, topology = model[0].weight, model[0].topology
    before, masks = weight.detach().clone(), (model[0].update_mask, model[0].mask)
    weight.grad = torch.ones_like(weight)
    state = damage(make(0.3).state_dict())
    with pytest.raises(RuntimeError, match=rf'"0\.weight": .*{message}'):
        model.load_state_dict({f"0.{name}": value for name, value in state.items()}, strict=False)
    assert model[0].weight is weight
    assert torch.equal(weight, before)
    assert weight.grad is not None
    assert model[0].topology is topology
    assert (model[0].update_mask, model[0].mask) == masks


def test_a_checkpoint_without_indices() -> None:
    layer, other = linear(), linear()
    values = {name: other.state_dict()[name] for name in ("weight", "bias")}
    with pytest.raises(RuntimeError, match=r'Missing key.*"offsets", "columns"'):
        layer.load_state_dict(values)
    topology = layer.topology
    missing = layer.load_state_dict(values, strict=False).missing_keys
    assert missing == ["offsets", "columns"]
    assert layer.topology is topology
    assert torch.equal(layer.weight, other.weight)
    assert layer.load_state_dict({}, strict=False).missing_keys == [
        *("offsets", "columns"),
        *("weight", "bias"),
    ]


@pytest.mark.parametrize("stores", FORMS)
def test_a_dense_checkpoint_that_fits_is_taken(kind: tuple, stores: str | None) -> None:
    make, x = kind
    layer = masked(make(0.3, stores))
    dense = layer.to_dense()
    with torch.no_grad():
        dense.weight.mul_(2)
    target = make(layer.topology, stores)
    target.load_state_dict(dense.state_dict())
    assert torch.equal(target.dense(), dense.theta)
    assert target.update_mask == layer.update_mask
    assert target.mask == layer.mask
    torch.testing.assert_close(target(x), dense(x))
    with torch.no_grad():
        dense.weight[0].fill_(1)
    before = target.weight.detach().clone()
    with pytest.raises(RuntimeError, match="of its entries that are not 0 stand where this layer"):
        target.load_state_dict(dense.state_dict())
    assert torch.equal(target.weight, before)


def test_a_plain_checkpoint_that_fits_is_taken() -> None:
    plain, layer = nn.Linear(16, 12), linear(1.0)
    masked(layer)
    masks = (layer.update_mask, layer.mask)
    layer.load_state_dict(plain.state_dict())
    assert torch.equal(layer.weight, plain.weight.flatten())
    assert (layer.update_mask, layer.mask) == masks
    with pytest.raises(RuntimeError, match=r"size mismatch for weight"):
        layer.load_state_dict(nn.Linear(15, 12).state_dict())


@pytest.mark.parametrize("dense", [pp.nn.MaskedLinear, pp.nn.PowerLinear, nn.Linear])
def test_a_dense_layer_refuses_a_sparse_checkpoint(dense: type) -> None:
    powered = dense is pp.nn.PowerLinear
    layer = dense(16, 12, **({"alpha": 2.0} if powered else {}))
    before = layer.weight.detach().clone()
    message = "Unexpected key" if dense is nn.Linear else "the kept values of a sparse layer, and"
    with pytest.raises(RuntimeError, match=message):
        layer.load_state_dict(linear().state_dict())
    assert torch.equal(layer.weight, before)


def test_tied_layers_load() -> None:
    first = linear()
    second = linear(first.topology)
    model, twin = nn.Sequential(first, second), nn.Sequential(linear(0.1), linear(0.1))
    second.weight = first.weight
    with pytest.raises(ValueError, match="a value for each of the 57 entries"):
        linear().weight = linear(0.5).weight
    twin[1] = linear(twin[0].topology)
    twin[1].weight = twin[0].weight
    twin.load_state_dict(model.state_dict())
    assert twin[0].weight is twin[1].weight
    assert torch.equal(twin[0].dense(), first.dense())
    assert torch.equal(twin[1].dense(), first.dense())


def test_safetensors(tmp_path: object, kind: tuple) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    make, x = kind
    for stores in FORMS:
        saved, layer = masked(make(0.3, stores)), make(0.1, stores)
        safetensors.save_file(saved.state_dict(), tmp_path / "layer.safetensors")
        layer.load_state_dict(safetensors.load_file(tmp_path / "layer.safetensors"))
        assert torch.equal(layer(x), saved(x))


class Twice(nn.Module):
    """A layer under two names, one of which files of ``save_model`` drop."""

    def __init__(self, layer: nn.Module, names: str) -> None:
        super().__init__()
        for name in names:
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))


class Tied(Twice):
    """Two layers that share their weight."""

    def __init__(self, layer: nn.Module, names: str) -> None:
        super().__init__(layer, names[:1])
        options = {"kept": layer.topology} | (
            {"alpha": layer.alpha, "stores": layer.stores} if hasattr(layer, "alpha") else {}
        )
        other = type(layer)(12, 12, **options)
        other.weight = layer.weight
        self.add_module(names[1], other)


@pytest.mark.parametrize("order", ["ab", "ba"])
@pytest.mark.parametrize("shared", [Twice, Tied])
@pytest.mark.parametrize("stores", FORMS)
def test_files_that_hold_a_shared_weight_once(
    tmp_path: object, shared: type, order: str, stores: str | None
) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    form = {} if stores is None else {"alpha": ALPHA, "stores": stores}
    make = pp.nn.SparseLinear if stores is None else pp.nn.PowerSparseLinear
    file, x = tmp_path / "model.safetensors", torch.randn(3, 12)
    saved = shared(masked(make(12, 12, kept=0.3, **form)), order)
    saved.b.mask, saved.b.update_mask = saved.a.mask, saved.a.update_mask
    safetensors.save_model(saved, file)
    fresh = shared(make(12, 12, kept=0.1, **form), order)
    safetensors.load_model(fresh, file)
    assert torch.equal(fresh(x), saved(x))
    assert fresh.a.weight is fresh.b.weight
    for name in "ab":
        own, theirs = getattr(fresh, name), getattr(saved, name)
        assert own.topology == theirs.topology
        assert (own.mask, own.update_mask) == (theirs.mask, theirs.update_mask)


@pytest.mark.parametrize("stores", FORMS)
def test_indices_without_values(stores: str | None) -> None:
    layer, other = linear(0.3, stores), linear(0.4, stores)
    before, kept = layer.dense(), layer.topology.mask().unpack()
    state = other.state_dict()
    del state["weight"]
    assert layer.load_state_dict(state, strict=False).missing_keys == ["weight"]
    assert layer.topology == other.topology
    both = kept & other.topology.mask().unpack()
    assert torch.equal(layer.dense()[both], before[both])
    drawn = layer.dense()[other.topology.mask().unpack() & ~kept].abs()
    assert drawn.min() > 0
    assert 0.1 < drawn.max() <= 0.25 * (1 + 1e-6)  # 1/√fan_in
    with pytest.raises(RuntimeError, match="Missing key"):
        linear(0.1, stores).load_state_dict(state)


def test_an_optimizer_resumes() -> None:
    torch.manual_seed(1)
    x = torch.randn(5, 16)

    def step(layer: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        layer(x).square().sum().backward()
        optimizer.step()

    layer = linear(0.3, "theta")
    optimizer = pp.optim.PowerAdamW(layer.parameters(), lr=0.01)
    step(layer, optimizer)
    fresh = linear(0.1, "theta")
    again = pp.optim.PowerAdamW(fresh.parameters(), lr=0.5)
    fresh.load_state_dict(saved_and_loaded(layer.state_dict()))
    again.load_state_dict(saved_and_loaded(optimizer.state_dict()))
    for _ in range(3):
        step(layer, optimizer)
        step(fresh, again)
    assert torch.equal(fresh.weight, layer.weight)


# ---- copies


@pytest.mark.parametrize("stores", FORMS)
@pytest.mark.parametrize(
    "duplicate",
    [
        copy.deepcopy,
        lambda model: pickle.loads(pickle.dumps(model)),
        lambda model: torch.load(whole(model), weights_only=False),
    ],
    ids=["deepcopy", "pickle", "torch.save"],
)
@pytest.mark.parametrize("folded", [False, True])
def test_copies(
    kind: tuple, stores: str | None, duplicate: Callable[..., nn.Module], folded: bool
) -> None:
    make, x = kind
    model = nn.Sequential(masked(make(0.3, stores)))
    model = pp.fold(model) if folded else model
    twin = duplicate(model)
    assert repr(twin) == repr(model)
    assert twin[0].topology == model[0].topology
    assert twin[0].columns.dtype == torch.uint16 if folded else True
    out = model(x)
    assert torch.equal(twin(x), out)
    with torch.no_grad():
        twin[0].weight.mul_(2)
    assert torch.equal(model(x), out)


def whole(model: nn.Module) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return file


def test_an_average_over_steps(kind: tuple) -> None:
    make, x = kind
    layer = make(0.3, "theta")
    averaged = AveragedModel(layer)
    first = layer.weight.detach().clone()
    averaged.update_parameters(layer)
    with torch.no_grad():
        layer.weight.add_(1)
    averaged.update_parameters(layer)
    torch.testing.assert_close(averaged.module.weight.detach(), first + 0.5)
    assert averaged.module.topology == layer.topology
    again = AveragedModel(make(0.1, "theta"))
    again.load_state_dict(saved_and_loaded(averaged.state_dict()))
    assert torch.equal(again(x), averaged(x))


# ---- dtypes and devices


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize(
    ("dtype", "close"),
    [
        (torch.float64, 1e-5),
        (torch.float16, 0.02),
        (torch.bfloat16, 0.1),
    ],
)
@pytest.mark.parametrize("stores", FORMS)
def test_casts(
    kind: tuple, stores: str | None, dtype: torch.dtype, close: float, folded: bool
) -> None:
    make, x = kind
    layer = make(0.3, stores)
    expected = layer(x).detach()
    layer = pp.fold(layer) if folded else layer
    topology = layer.topology
    layer.to(dtype)
    assert layer.topology == topology
    assert layer.weight.dtype == dtype
    out = layer(x.to(dtype))
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), expected, rtol=close, atol=close)
    if not folded:
        out.sum().backward()
        assert layer.weight.grad.dtype == dtype
        assert stores is None or layer.alpha.item() == ALPHA


@pytest.mark.parametrize("stores", FORMS)
def test_the_meta_device_keeps_the_topology(kind: tuple, stores: str | None) -> None:
    make, x = kind
    torch.manual_seed(3)
    topology = make(0.3, stores).topology
    torch.manual_seed(3)
    with torch.device("meta"):
        layer = make(0.3, stores)
    assert layer.weight.is_meta
    assert layer.topology == topology
    layer.to_empty(device="cpu")
    layer.reset_parameters()
    assert layer.topology == topology
    assert layer(x).isfinite().all()
    moved = make(0.3, stores)
    topology = moved.topology
    moved.to("meta")
    assert moved.topology is topology
    with pytest.raises(TypeError, match="on the meta device"):
        pp.nn.SparseLinear.from_linear(nn.Linear(3, 2, device="meta"))


@pytest.mark.gpu
def test_layers_follow_to_the_gpu(kind: tuple) -> None:
    make, x = kind
    for stores in FORMS:
        layer = masked(make(0.3, stores))
        expected = layer(x)
        on_gpu = copy.deepcopy(layer).cuda()
        assert on_gpu.topology.device.type == "cuda"
        out = on_gpu(x.cuda())
        torch.testing.assert_close(out.cpu(), expected, rtol=1e-3, atol=1e-3)
        out.sum().backward()
        folded = pp.fold(on_gpu)
        torch.testing.assert_close(folded(x.cuda()), out)
        assert folded.cpu()(x).shape == expected.shape


def test_shared_memory_holds_the_values(kind: tuple) -> None:
    make, x = kind
    layer = masked(make(0.3, "theta"))
    expected = layer(x)
    layer.share_memory()
    assert layer.weight.is_shared()
    assert layer.alpha.is_shared()
    assert layer.mask.words.is_shared()
    assert torch.equal(layer(x), expected)
