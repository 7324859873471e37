"""Frozen means frozen for torch's own optimizers too, on every weight that they may step."""
# Longer than 350 lines: many short tests of one subject, what PyTorch has around a step.

from __future__ import annotations

import copy
import gc
import re
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.testing._internal.two_tensor import TwoTensor

import ppkernels as pp

optim = torch.optim
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": lambda p: optim.SGD(p, 0.05),
    "momentum": lambda p: optim.SGD(p, 0.05, momentum=0.9, dampening=0.1, weight_decay=0.1),
    "nesterov": lambda p: optim.SGD(p, 0.05, momentum=0.9, nesterov=True, weight_decay=0.1),
    "SGD, fused": lambda p: optim.SGD(p, 0.05, momentum=0.9, weight_decay=0.1, fused=True),
    "SGD, foreach": lambda p: optim.SGD(p, 0.05, momentum=0.9, weight_decay=0.1, foreach=True),
    "Adam": lambda p: optim.Adam(p, 0.01, weight_decay=0.1),
    "Adam, fused": lambda p: optim.Adam(p, 0.01, weight_decay=0.1, fused=True),
    "AdamW": lambda p: optim.AdamW(p, 0.01, weight_decay=0.1, amsgrad=True),
    "AdamW, foreach": lambda p: optim.AdamW(p, 0.01, weight_decay=0.1, foreach=True),
    "RMSprop": lambda p: optim.RMSprop(p, 0.01, momentum=0.9, centered=True, weight_decay=0.1),
    "Adagrad": lambda p: optim.Adagrad(p, 0.05, weight_decay=0.1),
    "Adadelta": lambda p: optim.Adadelta(p, 1.0, weight_decay=0.1),
    "Adamax": lambda p: optim.Adamax(p, 0.01, weight_decay=0.1),
    "ASGD": lambda p: optim.ASGD(p, 0.05, weight_decay=0.1),
    "NAdam": lambda p: optim.NAdam(p, 0.01, weight_decay=0.1),
    "RAdam": lambda p: optim.RAdam(p, 0.01, weight_decay=0.1),
    "Rprop": lambda p: optim.Rprop(p, 0.01),
}
LBFGS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "LBFGS": lambda p: optim.LBFGS(p, 0.1, max_iter=4),
    "LBFGS, line search": lambda p: optim.LBFGS(p, max_iter=4, line_search_fn="strong_wolfe"),
}

pytestmark = pytest.mark.usefixtures("one_thread")
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: pp.nn.MaskedLinear(19, 7),
    "convolution": lambda: pp.nn.MaskedConv2d(3, 5, 3),
    "channels last": lambda: pp.nn.MaskedConv2d(3, 5, 3).to(memory_format=torch.channels_last),
    "phi": lambda: pp.nn.PowerLinear(19, 7, alpha=1.5, stores="phi"),
}


def random_mask(layer: nn.Module) -> pp.BitMask:
    return pp.BitMask.pack(torch.rand(layer.weight.shape) < 0.6)


def masked(kind: str = "linear") -> nn.Module:
    layer = LAYERS[kind]()
    layer.update_mask = random_mask(layer)
    return layer


def frozen_of(layer: nn.Module) -> Tensor:
    return ~layer.update_mask.unpack()


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.itemsize])


def draw(layer: nn.Module, step: int) -> None:
    """The gradients of a step."""
    generator = torch.Generator().manual_seed(step)
    for parameter in layer.parameters():
        grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        parameter.grad = torch.empty_like(parameter).copy_(grad)


