"""The masks of a layer: what they do, and that they come through copies and checkpoints."""
# Longer than 350 lines: one subject, and each test needs masks on a layer of each kind.

from __future__ import annotations

import copy
import io
import pickle
import re

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import ppkernels as pp
from ppkernels import BitMask

ALPHA = 1.5
MASKS = ("update_mask", "mask")

# A plain layer, and a powered one of either form.
each_kind = pytest.mark.parametrize("kind", ["plain", "theta", "phi"])
each_form = pytest.mark.parametrize("kind", ["theta", "phi"])
each_mask = pytest.mark.parametrize("name", MASKS)


def linear(kind: str, inputs: int = 6) -> nn.Module:
    if kind == "plain":
        return pp.nn.MaskedLinear(inputs, 5)
    return pp.nn.PowerLinear(inputs, 5, alpha=ALPHA, stores=kind)


def convolution(kind: str) -> nn.Module:
    if kind == "plain":
        return pp.nn.MaskedConv2d(3, 4, 3)
    return pp.nn.PowerConv2d(3, 4, 3, alpha=ALPHA, stores=kind)


def random_mask(*shape: int) -> BitMask:
    return BitMask.pack(torch.rand(shape) < 0.4)


def masked_linear(kind: str) -> nn.Module:
    layer = linear(kind)
    layer.update_mask, layer.mask = random_mask(5, 6), random_mask(5, 6)
    return layer


def shown_theta(layer: nn.Module) -> Tensor:
    """θ with the forward mask applied, by the definition."""
    holds_phi = getattr(layer, "stores", None) == "phi"
    theta = pp.power(layer.weight, layer.alpha) if holds_phi else layer.weight
    return torch.where(layer.mask.unpack(), theta, 0.0)


def same_masks(layer: nn.Module, other: nn.Module) -> bool:
    return layer.update_mask == other.update_mask and layer.mask == other.mask


# ---- the forward


@each_kind
def test_linear_uses_the_masked_weight(kind: str) -> None:
    layer, x = linear(kind), torch.randn(3, 6)
    assert layer.mask is None
    assert layer.update_mask is None
    plain = layer(x)
    layer.mask = random_mask(5, 6)
    assert torch.equal(layer.theta, shown_theta(layer))
    assert torch.equal(layer(x), F.linear(x, shown_theta(layer), layer.bias))
    layer.mask = None
    assert torch.equal(layer(x), plain)


@each_kind
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_convolution_uses_the_masked_weight(kind: str, memory_format: torch.memory_format) -> None:
    layer = convolution(kind).to(memory_format=memory_format)
    x = torch.randn(2, 3, 7, 7)
    layer.mask = random_mask(4, 3, 3, 3)
    torch.testing.assert_close(layer(x), F.conv2d(x, shown_theta(layer), layer.bias))
    assert layer.theta.is_contiguous(memory_format=memory_format)
    hidden = ~layer.mask.unpack()
    (grad,) = torch.autograd.grad(layer(x).sum(), layer.weight)
    assert grad.is_contiguous(memory_format=memory_format)
    assert (grad[hidden] == 0).all()
    expected = F.conv2d(x, shown_theta(layer), layer.bias).sum()
    torch.testing.assert_close(grad, torch.autograd.grad(expected, layer.weight)[0])


def test_a_layer_that_stores_phi_masks_in_the_pass_of_the_power() -> None:
    layer, x = linear("phi"), torch.randn(3, 6)
    layer.mask = random_mask(5, 6)
    with torch.profiler.profile() as profile:
        layer(x).sum().backward()
    ours = [event.name for event in profile.events() if event.name.startswith("ppkernels::")]
    assert ours == ["ppkernels::power", "ppkernels::power_backward"]


@each_kind
def test_hidden_values_survive_and_get_no_gradient(kind: str) -> None:
    layer = linear(kind)
    stored = layer.weight.detach().clone()
    layer.mask = random_mask(5, 6)
    hidden = ~layer.mask.unpack()
    layer(torch.randn(3, 6)).sum().backward()
    assert (layer.weight.grad[hidden] == 0).all()
    assert (layer.weight.grad[~hidden] != 0).all()
    assert torch.equal(layer.weight, stored)
    with torch.no_grad():
        layer.weight[hidden] = torch.tensor([torch.nan, torch.inf]).repeat(15)[: hidden.sum()]
    layer.zero_grad()
    result = layer(torch.randn(3, 6))
    assert result.isfinite().all()
    # A gradient of which nothing is finite: where the bit is 0, it is +0 all the same.
    (result * torch.nan).sum().backward()
    assert torch.equal(layer.weight.grad.isnan(), ~hidden)
    assert not layer.weight.grad[hidden].signbit().any()


