"""pp.AdaptiveAlpha: the printed algorithm, what is measured, resume, what a change leaves alone."""
# Longer than 350 lines: the algorithm and what its changes leave alone, over the same small nets.

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.utils import prune

import ppkernels as pp

EPSILON = 1e-3


def net(alpha: float = 1.25, stores: str = "theta") -> nn.Sequential:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 4))
    return pp.powerize(model, alpha, stores)


def write(layer: nn.Module, share: float) -> None:
    """Make that share of the layer's θ small, whatever the exponent is next."""
    theta = torch.full((layer.weight.numel(),), 1.0)
    theta[: round(share * theta.numel())] = 0
    layer.set_theta(theta.view_as(layer.weight))


def single(alpha: float = 1.25) -> nn.Module:
    return pp.nn.PowerLinear(100, 10, alpha=alpha)


# ---- the algorithm


def printed(alpha: float, sparsities: list[float], cr: float, cd: float) -> list[float]:
    """Algorithm 1 of the report's section 5, line by line; α after each decision."""
    path, init, old = [], True, sparsities[0]
    for sparsity in sparsities:
        if sparsity >= old:
            old = sparsity
            alpha = 1 + cr * (alpha - 1) if init else alpha + cd
        else:
            old = sparsity
            alpha = 1 + (alpha - 1) / cr
            init = False
        path.append(alpha)
    return path