def sgd(layer: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(layer.parameters(), 0.1, momentum=0.9, weight_decay=0.1)


# ---- what is frozen, and what is stepped


@pytest.mark.parametrize(
    ("kind", "by_closure"), [*((kind, False) for kind in LAYERS), ("linear", True)]
)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_are_those_without_a_mask_where_nothing_is_frozen(
    name: str, kind: str, by_closure: bool
) -> None:
    """Neither momentum from before the mask nor decay move what is frozen; its gradient is 0."""
    layer = LAYERS[kind]()
    other = copy.deepcopy(layer)
    optimizer, reference = (OPTIMIZERS[name](each.parameters()) for each in (layer, other))
    for step in range(3):
        for each, own in ((layer, optimizer), (other, reference)):
            draw(each, step)
            own.step()
    layer.update_mask = random_mask(layer)
    frozen, start = frozen_of(layer), bits(layer.weight).clone()
    for step in range(3, 23):
        draw(other, step)
        other.weight.grad[frozen] = 0
        reference.step()
        if by_closure:
            optimizer.step(lambda step=step: draw(layer, step))
        else:
            draw(layer, step)
            optimizer.step()
        assert not layer.weight.grad[frozen].any()
    assert torch.equal(bits(layer.weight)[frozen], start[frozen])
    # Those have neither momentum nor decay here.
    rests = name in ("SGD", "Rprop")
    assert torch.equal(other.weight[frozen], layer.weight[frozen]) == rests
    for mine, theirs in zip(layer.parameters(), other.parameters(), strict=True):
        free = ~frozen if mine is layer.weight else slice(None)
        assert torch.equal(mine[free], theirs[free])
        states = optimizer.state[mine], reference.state[theirs]
        for key, value in states[0].items():
            if isinstance(value, Tensor) and value.shape == mine.shape:
                assert torch.equal(value[free], states[1][key][free]), key


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("kind", ["linear", "phi"])
@pytest.mark.parametrize("name", LBFGS)
def test_gradients_that_are_made_inside_the_step(name: str, kind: str, warm: bool) -> None:
    layer = LAYERS[kind]()
    optimizer = LBFGS[name](layer.parameters())
    x, y = torch.randn(32, 19), torch.randn(32, 7)

    def loss_of(each: nn.Module, frozen: Tensor | None = None) -> Tensor:
        each.zero_grad()
        loss = (each(x) - y).square().mean()
        loss.backward()
        if frozen is not None:
            each.weight.grad[frozen] = 0
        return loss

    if warm:  # the directions of its history are not 0 at frozen entries
        optimizer.step(lambda: loss_of(layer))
    layer.update_mask = random_mask(layer)
    frozen, start = frozen_of(layer), bits(layer.weight).clone()
    other = copy.deepcopy(layer)
    other.update_mask = None
    reference = LBFGS[name](other.parameters())
    losses = [optimizer.step(closure=lambda: loss_of(layer)).item() for _ in range(20)]
    assert torch.equal(bits(layer.weight)[frozen], start[frozen])
    assert losses[-1] < losses[0]
    if not warm:
        for _ in range(20):
            reference.step(lambda: loss_of(other, frozen))
        assert torch.equal(layer.weight, other.weight)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["momentum", "Adam, fused", "AdamW", "AdamW, foreach"])
def test_other_dtypes(name: str, dtype: torch.dtype) -> None:
    for kind in LAYERS:
        layer = LAYERS[kind]().to(dtype)
        optimizer = OPTIMIZERS[name](layer.parameters())
        draw(layer, 0)
        optimizer.step()
        layer.update_mask = random_mask(layer)
        frozen, start = frozen_of(layer), layer.weight.detach().clone()
        for step in range(20):
            draw(layer, step)
            optimizer.step()
        assert torch.equal(bits(layer.weight)[frozen], bits(start)[frozen])
        assert (layer.weight != start)[~frozen].float().mean() > 0.8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_bits_at_all(dtype: torch.dtype) -> None:
    """NaNs of every kind, infinities, zeros and subnormals, under gradients that are not finite."""
    layer = pp.nn.MaskedLinear(64, 64, dtype=dtype)
    layer.update_mask = random_mask(layer)
    frozen = frozen_of(layer)
    with torch.no_grad():
        integers = torch.iinfo(bits(layer.weight).dtype)
        bits(layer.weight).random_(integers.min, integers.max)
        layer.weight[~frozen] = 1
    start = bits(layer.weight).clone()
    optimizer = torch.optim.Adam(layer.parameters(), 0.01, weight_decay=0.1)
    for bad in (torch.inf, -torch.inf, torch.nan):
        layer.weight.grad = torch.ones_like(layer.weight)
        layer.weight.grad[frozen] = bad
        optimizer.step()
    assert torch.equal(bits(layer.weight)[frozen], start[frozen])
    assert layer.weight[~frozen].isfinite().all()
    # The state has seen gradients of 0, and decay.
    assert not optimizer.state[layer.weight]["exp_avg"][~frozen].isnan().any()


