"""Checkpoints, copies, casts and devices: the weight and its exponent come through."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch._dynamo
from torch import nn
from torch.nn.utils import prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import ppkernels as pp

STORES = ["theta", "phi"]
ALPHA = 1.1  # not representable in bfloat16: 1.1016


def linear(stores: str, alpha: float = ALPHA, **options: object) -> nn.Module:
    return pp.nn.PowerLinear(6, 4, alpha=alpha, stores=stores, **options)


def saved_and_loaded(state: dict) -> dict:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# ---- casts and devices


@pytest.mark.parametrize("stores", STORES)
@pytest.mark.parametrize(
    ("cast", "dtype"),
    [
        (lambda layer: layer.half(), torch.float16),
        (lambda layer: layer.bfloat16(), torch.bfloat16),
        (lambda layer: layer.float(), torch.float32),
        (lambda layer: layer.to(torch.float16), torch.float16),
        (lambda layer: layer.type(torch.bfloat16), torch.bfloat16),
        (lambda layer: nn.Sequential(layer).bfloat16()[0], torch.bfloat16),
    ],
)
def test_alpha_survives_casts(stores: str, cast: object, dtype: torch.dtype) -> None:
    layer = cast(linear(stores))
    assert layer.weight.dtype == layer.theta.dtype == dtype
    assert layer.alpha.dtype == torch.float64
    assert layer.alpha.item() == ALPHA
    assert [buffer.dtype for buffer in layer.buffers()] in ([torch.float64], [torch.float64] * 2)
    x = torch.randn(2, 6, dtype=dtype)
    assert layer(x).dtype == dtype


@pytest.mark.parametrize("stores", STORES)
def test_meta_device_keeps_alpha(stores: str) -> None:
    with torch.device("meta"):
        layer = linear(stores)
    assert layer.weight.is_meta
    assert layer.theta.is_meta
    assert layer.alpha.item() == ALPHA
    layer.to_empty(device="cpu")
    assert layer.alpha.item() == ALPHA
    source = linear(stores)
    layer.load_state_dict(source.state_dict())
    assert torch.equal(layer.theta, source.theta)
    skipped = nn.utils.skip_init(pp.nn.PowerLinear, 3, 2, alpha=ALPHA, stores=stores)
    assert skipped.alpha.item() == ALPHA


@pytest.mark.gpu
@pytest.mark.gpu
@pytest.mark.parametrize("stores", STORES)
def test_alpha_follows_to_the_gpu(stores: str) -> None:
    layer = linear(stores).cuda().bfloat16()
    assert layer.alpha.is_cuda
    assert layer.alpha.item() == ALPHA
    assert layer(torch.randn(2, 6, device="cuda", dtype=torch.bfloat16)).is_cuda
    assert not layer.cpu().alpha.is_cuda


@pytest.mark.parametrize("stores", STORES)
def test_autocast(stores: str) -> None:
    layer, x = linear(stores, 2.0), torch.randn(3, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(x)
    assert out.dtype == torch.bfloat16
    expected = nn.functional.linear(
        x.bfloat16(), layer.theta.detach().bfloat16(), layer.bias.bfloat16()
    )
    assert torch.equal(out, expected)
    out.sum().backward()
    assert layer.weight.grad.dtype == torch.float32


# ---- copies


@pytest.mark.parametrize("stores", STORES)
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies(stores: str, duplicate: object) -> None:
    layer = linear(stores)
    twin = duplicate(nn.Sequential(layer))[0]
    x = torch.randn(2, 6)
    assert repr(twin) == repr(layer)
    assert torch.equal(twin(x), layer(x))
    pp.set_alpha(twin, 3.0, keep="phi")
    assert layer.alpha.item() == ALPHA
    pp.fold(twin)
    assert type(layer) is pp.nn.PowerLinear


@pytest.mark.parametrize("stores", STORES)
@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize("multi_avg_fn", [None, get_ema_multi_avg_fn(0.5)])
def test_averaged_model(stores: str, use_buffers: bool, multi_avg_fn: object) -> None:
    layer = linear(stores)
    averaged = AveragedModel(layer, multi_avg_fn=multi_avg_fn, use_buffers=use_buffers)
    first = layer.weight.detach().clone()
    averaged.update_parameters(layer)
    with torch.no_grad():
        layer.weight.add_(1)
    averaged.update_parameters(layer)
    torch.testing.assert_close(averaged.module.weight.detach(), first + 0.5)
    assert averaged.module.alpha.item() == ALPHA
    assert averaged.module.alpha.dtype == torch.float64
    assert averaged(torch.randn(2, 6)).shape == (2, 4)
    state = saved_and_loaded(averaged.state_dict())
    AveragedModel(linear(stores, 3.0)).load_state_dict(state)


# ---- checkpoints


def test_what_a_checkpoint_holds() -> None:
    plain = list(nn.Linear(6, 4).state_dict())
    assert list(linear("theta").state_dict()) == [*plain, "alpha"]
    assert list(linear("phi").state_dict()) == [*plain, "alpha", "stores_phi"]


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("as_dict", [False, True])
@pytest.mark.parametrize("target", STORES)
@pytest.mark.parametrize("source", STORES)
def test_round_trip(source: str, target: str, as_dict: bool, assign: bool) -> None:
    saved, layer = nn.Sequential(linear(source)), nn.Sequential(linear(target, 2.5))
    alpha = layer[0].alpha
    state = saved_and_loaded(saved.state_dict())
    if as_dict:  # as a format that stores tensors and nothing else gives it back
        state = dict(state)
    keys = list(state)
    layer.load_state_dict(state, assign=assign)
    assert list(state) == keys
    assert layer[0].stores == target
    assert layer[0].alpha.item() == ALPHA
    assert layer[0].alpha is alpha or assign
    if source == target:
        assert torch.equal(layer[0].weight, saved[0].weight)
    torch.testing.assert_close(layer[0].theta, saved[0].theta, rtol=1e-6, atol=0)


def test_safetensors(tmp_path: object) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    saved, layer = linear("phi"), linear("theta", 2.0)
    safetensors.save_file(saved.state_dict(), tmp_path / "layer.safetensors")
    layer.load_state_dict(safetensors.load_file(tmp_path / "layer.safetensors"))
    assert layer.alpha.item() == ALPHA
    torch.testing.assert_close(layer.theta, saved.theta, rtol=1e-6, atol=0)


@pytest.mark.parametrize("stores", STORES)
@pytest.mark.parametrize("assign", [False, True])
def test_a_plain_checkpoint_holds_theta(stores: str, assign: bool) -> None:
    plain, layer = nn.Linear(6, 4), linear(stores)
    layer.load_state_dict(plain.state_dict(), assign=assign)
    assert layer.alpha.item() == ALPHA
    torch.testing.assert_close(layer.theta, plain.weight, rtol=1e-6, atol=0)
    assert torch.equal(layer.bias, plain.bias)
    incomplete = plain.state_dict()
    del incomplete["weight"]
    with pytest.raises(RuntimeError, match=r'Missing key.*"weight"'):
        layer.load_state_dict(incomplete)
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        layer.load_state_dict(nn.Linear(5, 4).state_dict())
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"extra"'):
        layer.load_state_dict({**plain.state_dict(), "extra": torch.ones(1)})


def test_a_plain_layer_refuses_a_phi_checkpoint() -> None:
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"alpha".*"stores_phi"'):
        nn.Linear(6, 4).load_state_dict(linear("phi").state_dict())


def test_a_wide_checkpoint_is_rounded_once() -> None:
    plain = nn.Linear(6, 4)
    layer = linear("phi", 3.0).bfloat16()
    layer.load_state_dict(plain.state_dict())
    exact = pp.inverse_power(plain.weight.detach(), 3.0).bfloat16()
    assert torch.equal(layer.weight, exact)


def test_tied_layers_load() -> None:
    for stores in STORES:
        model = nn.Sequential(linear(stores, 2.0), nn.Linear(4, 6), linear(stores, 2.0))
        model[2].weight = model[0].weight
        plain = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 6), nn.Linear(6, 4))
        plain[2].weight = plain[0].weight
        model.load_state_dict(plain.state_dict())
        assert model[2].weight is model[0].weight
        torch.testing.assert_close(model[0].theta, plain[0].weight)


def test_a_cast_checkpoint_does_not_change_alpha() -> None:
    state = {key: value.bfloat16() for key, value in linear("theta").state_dict().items()}
    layer = linear("theta")
    layer.load_state_dict(state)
    assert layer.alpha.item() == ALPHA
    with pytest.raises(
        RuntimeError, match=r'"alpha" must be float64, got torch.bfloat16 \(value 1'
    ):
        linear("theta", 2.0).load_state_dict(state)


@pytest.mark.parametrize("stores", STORES)
@pytest.mark.parametrize(
    "replace",
    [
        lambda layer: prune.identity(layer, "weight"),
        nn.utils.parametrizations.weight_norm,
        lambda layer: nn.utils.parametrize.register_parametrization(layer, "weight", nn.Identity()),
    ],
)
def test_a_replaced_weight_takes_no_checkpoint_of_the_other_kind(
    stores: str, replace: object
) -> None:
    other = "phi" if stores == "theta" else "theta"
    layer, same, different = (linear(kind) for kind in (stores, stores, other))
    for one in (layer, same, different):
        replace(one)
    layer.load_state_dict(same.state_dict())
    layer.load_state_dict({}, strict=False)
    with pytest.raises(RuntimeError, match=rf"holds {other} and the layer stores {stores}, which"):
        layer.load_state_dict(different.state_dict())
    if stores == "phi":
        plain = nn.Linear(6, 4)
        replace(plain)
        with pytest.raises(RuntimeError, match="holds theta and the layer stores phi, which is"):
            layer.load_state_dict(plain.state_dict())


def test_an_exponent_that_is_a_number() -> None:
    layer = linear("theta")
    layer.load_state_dict({**layer.state_dict(), "alpha": 2.5})
    assert layer.alpha.item() == 2.5
    with pytest.raises(RuntimeError, match=r'"alpha": alpha must be a float or .*, got str'):
        layer.load_state_dict({**layer.state_dict(), "alpha": "2.5"})


@pytest.mark.parametrize("stores", STORES)
def test_shared_memory_holds_the_exponent_too(stores: str) -> None:
    layer = nn.Sequential(linear(stores)).share_memory()[0]
    assert layer.weight.is_shared()
    assert all(buffer.is_shared() for buffer in layer.buffers())


@pytest.mark.parametrize("alpha", [0.5, float("nan"), float("inf"), [1.0, 2.0]])
def test_a_bad_exponent_in_a_checkpoint_is_refused(alpha: object) -> None:
    state = {**linear("theta").state_dict(), "alpha": torch.tensor(alpha, dtype=torch.float64)}
    layer = nn.Sequential(linear("theta"))
    with pytest.raises(RuntimeError, match=r'"0\.alpha": alpha must be'):
        layer.load_state_dict({f"0.{key}": value for key, value in state.items()})
    assert layer[0].alpha.item() == ALPHA


def test_compiled_graphs_see_alpha_change() -> None:
    layer = nn.Sequential(linear("phi", 1.5), linear("phi", 2.0).requires_grad_(False))[:1]
    x = torch.randn(3, 6)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for alpha, keep in [(1.5, "phi"), (2.0, "phi"), (2.7, "theta"), (1.0, "phi")]:
            pp.set_alpha(layer, alpha, keep=keep)
            layer.zero_grad()
            compiled(x).square().sum().backward()
            grad = layer[0].weight.grad.clone()
            layer.zero_grad()
            expected = layer(x)
            expected.square().sum().backward()
            torch.testing.assert_close(compiled(x), expected)
            torch.testing.assert_close(grad, layer[0].weight.grad)


@pytest.mark.parametrize("stores", STORES)
def test_export(stores: str) -> None:
    layer, x = linear(stores), torch.randn(3, 6)
    exported = torch.export.export(layer, (x,)).module()
    torch.testing.assert_close(exported(x), layer(x))