@given(
    shares=st.lists(st.integers(0, 1000), min_size=1, max_size=12),
    period=st.integers(1, 3),
    cr=st.floats(1.01, 3),
    cd=st.floats(0.01, 1),
    alpha=st.floats(1.01, 3),
)
def test_the_path_is_that_of_the_printed_algorithm(
    shares: list[int], period: int, cr: float, cd: float, alpha: float
) -> None:
    layer = single(alpha)
    adaptive = pp.AdaptiveAlpha(layer, period=period, cr=cr, cd=cd, alpha_max=math.inf)
    path = []
    for epoch in range(period * (len(shares) + 1)):
        decides = epoch > 0 and epoch % period == 0
        if decides:
            write(layer, shares[epoch // period - 1] / 1000)
        before = layer.alpha.item()
        (record,) = adaptive.step()
        assert record.epoch == epoch
        assert (record.decision is not None) == decides
        assert (record.alpha, record.next_alpha) == (before, layer.alpha.item())
        if decides:
            assert record.sparsity == shares[epoch // period - 1] / 1000
            path.append(layer.alpha.item())
    assert path == printed(alpha, [share / 1000 for share in shares], cr, cd)


@pytest.mark.parametrize(
    ("shares", "path"),
    [
        # Up, equal is up, one fall ends the initial phase, then additive steps and a fall again.
        ([0.2, 0.2, 0.3, 0.1, 0.1, 0.2, 0.1], [1.75, 2.125, 2.6875, 2.125, 2.225, 2.325, 1.8833]),
        # After a fall only the last sparsity counts, not the best one.
        ([0.5, 0.1, 0.2], [1.75, 1.5, 1.6]),
        # The bound holds α for good, whatever is measured there,
        ([0.1] * 5 + [0.05, 0.01], [1.75, 2.125, 2.6875, 3.0, 3.0, 3.0, 3.0]),
        # but for the decision that compares it with the exponent before it.
        ([0.1] * 4 + [0.05, 0.05], [1.75, 2.125, 2.6875, 3.0, 2.3333, 2.4333]),
    ],
)
def test_paths(shares: list[float], path: list[float]) -> None:
    layer = single(1.5)
    adaptive = pp.AdaptiveAlpha(layer, period=1, alpha_max=3.0)
    adaptive.step()
    for share, alpha in zip(shares, path, strict=True):
        write(layer, share)
        adaptive.step()
        assert layer.alpha.item() == pytest.approx(alpha, abs=1e-4)
    for record in adaptive.history[1:]:
        moved = math.copysign(1, record.next_alpha - record.alpha)
        held = record.next_alpha == record.alpha
        assert record.decision == ("hold" if held else {1: "rise", -1: "fall"}[moved])


def test_the_first_call_changes_nothing_and_no_change_is_the_last() -> None:
    """18 epochs have five changes, each with epochs after it."""
    model = net()
    adaptive = pp.AdaptiveAlpha(model)
    for _ in range(18):
        adaptive.step()
    changes = [record.next_alpha for record in adaptive.history if record.decision]
    assert changes == [1.375, 1.5625, 1.84375, 2.265625, 2.8984375]
    assert model[0].alpha.item() == model[2].alpha.item() == 2.8984375
    assert adaptive.history[-1].epoch == 17


def test_each_layer_by_itself() -> None:
    model = net()
    model[2].set_alpha(2.0, keep="theta")
    adaptive = pp.AdaptiveAlpha(model, period=1, per_layer=True)
    adaptive.step()
    for first, second in ((0.5, 0.5), (0.6, 0.25), (0.6, 0.25)):
        write(model[0], first)
        write(model[2], second)
        adaptive.step()
    paths = {
        name: [record.next_alpha for record in adaptive.history if record.layer == name]
        for name in ("0", "2")
    }
    assert paths["0"] == [1.25, 1.375, 1.5625, 1.84375]
    assert paths["2"] == pytest.approx([2.0, 2.5, 2.0, 2.1])


# ---- what is measured


def direct(model: nn.Module) -> float:
    thetas = [layer.theta.detach().flatten() for layer in model if hasattr(layer, "theta")]
    return (torch.cat(thetas).abs() < 0.1).double().mean().item()


@pytest.mark.parametrize("stores", ["theta", "phi"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_sparsity_is_of_theta_as_the_network_sees_it(stores: str, dtype: torch.dtype) -> None:
    model = net(stores=stores).to(dtype)
    adaptive = pp.AdaptiveAlpha(model, 0.1)
    assert adaptive.measure()[0].sparsity == direct(model)
    model[0].mask = pp.BitMask.pack(torch.rand(9, 12) < 0.5)
    (hidden,) = adaptive.measure()
    assert hidden.sparsity == direct(model)


def test_trained_entries_alone() -> None:
    layer = single()
    write(layer, 0.5)
    seen, trained = torch.rand(10, 100) < 0.8, torch.rand(10, 100) < 0.6
    adaptive = pp.AdaptiveAlpha(layer, entries="trained")

    def share(of: Tensor) -> float:
        return (layer.weight.detach()[of] == 0).double().mean().item()

    assert adaptive.measure()[0].sparsity == 0.5
    layer.update_mask = pp.BitMask.pack(trained)
    assert adaptive.measure()[0].sparsity == share(trained)
    layer.mask = pp.BitMask.pack(seen)
    assert adaptive.measure()[0].sparsity == share(seen & trained)
    layer.update_mask = None
    assert adaptive.measure()[0].sparsity == share(seen)
    layer.update_mask = pp.BitMask.zeros((10, 100))
    with pytest.raises(ValueError, match="no entries to count in 'model'"):
        adaptive.step()


def test_the_jump_is_told_from_the_training() -> None:
    model = net(2.0)
    adaptive = pp.AdaptiveAlpha(model, 0.1, period=1)
    adaptive.step()
    before = direct(model)
    (record,) = adaptive.step()
    assert record.sparsity == before
    assert record.next_sparsity == direct(model) > before


def test_tied_layers_count_once_and_change_together() -> None:
    first, second = pp.nn.PowerLinear(8, 8, alpha=1.5), pp.nn.PowerLinear(8, 8, alpha=1.5)
    second.weight = first.weight
    write(first, 0.25)
    for per_layer in (False, True):
        adaptive = pp.AdaptiveAlpha(nn.Sequential(first, second), period=1, per_layer=per_layer)
        (record,) = adaptive.step()
        assert record.sparsity == 0.25
        adaptive.step()
    assert first.alpha.item() == second.alpha.item() == 2.125


# ---- history and resume


def train(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    for _ in range(5):
        optimizer.zero_grad()
        (model(x) - x.sum(1, keepdim=True)).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("per_layer", [False, True])
def test_resumed_training_takes_the_same_path(per_layer: bool, tmp_path: Path) -> None:
    x = torch.randn(6, 12)

    def start() -> tuple[nn.Module, torch.optim.Optimizer, pp.AdaptiveAlpha]:
        model = net()
        adaptive = pp.AdaptiveAlpha(model, 0.05, period=2, per_layer=per_layer)
        return model, pp.optim.PowerSGD(model, lr=0.05, momentum=0.9), adaptive

    parts = start()
    for epoch in range(12):
        if epoch == 5:
            torch.save([part.state_dict() for part in parts], tmp_path / "state.pt")
        parts[2].step()
        train(parts[0], parts[1], x)
    again = start()
    for part, state in zip(again, torch.load(tmp_path / "state.pt"), strict=True):
        part.load_state_dict(state)
    for _ in range(5, 12):
        again[2].step()
        train(again[0], again[1], x)
    assert again[2].history == parts[2].history
    assert any(record.decision for record in parts[2].history)
    assert all(map(torch.equal, again[0].parameters(), parts[0].parameters()))


def test_a_state_of_something_else_is_refused() -> None:
    state = pp.AdaptiveAlpha(net()).state_dict()
    options = {
        "per_layer": True,
        "period": 5,
        "epsilon": 0.01,
        "cr": 2.0,
        "cd": 0.2,
        "alpha_max": 2.0,
        "entries": "trained",
    }
    for name, value in options.items():
        with pytest.raises(ValueError, match=rf"with {name} .*, and this controller has {value!r}"):
            pp.AdaptiveAlpha(net(), **{name: value}).load_state_dict(state)
    with pytest.raises(ValueError, match=r"of \{'model': \['0', '2'\]\}, and .* \['2'\]"):
        pp.AdaptiveAlpha(net(), select=["2"]).load_state_dict(state)
    adaptive = pp.AdaptiveAlpha(net())
    for wrong, message in (
        ({}, r"the keys must be \['epoch', .*, got \[\]"),
        ([1], "the keys must be .*, got list"),
        (state | {"epoch": 7, "phases": {"model": {"was": True}}}, "phases or history"),
        (state | {"epoch": 7, "phases": {}}, "phases or history"),
        (state | {"epoch": 7, "history": [{}]}, "phases or history"),
    ):
        with pytest.raises(ValueError, match=f"load_state_dict: {message}"):
            adaptive.load_state_dict(wrong)
        assert adaptive.epoch == 0


def test_a_state_without_its_model_is_noticed() -> None:
    model = net()
    adaptive = pp.AdaptiveAlpha(model, period=1)
    for _ in range(3):
        adaptive.step()
    again = pp.AdaptiveAlpha(other := net(), period=1)
    again.load_state_dict(adaptive.state_dict())
    for act in (again.step, again.measure):
        with pytest.raises(ValueError, match=r"with alpha 1\.5625, and the model has 1\.25"):
            act()
    assert other[0].alpha.item() == 1.25
    other.load_state_dict(model.state_dict())
    assert again.step() == adaptive.step()


def test_history_has_one_record_an_epoch() -> None:
    model = net()
    adaptive = pp.AdaptiveAlpha(model, per_layer=True)
    for _ in range(4):
        adaptive.step()
    adaptive.measure()
    write(model[0], 1.0)
    adaptive.measure()  # the same moment again
    assert [(r.epoch, r.layer) for r in adaptive.history] == [
        (epoch, layer) for epoch in range(5) for layer in ("0", "2")
    ]
    assert adaptive.history[-2].sparsity == 1
    adaptive.step()
    assert len(adaptive.history) == 10


@pytest.mark.parametrize("per_layer", [False, True])
def test_plot(per_layer: bool, tmp_path: Path) -> None:
    adaptive = pp.AdaptiveAlpha(net(), per_layer=per_layer)
    with pytest.raises(ValueError, match="no history yet"):
        adaptive.plot(tmp_path / "alpha.png")
    for _ in range(10):
        adaptive.step()
    adaptive.plot(tmp_path / "alpha.png")
    assert (tmp_path / "alpha.png").read_bytes().startswith(b"\x89PNG")


# ---- what the change leaves be


@pytest.mark.parametrize("stores", ["theta", "phi"])
@pytest.mark.parametrize("keep", ["theta", "phi"])
def test_no_recompilation(stores: str, keep: str) -> None:
    model = net(stores=stores)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    optimizer = pp.optim.PowerSGD(model, lr=0.1)
    adaptive = pp.AdaptiveAlpha(compiled, period=1, keep=keep, optimizer=optimizer, per_layer=True)
    assert {record.layer for record in adaptive.measure()} == {"0", "2"}
    x = torch.randn(6, 12)
    compiled(x)
    compilations = counter.frame_count
    for _ in range(4):
        adaptive.step()
        out = compiled(x)
        torch.testing.assert_close(out, copy.deepcopy(model)(x))
        out.sum().backward()
    assert counter.frame_count == compilations > 0
    assert model[0].alpha.item() == 1.84375


@pytest.mark.parametrize("keep", ["theta", "phi"])
@pytest.mark.parametrize(
    ("stores", "make"),
    [
        ("theta", lambda p: pp.optim.PowerSGD(p, lr=0.05, momentum=0.9)),
        ("theta", lambda p: pp.optim.PowerAdamW(p, lr=1e-3, rule="chain")),
        ("phi", lambda p: pp.optim.PowerAdamW(p, lr=1e-3)),
        ("phi", lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9)),
        ("phi", lambda p: torch.optim.AdamW(p, lr=1e-3, amsgrad=True)),
    ],
)
def test_training_goes_on(
    keep: str, stores: str, make: Callable[..., torch.optim.Optimizer]
) -> None:
    model = net(stores=stores)
    optimizer, x = make(model.parameters()), torch.randn(6, 12)
    adaptive = pp.AdaptiveAlpha(model, period=1, keep=keep, optimizer=optimizer)
    for _ in range(6):
        before = model(x)
        (record,) = adaptive.step()
        moved = not torch.allclose(model(x), before, rtol=1e-4, atol=1e-5)
        assert moved == (keep == "phi" and record.next_alpha != record.alpha)
        train(model, optimizer, x)
    assert sum(record.next_alpha != record.alpha for record in adaptive.history) == 5
    assert all(p.isfinite().all() for p in model.parameters())


# ---- momentum when θ is kept


def chain_factor(layer: nn.Module) -> Tensor:
    """dθ/dφ as a function of θ and the layer's exponent."""
    alpha = layer.alpha.item()
    return alpha * layer.theta.detach().abs().pow((alpha - 1) / alpha)


@pytest.mark.parametrize("falls", [False, True])
@pytest.mark.parametrize(
    ("stores", "make", "degrees"),
    [
        ("theta", lambda p: pp.optim.PowerSGD(p, lr=0, momentum=0.9, rule="chain"), [1]),
        ("theta", lambda p: pp.optim.PowerSGD(p, lr=0, momentum=0.9, rule="virtual"), [0]),
        ("theta", lambda p: pp.optim.PowerAdamW(p, lr=0, rule="chain"), [1, 2]),
        ("theta", lambda p: pp.optim.PowerAdamW(p, lr=0, rule="virtual"), [0, 0]),
        ("phi", lambda p: pp.optim.PowerSGD(p, lr=0, momentum=0.9, rule="virtual"), [1]),
        ("phi", lambda p: torch.optim.SGD(p, lr=0, momentum=0.9), [1]),
        ("phi", lambda p: torch.optim.Adam(p, lr=0, amsgrad=True), [1, 2, 2]),
    ],
)
def test_averages_follow_phi(
    stores: str,
    make: Callable[..., torch.optim.Optimizer],
    degrees: list[int],
    falls: bool,
) -> None:
    """They become what the same gradients of θ, seen through the new φ, would have made."""
    model = net(2.0, stores).double()
    layer = model[0]
    write(model[2], 0.5)
    with torch.no_grad():
        layer.weight[0, :3] = 0
    optimizer, x = make(model.parameters()), torch.randn(6, 12, dtype=torch.float64)
    adaptive = pp.AdaptiveAlpha(model, period=1, keep="theta", optimizer=optimizer)
    adaptive.step()
    adaptive.step()
    train(model, optimizer, x)
    if falls:
        write(model[2], 0.1)
    names = ("momentum_buffer", "exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    state = optimizer.state[layer.weight]
    before = {name: state[name].clone() for name in names if name in state}
    factor_before = chain_factor(layer)
    (record,) = adaptive.step()
    assert record.decision == ("fall" if falls else "rise")
    ratio = chain_factor(layer) / factor_before
    ratio[layer.weight == 0] = 0
    assert len(before) == len(degrees)
    for (name, value), degree in zip(before.items(), degrees, strict=True):
        expected = value * ratio**degree if degree else value
        torch.testing.assert_close(state[name], expected, rtol=1e-10, atol=0)


def test_an_unknown_state_is_refused_before_anything_changes() -> None:
    model = net(stores="phi")
    optimizer = torch.optim.RMSprop(model.parameters(), lr=1e-3)
    adaptive = pp.AdaptiveAlpha(model, period=1, keep="theta", optimizer=optimizer)
    adaptive.step()
    train(model, optimizer, torch.randn(6, 12))
    with pytest.raises(RuntimeError, match="'square_avg' in the state that RMSprop"):
        adaptive.step()
    assert model[0].alpha.item() == 1.25


# ---- errors


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"epsilon": 0}, ValueError, "epsilon must be a number > 0, got 0"),
        ({"epsilon": math.nan}, ValueError, "epsilon must be a number > 0, got nan"),
        ({"epsilon": "small"}, TypeError, "epsilon must be a number, got 'small'"),
        ({"period": 0}, ValueError, "period must be a whole number >= 1, got 0"),
        ({"period": 1.5}, TypeError, r"period must be a whole number >= 1, got 1\.5"),
        ({"cr": 1}, ValueError, "cr must be a number > 1, got 1"),
        ({"cd": 0}, ValueError, "cd must be a number > 0, got 0"),
        ({"cd": math.inf}, ValueError, "cd must be a number > 0, got inf"),
        ({"alpha_max": 1}, ValueError, "alpha_max must be a number > 1, got 1"),
        ({"alpha_max": 1.2}, ValueError, r"'model' has alpha 1\.25, above alpha_max 1\.2"),
        ({"keep": "both"}, ValueError, "keep must be 'phi' or 'theta', got 'both'"),
        ({"entries": "some"}, ValueError, "entries must be 'all' or 'trained', got 'some'"),
        ({"keep": "theta"}, TypeError, "pass optimizer"),
        ({"per_layer": 1}, TypeError, "per_layer must be True or False, got 1"),
        ({"select": "0"}, TypeError, "select must be several names or a function, got '0'"),
        ({"select": 3}, TypeError, "select must be several names or a function, got 3"),
        ({"select": ["0", "1"]}, ValueError, "'1' in select is none of .*, which are '0', '2'"),
        ({"select": []}, ValueError, "of Sequential no powered layer was selected"),
        ({"optimizer": 3}, TypeError, "optimizer must be a torch.optim.Optimizer .* got int"),
        ({"optimizer": [3]}, TypeError, "optimizer must be a torch.optim.Optimizer .* got int"),
    ],
)
def test_wrong_arguments(arguments: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        pp.AdaptiveAlpha(net(), **arguments)


def test_wrong_models() -> None:
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got list"):
        pp.AdaptiveAlpha([net()])
    with pytest.raises(ValueError, match=r"Linear holds no powered layer; pp\.powerize"):
        pp.AdaptiveAlpha(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="'model' has alpha 1, which the geometric rise"):
        pp.AdaptiveAlpha(net(1.0))
    model = net()
    model[2].set_alpha(2.0, keep="phi")
    with pytest.raises(ValueError, match=r"different exponents, \{'0': 1\.25, '2': 2\.0\}"):
        pp.AdaptiveAlpha(model)
    with pytest.raises(RuntimeError, match="'0' is no longer a Parameter of its own"):
        pp.AdaptiveAlpha(nn.Sequential(prune.identity(single(), "weight")))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (math.nan, r"diverged\? .*NaN in tensors\['2'\]"),
        (math.inf, r"diverged\? There is an infinite weight in '2'"),
        (-math.inf, r"diverged\? There is an infinite weight in '2'"),
    ],
)
def test_weights_that_are_no_numbers(value: float, message: str) -> None:
    model = net()
    with torch.no_grad():
        model[2].weight[0, 0] = value
    with pytest.raises(ValueError, match=message):
        pp.AdaptiveAlpha(model).step()