# ---- what PyTorch has around a step


@pytest.mark.parametrize("fused", [False, True])
def test_grad_scaler(fused: bool) -> None:
    layer = masked()
    frozen = frozen_of(layer)
    optimizer = torch.optim.Adam(layer.parameters(), 0.01, weight_decay=0.1, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    start = layer.weight.detach().clone()
    for step in range(6):
        before = layer.weight.detach().clone()
        optimizer.zero_grad()
        scaler.scale(layer(torch.ones(2, 19)).square().sum()).backward()
        if step == 3:
            layer.weight.grad[~frozen] = torch.inf
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(layer.weight[frozen], start[frozen])
        assert torch.equal(layer.weight, before) == (step == 3)


@pytest.mark.parametrize("what", ["step", "function"])
def test_a_compiled_step(what: str) -> None:
    layer = masked()
    frozen, start = frozen_of(layer), layer.weight.detach().clone()
    optimizer = sgd(layer)
    torch._dynamo.reset()
    step = torch.compile(
        optimizer.step if what == "step" else lambda: optimizer.step(), backend="aot_eager"
    )
    twin = copy.deepcopy(layer)
    other = sgd(twin)
    for turn in range(5):
        draw(layer, turn)
        draw(twin, turn)
        step()
        other.step()
    torch.testing.assert_close(layer.weight, twin.weight)
    assert torch.equal(layer.weight[frozen], start[frozen])
    assert (layer.weight != start)[~frozen].all()


@pytest.mark.gpu
def test_a_captured_step_follows_the_mask_of_the_capture() -> None:
    layer = masked().cuda()
    optimizer = torch.optim.AdamW(layer.parameters(), 0.01, capturable=True)
    frozen, start = frozen_of(layer), layer.weight.detach().clone()
    draw(layer, 0)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        optimizer.step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    # Other words, and memory that somebody else may take.
    layer.update_mask = pp.BitMask.ones(layer.weight.shape, "cuda")
    rubbish = [torch.full((64,), 255, dtype=torch.uint8, device="cuda") for _ in range(64)]
    for _ in range(5):
        before = layer.weight.detach().clone()
        layer.weight.grad.normal_()
        graph.replay()
        assert torch.equal(layer.weight[frozen], start[frozen])
        assert not torch.equal(layer.weight, before)
    assert rubbish


def test_autograd_hears_of_what_is_written() -> None:
    layer = masked()
    optimizer = sgd(layer)
    loss = (layer.weight * layer.weight).sum()
    draw(layer, 0)
    version = layer.weight._version
    with torch.no_grad():
        optimizer.step()
    assert layer.weight._version > version
    assert layer.weight.requires_grad
    assert layer.weight.grad_fn is None
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_the_gradient_stays_where_it_lies() -> None:
    """For buckets of DistributedDataParallel the gradients are views."""
    layer = masked()
    bucket = torch.ones(layer.weight.numel())
    layer.weight.grad = bucket.view_as(layer.weight)
    sgd(layer).step()
    assert torch.equal(bucket.view_as(layer.weight) == 0, frozen_of(layer))


def test_gradients_of_other_forms() -> None:
    layer = pp.nn.MaskedLinear(3, 4, bias=False)
    layer.update_mask = random_mask(layer)
    frozen, start = frozen_of(layer), layer.weight.detach().clone()
    layer.weight.grad = torch.ones(1, 1).expand(4, 3)
    sgd(layer).step()
    assert torch.equal(layer.weight == start, frozen)
    # As an embedding gives them that shares the weight.
    embedding = nn.Embedding(4, 3, sparse=True, _weight=layer.weight)
    embedding.weight = layer.weight
    for make in (torch.optim.SparseAdam, torch.optim.SGD):
        optimizer = make(layer.parameters(), lr=0.1)
        before = layer.weight.detach().clone()
        layer.weight.grad = None
        embedding(torch.tensor([0, 2, 2])).sum().backward()
        assert layer.weight.grad.is_sparse
        optimizer.step()
        assert not layer.weight.grad.to_dense()[frozen].any()
        stepped = torch.tensor([True, False, True, False]).unsqueeze(1)
        assert torch.equal(layer.weight != before, stepped & ~frozen)


# ---- who steps what, and when


def test_masks_come_change_and_go() -> None:
    layer = pp.nn.MaskedLinear(19, 7)
    optimizer = sgd(layer)
    masks = [random_mask(layer) for _ in range(2)]
    for step, mask in enumerate((None, masks[0], masks[1], None, masks[0])):
        layer.update_mask = mask
        before = layer.weight.detach().clone()
        draw(layer, step)
        optimizer.step()
        frozen = torch.zeros(7, 19).bool() if mask is None else ~mask.unpack()
        assert torch.equal(layer.weight == before, frozen)


def test_parameters_that_are_not_stepped() -> None:
    layer, other = masked(), masked()
    frozen, start = frozen_of(layer), layer.weight.detach().clone()
    weights, biases = ([getattr(each, n) for each in (layer, other)] for n in ("weight", "bias"))
    draw(layer, 0)
    draw(other, 0)
    torch.optim.SGD(biases, 0.1).step()
    assert layer.weight.grad.all()  # nobody has touched it
    optimizer = torch.optim.SGD(weights, 0.1, momentum=0.9)
    other.weight.grad = None
    rested = other.weight.detach().clone()
    optimizer.step()
    assert torch.equal(layer.weight == start, frozen)
    assert torch.equal(other.weight, rested)
    # Frozen as a whole, but with a gradient that the optimizer takes.
    layer.weight.requires_grad_(False)
    optimizer.step()
    assert torch.equal(layer.weight == start, frozen)


def test_layers_that_are_tied() -> None:
    first, second = masked(), pp.nn.MaskedLinear(19, 7)
    second.weight = first.weight
    frozen, start = frozen_of(first), first.weight.detach().clone()
    optimizer = sgd(nn.ModuleList([first, second]))
    draw(first, 0)
    optimizer.step()
    assert torch.equal(first.weight == start, frozen)
    second.update_mask = ~first.update_mask
    before = first.weight.detach().clone()
    for _ in range(2):
        message = r"SGD.step: MaskedLinear.* share one weight, so their update masks have to be eq"
        with pytest.raises(ValueError, match=message):
            optimizer.step()
    assert torch.equal(first.weight, before)
    second.update_mask = first.update_mask
    optimizer.step()
    assert torch.equal(first.weight == start, frozen)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda x: x.to(torch.float64), pp.nn.add_masks])