@each_kind
def test_an_update_mask_does_not_change_the_forward(kind: str) -> None:
    layer, x = linear(kind), torch.randn(3, 6)
    plain = layer(x)
    layer.update_mask = random_mask(5, 6)
    assert torch.equal(layer(x), plain)


@each_kind
def test_functional_gradients(kind: str) -> None:
    layer, x = masked_linear(kind), torch.randn(3, 6)
    state = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}

    def loss(weight: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {**state, "weight": weight}, (x,)).square().sum()

    layer(x).square().sum().backward()
    grad = torch.func.grad(loss)(layer.weight.detach())
    torch.testing.assert_close(grad, layer.weight.grad)


@each_kind
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_layers_see_each_new_mask(kind: str, backend: str) -> None:
    model = nn.Sequential(linear(kind), linear(kind, 5))
    x = torch.randn(3, 6)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    torch.testing.assert_close(compiled(x), model(x))
    # More often than PyTorch would compile one function.
    for _ in range(10):
        for layer in model:
            layer.mask = random_mask(*layer.weight.shape)
        compiled(x).sum().backward()
        grads = [p.grad for p in model.parameters()]
        model.zero_grad()
        torch.testing.assert_close(compiled(x), model(x))
        model(x).sum().backward()
        torch.testing.assert_close(grads, [p.grad for p in model.parameters()])
        model.zero_grad()
    assert counter.frame_count <= 3
    model[0].mask = None
    torch.testing.assert_close(compiled(x), model(x))


@each_kind
def test_export(kind: str) -> None:
    layer, x = masked_linear(kind), torch.randn(3, 6)
    exported = torch.export.export(layer, (x,)).module()
    torch.testing.assert_close(exported(x), layer(x))


# ---- assignment


@each_mask
@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (
            torch.ones(5, 6, dtype=torch.bool),
            TypeError,
            "must be a pp.BitMask or None, got a bool tensor; pp.BitMask.pack(tensor) makes one",
        ),
        (torch.ones(5, 6), TypeError, "must be a pp.BitMask or None, got Tensor"),
        (True, TypeError, "must be a pp.BitMask or None, got bool"),
        (BitMask.ones((6, 5)), ValueError, "must have the shape of weight, (5, 6), got (6, 5)"),
        (BitMask.ones(30), ValueError, "must have the shape of weight, (5, 6), got (30,)"),
    ],
)
def test_bad_masks(name: str, value: object, error: type[Exception], message: str) -> None:
    layer = masked_linear("theta")
    before = getattr(layer, name)
    with pytest.raises(error, match="^" + re.escape(f"PowerLinear: {name} {message}")):
        setattr(layer, name, value)
    assert getattr(layer, name) is before


@each_mask
def test_a_weight_of_another_shape_does_not_fit_under_a_mask(name: str) -> None:
    layer = linear("theta")
    setattr(layer, name, random_mask(5, 6))
    weight = layer.weight
    message = rf"new weight must have the shape of {name}, \(5, 6\), got \(4, 6\); set the masks"
    for attempt in (
        lambda: setattr(layer, "weight", nn.Parameter(torch.ones(4, 6))),
        lambda: layer.register_parameter("weight", nn.Parameter(torch.ones(4, 6))),
    ):
        with pytest.raises(ValueError, match=f"^PowerLinear: the {message}"):
            attempt()
    assert layer.weight is weight
    layer.weight = nn.Parameter(torch.ones(5, 6))
    assert getattr(layer, name) is not None
    setattr(layer, name, None)
    layer.weight = nn.Parameter(torch.ones(4, 6))


@each_kind
def test_repr_shows_how_much_is_kept(kind: str) -> None:
    layer = linear(kind)
    assert "mask" not in repr(layer)
    layer.update_mask = BitMask.pack(torch.arange(30).view(5, 6) < 7)
    before = "bias=True" if kind == "plain" else f"alpha=1.5, stores='{kind}'"
    assert repr(layer).endswith(f"{before}, update_mask=7/30)")
    layer.mask = BitMask.ones((5, 6))
    assert repr(layer).endswith(f"{before}, update_mask=7/30, mask=30/30)")