def test_a_model_that_has_changed(how: Callable[[nn.Module], nn.Module]) -> None:
    layer = how(nn.Sequential(masked()))[0]
    frozen, start = frozen_of(layer), layer.weight.detach().clone()
    draw(layer, 0)
    sgd(layer).step()
    assert torch.equal(layer.weight == start, frozen)


def test_a_layer_that_was_folded_is_free() -> None:
    layer = masked()
    optimizer = sgd(layer)
    draw(layer, 0)
    optimizer.step()
    start = layer.weight.detach().clone()
    pp.fold(layer)
    draw(layer, 1)
    optimizer.step()
    assert (layer.weight != start).all()


class Twice(torch.optim.SGD):
    """Moves weights itself, then takes the step of its base class, which has hooks of its own."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.mul_(0.9)
        return super().step(closure)


def test_a_step_within_a_step() -> None:
    # Its base class has hooks from the first object on.
    torch.optim.SGD([torch.ones(1)], 0.1)
    layer = masked()
    frozen, start = frozen_of(layer), layer.weight.detach().clone()
    optimizer = Twice(layer.parameters(), 0.1, momentum=0.9)
    for step in range(3):
        draw(layer, step)
        optimizer.step()
    assert torch.equal(layer.weight == start, frozen)


def test_wrappers_whose_inner_optimizer_steps() -> None:
    layer, weight = masked(), None

    class Wrapper(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            return self.optim.step()

    for inner in (sgd(layer), pp.optim.PowerSGD(layer, 0.1, momentum=0.9)):
        wrapper = Wrapper(layer.parameters(), 0.1)
        wrapper.optim = inner
        frozen, weight = frozen_of(layer), layer.weight.detach().clone()
        for step in range(3):
            draw(layer, step)
            wrapper.step()
        assert torch.equal(layer.weight == weight, frozen)
    # The optimizers of pp.optim leave gradients alone.
    assert layer.weight.grad[frozen].any()


# ---- errors


def test_a_step_that_fails_leaves_no_copies() -> None:
    layer = masked()
    frozen = frozen_of(layer)
    optimizer, copies = sgd(layer), []
    optimizer.register_step_pre_hook(
        lambda _, args, kwargs: copies.extend(map(weakref.ref, args.frozen))
    )

    def failing() -> Tensor:
        assert copies[-1]() is not None
        raise ArithmeticError

    for _ in range(3):
        draw(layer, 0)
        with pytest.raises(ArithmeticError):
            optimizer.step(failing)
        gc.collect()
    # What is put back after the next one is what is there before it.
    with torch.no_grad():
        layer.weight.add_(1)
    start = layer.weight.detach().clone()
    draw(layer, 1)
    optimizer.step()
    assert [copy_() for copy_ in copies] == [None] * 4
    assert torch.equal(layer.weight == start, frozen)


def test_a_hook_that_replaces_the_arguments_is_found_out() -> None:
    layer = masked()
    optimizer = sgd(layer)
    handle = optimizer.register_step_pre_hook(lambda _, args, kwargs: ((*args,), kwargs))
    draw(layer, 0)
    with pytest.raises(RuntimeError, match=r"SGD\.step: frozen entries may have moved, because a"):
        optimizer.step()
    handle.remove()
    optimizer.register_step_pre_hook(lambda *_: None)
    optimizer.step()
    layer.update_mask = None
    optimizer.register_step_pre_hook(lambda _, args, kwargs: ((*args,), kwargs))
    optimizer.step()


def replaced(layer: nn.Module) -> None:
    prune.identity(layer, "weight")


def of_another_shape(layer: nn.Module) -> None:
    layer._parameters["weight"] = nn.Parameter(torch.ones(49))


def of_a_class_of_its_own(layer: nn.Module) -> None:
    weight = layer.weight.detach()
    layer._parameters["weight"] = nn.Parameter(TwoTensor(weight.clone(), weight.clone()))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (replaced, "MaskedLinear(.*) has an update_mask, but its weight is no longer a Parameter"),
        (of_another_shape, r"the update_mask of .* has shape \(7, 7\), and its weight has shape"),
        (of_a_class_of_its_own, "has an update_mask, but its weight is a TwoTensor, in which no"),
    ],
)
def test_masks_that_cannot_be_honoured(spoil: Callable[[nn.Module], None], message: str) -> None:
    layer = pp.nn.MaskedLinear(7, 7, bias=False)
    layer.update_mask = random_mask(layer)
    spoil(layer)
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    (parameter,) = optimizer.param_groups[0]["params"]
    parameter.grad = torch.ones_like(parameter)
    before = parameter.detach().clone()
    with pytest.raises(RuntimeError, match=f"(?s)^{re.escape('SGD.step: ')}.*{message}"):
        optimizer.step()
    assert torch.equal(parameter, before)
    layer.update_mask = None
    optimizer.step()
    assert not torch.equal(parameter, before)


def test_a_weight_that_holds_theta_is_refused_with_a_mask_too() -> None:
    layer = pp.nn.PowerLinear(7, 7, alpha=2.0)
    layer.update_mask = random_mask(layer)
    draw(layer, 0)
    with pytest.raises(RuntimeError, match=r"^SGD.step: the weight of PowerLinear.* holds theta"):
        sgd(layer).step()
    assert layer.weight.grad.all()