@each_kind
def test_set_theta_stores_what_is_hidden_too(kind: str) -> None:
    layer, values = masked_linear(kind), torch.randn(5, 6)
    layer.set_theta(values)
    torch.testing.assert_close(layer.theta, torch.where(layer.mask.unpack(), values, 0.0))
    layer.mask = None
    torch.testing.assert_close(layer.theta, values)


# ---- copies, casts, devices


@each_kind
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies(kind: str, duplicate: object) -> None:
    layer, x = masked_linear(kind), torch.randn(3, 6)
    twin = duplicate(nn.Sequential(layer))[0]
    assert same_masks(twin, layer)
    assert torch.equal(twin(x), layer(x))
    twin.mask = None
    assert layer.mask is not None


@each_kind
def test_casts_and_devices(kind: str) -> None:
    layer = masked_linear(kind)
    update_mask, mask = layer.update_mask, layer.mask
    for cast in (
        lambda: layer.bfloat16(),
        lambda: layer.type(torch.float64),
        lambda: layer.to(torch.float32),
        lambda: layer.to("meta"),
        lambda: layer.to_empty(device="cpu"),
        lambda: layer.share_memory(),
    ):
        cast()
        assert layer.update_mask == update_mask
        assert layer.mask == mask
    assert layer.mask.words.is_shared()
    with torch.device("meta"):
        absent = linear(kind)
    absent.mask = mask
    assert absent(torch.empty(3, 6, device="meta")).is_meta
    assert absent.to_empty(device="cpu").mask == mask


@pytest.mark.gpu
@pytest.mark.gpu
@each_kind
def test_masks_follow_to_the_gpu(kind: str) -> None:
    layer, x = masked_linear(kind), torch.randn(3, 6)
    expected, mask = layer(x), layer.mask
    layer.cuda()
    assert layer.mask.device.type == layer.update_mask.device.type == "cuda"
    torch.testing.assert_close(layer(x.cuda()).cpu(), expected)
    layer.mask = mask
    assert layer.mask.device.type == "cuda"
    assert layer.cpu().mask == mask


# ---- averages


@each_kind
@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize("multi_avg_fn", [None, get_ema_multi_avg_fn(0.5)])
def test_averaged_model(kind: str, use_buffers: bool, multi_avg_fn: object) -> None:
    layer, x = masked_linear(kind), torch.randn(3, 6)
    averaged = AveragedModel(layer, multi_avg_fn=multi_avg_fn, use_buffers=use_buffers)
    before = copy.deepcopy(layer)
    for _ in range(3):
        averaged.update_parameters(layer)
    assert same_masks(averaged.module, before)
    assert torch.equal(averaged(x), layer(x))


@each_kind
def test_an_average_over_state_dicts_leaves_the_masks_alone(kind: str) -> None:
    layer, other = masked_linear(kind), masked_linear(kind)
    before = copy.deepcopy(layer)
    theirs = other.state_dict()
    for name, tensor in layer.state_dict().items():
        tensor.copy_(tensor * 0.5 + 0.5 * theirs[name])
    assert not torch.equal(layer.weight, before.weight)
    assert same_masks(layer, before)
    assert [name for name, _ in layer.named_buffers() if "mask" in name] == []


# ---- checkpoints


def through_a_file(state: dict[str, Tensor]) -> dict[str, Tensor]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def through_safetensors(state: dict[str, Tensor]) -> dict[str, Tensor]:
    tensors = pytest.importorskip("safetensors.torch")
    return tensors.load(tensors.save(state))


@each_kind
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("save", [through_a_file, through_safetensors])
def test_a_fresh_model_takes_the_masks(kind: str, assign: bool, save: object) -> None:
    model = nn.Sequential(masked_linear(kind), nn.ReLU(), nn.Linear(5, 2))
    state = model.state_dict()
    assert {"0.update_mask", "0.mask"} <= set(state)
    assert state["0.mask"].dtype == torch.uint8
    fresh = nn.Sequential(linear(kind), nn.ReLU(), nn.Linear(5, 2))
    fresh.load_state_dict(save(state), strict=True, assign=assign)
    assert same_masks(fresh[0], model[0])
    x = torch.randn(3, 6)
    assert torch.equal(fresh(x), model(x))
    # The layer has words of its own.
    state["0.mask"].zero_()
    assert same_masks(fresh[0], model[0])


@each_mask
def test_one_mask_alone(name: str) -> None:
    layer, fresh = linear("theta"), masked_linear("theta")
    setattr(layer, name, random_mask(5, 6))
    other = MASKS[1 - MASKS.index(name)]
    assert name in layer.state_dict()
    assert other not in layer.state_dict()
    fresh.load_state_dict(layer.state_dict())
    assert getattr(fresh, name) == getattr(layer, name)
    assert getattr(fresh, other) is None


@each_form
def test_a_powered_checkpoint_without_masks_clears_them(kind: str) -> None:
    layer = masked_linear(kind)
    layer.load_state_dict(linear(kind).state_dict())
    assert layer.update_mask is None
    assert layer.mask is None


@each_kind
def test_a_plain_checkpoint_leaves_them(kind: str) -> None:
    layer = masked_linear(kind)
    before, plain = copy.deepcopy(layer), nn.Linear(6, 5)
    layer.load_state_dict(plain.state_dict())
    assert same_masks(layer, before)
    torch.testing.assert_close(
        layer.theta, torch.where(before.mask.unpack(), plain.weight, 0.0), rtol=1e-6, atol=0
    )


def test_masks_go_from_one_storage_to_the_other() -> None:
    source, target = masked_linear("phi"), linear("theta")
    target.load_state_dict(source.state_dict())
    assert same_masks(target, source)
    torch.testing.assert_close(target.theta, source.theta)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (torch.zeros(3, dtype=torch.uint8), "one bit for each of 30 entries, that is 4 bytes, got"),
        (torch.zeros(4), "words must be a uint8 tensor, got float32"),
        (torch.zeros(5, 6, dtype=torch.bool), "got a bool tensor; BitMask.pack(mask) makes"),
        (torch.zeros(2, 2, dtype=torch.uint8), "words must be a contiguous 1-dim tensor"),
        ("0110", "words must be a uint8 tensor, got str"),
    ],
)
@each_mask
def test_a_wrong_mask_is_an_error_and_none_is_taken(name: str, words: object, message: str) -> None:
    layer = nn.Sequential(masked_linear("theta"))
    before = copy.deepcopy(layer)
    state = {**nn.Sequential(masked_linear("theta")).state_dict(), f"0.{name}": words}
    with pytest.raises(RuntimeError, match=f'"0.{name}": BitMask: .*{re.escape(message)}'):
        layer.load_state_dict(state)
    assert same_masks(layer[0], before[0])


def test_a_plain_layer_refuses_the_masks() -> None:
    with pytest.raises(RuntimeError, match=r"Unexpected key.*update_mask"):
        nn.Linear(6, 5).load_state_dict(masked_linear("theta").state_dict())


# ---- powerize, fold


@each_kind
def test_fold_gives_the_masked_weight(kind: str) -> None:
    model, x = nn.Sequential(masked_linear(kind)), torch.randn(3, 6)
    expected, theta = model(x), model[0].theta.detach().clone()
    pp.fold(model)
    assert type(model[0]) is nn.Linear
    assert torch.equal(model(x), expected)
    assert torch.equal(model[0].weight, theta)
    assert set(model.state_dict()) == {"0.weight", "0.bias"}
    pp.powerize(model, ALPHA)
    assert model[0].mask is None
    assert model[0].update_mask is None


def test_fold_of_layers_that_share_a_weight() -> None:
    first, second = masked_linear("theta"), linear("theta")
    second.weight = first.weight
    model = nn.Sequential(first, nn.Flatten(), second)
    before = first.weight.detach().clone()
    with pytest.raises(ValueError, match=r"fold: '0'.* and '2'.* share one weight, and the first"):
        pp.fold(model)
    mixed = nn.Sequential(masked_linear("theta"), nn.Linear(6, 5))
    mixed[1].weight = mixed[0].weight
    with pytest.raises(ValueError, match=r"fold: '0'.* and '1'.* share one weight, and the first"):
        pp.fold(mixed)
    with pytest.raises(ValueError, match=r"which a mask hides in part, with PowerLinear.* outside"):
        pp.fold(first)
    assert torch.equal(first.weight, before)
    second.mask = first.mask
    expected = first.theta.detach().clone()
    pp.fold(model)
    assert torch.equal(second.weight, expected)


@each_mask
def test_powerize_refuses_a_layer_with_such_an_attribute(name: str) -> None:
    layer = nn.Linear(6, 5)
    setattr(layer, name, 1)
    with pytest.raises(TypeError, match=f"it has an attribute '{name}' of its own"):
        pp.powerize(layer, ALPHA)
