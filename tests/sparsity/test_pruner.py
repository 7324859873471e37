"""`pp.sparsity.Pruner`: what it prunes, when, and that it stays pruned."""
# Longer than 350 lines: the choices, together, on every kind of layer.

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DataParallel, DistributedDataParallel

import ppkernels as pp
from ppkernels import BitMask
from ppkernels.sparsity import (
    ERK,
    ConstantFanIn,
    Cosine,
    Cubic,
    Global,
    Gradient,
    Iterative,
    Magnitude,
    NofM,
    OneShot,
    PerLayer,
    Pruner,
    Random,
    Sensitivity,
    Uniform,
    entries_of,
)

MakeModel = Callable[..., nn.Sequential]
Backward = Callable[[nn.Module], None]
SIZES = {"0": 20 * 30, "2": 30 * 10}

each_kind = pytest.mark.parametrize("kind", ["plain", "theta", "phi"])


def theta_of(model: nn.Module, name: str) -> Tensor:
    layer = model.get_submodule(name)
    return (layer.theta if hasattr(layer, "theta") else layer.weight).detach().clone()


def is_zero(model: nn.Module) -> dict[str, Tensor]:
    return {name: theta_of(model, name) == 0 for name in SIZES}


def pruned(pruner: Pruner) -> dict[str, Tensor]:
    return {name: ~mask.unpack() for name, mask in pruner.masks().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


# ---- what is pruned


@each_kind
@pytest.mark.parametrize("alphas", [(2.0, 2.0), (3.0, 1.25)], ids=str)
def test_global_magnitude_is_of_theta(
    make_model: MakeModel, kind: str, alphas: tuple[float, float]
) -> None:
    model = make_model(kind)
    if kind != "plain":
        for place, alpha in zip((0, 2), alphas, strict=True):
            pp.set_alpha(model[place], alpha, keep="phi")
    before = torch.cat([theta_of(model, name).flatten() for name in SIZES])
    pruner = Pruner(model, OneShot(0.29))
    pruner.prune()
    after = torch.cat([theta_of(model, name).flatten() for name in SIZES])
    largest = before.abs().argsort(descending=True)[: entries_of(0.29, 900)]
    wanted = torch.zeros_like(before).index_copy(0, largest, before[largest])
    assert torch.equal(after, wanted)
    assert same(is_zero(model), pruned(pruner))
    for name in SIZES:
        assert model.get_submodule(name).update_mask == pruner.masks()[name]
        assert model.get_submodule(name).mask is None


CHOICES = [
    (0.1, Magnitude(), Global(), None, {"0": None, "2": None}),
    (0.1, Magnitude(), Uniform({"2": 2}), None, {"0": 60, "2": 60}),
    (0.1, Random(3), ERK(), None, {"0": 50, "2": 40}),
    (None, Gradient(), PerLayer({"0": 0.29, "2": 1}), None, {"0": 174, "2": 300}),
    (0.25, Sensitivity(), Uniform({"2": 4}), NofM(1, 4), {"0": 150, "2": 300}),
    (0.12, Sensitivity(), Uniform(), ConstantFanIn(), {"0": 60, "2": 30}),
    (0.0, Magnitude(), Global(), None, {"0": 0, "2": 0}),
    (1.0, Magnitude(), Global(), None, {"0": 600, "2": 300}),
]


@each_kind
@pytest.mark.parametrize("choices", CHOICES, ids=str)
def test_choices_together(
    make_model: MakeModel, backward: Backward, kind: str, choices: Any
) -> None:
    kept, score, distribution, type, counts = choices
    options = {} if type is None else {"type": type}
    model = make_model(kind)
    backward(model)
    pruner = Pruner(model, OneShot(kept), score=score, distribution=distribution, **options)
    pruner.prune()
    found = pruner.kept()
    assert found.entries == SIZES
    assert found.counts == {
        name: found.counts[name] if count is None else count for name, count in counts.items()
    }
    if isinstance(distribution, Global):
        assert found.count == entries_of(kept, 900)
    assert same(is_zero(model), pruned(pruner))
    assert str(found).endswith(f"{found.count} of 900 ({found.count / 900:.2%}) kept")


def test_static_random_is_the_same_for_the_same_seed(make_model: MakeModel) -> None:
    masks = []
    for seed in (1, 1, 2):
        pruner = Pruner(make_model(), OneShot(0.2), score=Random(seed), distribution=ERK())
        pruner.prune()
        masks.append(pruner.masks())
    assert masks[0] == masks[1] != masks[2]


def test_of_equal_weights_the_first_are_kept() -> None:
    model = nn.Linear(4, 3)
    nn.init.ones_(model.weight)
    Pruner(model, OneShot(0.5)).prune()
    assert model.weight.flatten().tolist() == [1] * 6 + [0] * 6


@pytest.mark.parametrize(
    ("select", "chosen"),
    [
        (None, ["0", "2"]),
        (["2"], ["2"]),
        (iter(["2", "0"]), ["2", "0"]),
        (lambda name, layer: layer.out_features == 30, ["0"]),
    ],
    ids=["all", "names", "iterator", "function"],
)
def test_select(make_model: MakeModel, select: Any, chosen: list[str]) -> None:
    model = make_model("plain")
    pruner = Pruner(model, OneShot(0.5), select=select)
    pruner.prune()
    assert list(pruner.kept().counts) == chosen
    for name in SIZES:
        assert isinstance(model.get_submodule(name), pp.nn.MaskedLinear) == (name in chosen)
        assert bool((theta_of(model, name) == 0).any()) == (name in chosen)


def test_a_convolution_in_channels_last() -> None:
    model = nn.Conv2d(8, 4, 3).to(memory_format=torch.channels_last)
    before = model.weight.detach().clone()
    pruner = Pruner(model, OneShot(0.5), distribution=Uniform(), type=NofM(2, 4))
    pruner.prune()
    mask = pruner.masks()[""].unpack()
    assert torch.equal(model.weight, before.where(mask, 0))
    assert model.weight.is_contiguous(memory_format=torch.channels_last)
    assert (mask.view(4, 2, 4, 9).sum(2) == 2).all()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("choices", CHOICES, ids=str)
def test_every_device_and_the_reference_give_the_same_masks(
    make_model: MakeModel, backward: Backward, device: str, choices: Any
) -> None:
    kept, score, distribution, type, _ = choices
    options = {"score": score, "distribution": distribution}
    if type is not None:
        options["type"] = type
    model = make_model("phi")
    backward(model)
    other = copy.deepcopy(model)
    for parameter, its in zip(other.parameters(), model.parameters(), strict=True):
        parameter.grad = its.grad.clone()
    pruner = Pruner(model.to(device), OneShot(kept), **options)
    pruner.prune()
    with pp.backend("reference"):
        expected = Pruner(other, OneShot(kept), **options)
        expected.prune()
    assert pruner.masks() == expected.masks()


# ---- when


@each_kind
def test_gradual_pruning_keeps_pruned_entries_at_zero(
    make_model: MakeModel, backward: Backward, kind: str
) -> None:
    model = make_model(kind)
    optimizer = pp.optim.PowerSGD(model, lr=0.1, momentum=0.9, weight_decay=1e-3)
    schedule = Cubic(0.1, 2, 20, 5)
    pruner = Pruner(model, schedule, distribution=Uniform({"2": 2}))
    pruned_at, before = [], is_zero(model)
    for step in range(1, 30):
        backward(model)
        optimizer.step()
        assert same(is_zero(model), before)
        if pruner.step():
            pruned_at.append(step)
            assert pruner.kept().counts == {
                "0": entries_of(schedule.share(step, 0.1), 600),
                "2": entries_of(schedule.share(step, 0.2), 300),
            }
        after = is_zero(model)
        assert all((after[name] >= before[name]).all() for name in SIZES)
        before = after
    assert pruned_at == [7, 12, 17, 20]
    assert pruner.prunings == 4
    assert pruner.steps == 29
    assert pruner.kept().counts == {"0": 60, "2": 60}


STOCK: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "SGD": lambda model: torch.optim.SGD(
        model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01
    ),
    "AdamW": lambda model: torch.optim.AdamW(model.parameters(), lr=0.01),
}


@pytest.mark.parametrize("kind", ["plain", "phi"])
@pytest.mark.parametrize("name", STOCK)
def test_stock_optimizers_keep_pruned_entries_at_zero(
    make_model: MakeModel, backward: Backward, kind: str, name: str
) -> None:
    model = make_model(kind)
    optimizer = STOCK[name](model)
    pruner = Pruner(model, Cubic(0.1, 2, 10, 2))
    for _ in range(15):
        backward(model)
        before = is_zero(model)
        optimizer.step()
        assert all((is_zero(model)[name] >= gone).all() for name, gone in pruned(pruner).items())
        assert same(is_zero(model), before)
        pruner.step()
    assert pruner.kept().count == 90


def test_gradual_n_of_m_goes_through_coarser_patterns(make_model: MakeModel) -> None:
    pruner = Pruner(
        make_model(), Cosine(0.25, 0, 100, 10), distribution=Uniform({"2": 4}), type=NofM(1, 4)
    )
    of_four = [pruner.kept().counts["0"] // 150 for _ in range(100) if pruner.step()]
    assert of_four == [4, 4, 4, 3, 3, 3, 2, 2, 2, 1]


def test_step_zero_is_before_training(make_model: MakeModel) -> None:
    pruner = Pruner(make_model(), OneShot(0.1))
    message = "OneShot(kept=0.1, at=0) prunes at step 0; call prune() before the first step"
    with pytest.raises(RuntimeError, match=re.escape(message)):
        pruner.step()
    pruner.prune()
    assert not pruner.step()
    assert pruner.steps == 1
    assert pruner.kept().count == 90


def test_a_schedule_waits_for_what_was_pruned_by_hand(make_model: MakeModel) -> None:
    pruner = Pruner(make_model(), Cubic(0.1, 0, 10, 1))
    pruner.prune(0.3)
    counts = []
    for _ in range(10):
        assert pruner.step()
        counts.append(pruner.kept().count)
    assert counts[:3] == [270] * 3
    assert counts[-1] == 90


def test_more_than_is_left_is_refused(make_model: MakeModel) -> None:
    pruner = Pruner(make_model(), OneShot(0.1))
    pruner.prune(0.3)
    message = "270 are left; pruned weights stay pruned"
    with pytest.raises(ValueError, match=re.escape(message)):
        pruner.prune(0.5)
    pruner.prune(0.3)
    assert pruner.kept().count == 270


def test_a_failed_step_counts_nothing(make_model: MakeModel, backward: Backward) -> None:
    model = make_model()
    pruner = Pruner(model, OneShot(0.5, at=1), score=Gradient())
    before = theta_of(model, "0")
    with pytest.raises(RuntimeError, match="Gradient: the weight of '0' has no gradient"):
        pruner.step()
    assert (pruner.steps, pruner.prunings) == (0, 0)
    assert torch.equal(theta_of(model, "0"), before)
    backward(model)
    assert pruner.step()
    assert pruner.kept().count == 450


# ---- masks of the user's


@each_kind
def test_frozen_entries_are_neither_pruned_nor_freed_nor_counted(
    make_model: MakeModel, kind: str
) -> None:
    model = make_model(kind)
    pruner = Pruner(model, OneShot(0.2))
    trained = BitMask.pack(torch.rand(30, 20) < 0.5)
    model[0].update_mask = trained  # after the pruner was made
    before = theta_of(model, "0")
    free = trained.count() + 300
    pruner.prune(0.5)
    pruner.prune()
    assert pruner.kept().count == entries_of(0.2, free)
    assert pruner.kept().entries == {"0": trained.count(), "2": 300}
    frozen = ~trained.unpack()
    assert torch.equal(theta_of(model, "0")[frozen], before[frozen])
    assert model[0].update_mask == pruner.masks()["0"] & trained
    assert pruner.masks()["0"].unpack()[frozen].all()


def test_hidden_entries_are_not_pruned(make_model: MakeModel) -> None:
    model = make_model()
    seen = torch.rand(30, 20) < 0.5
    model[0].mask = BitMask.pack(seen)
    stored = model[0].weight.detach().clone()
    pruner = Pruner(model, OneShot(0.0))
    pruner.prune()
    assert torch.equal(model[0].weight, stored.where(~seen, 0))
    assert pruner.kept().entries["0"] == int(seen.sum())


def test_what_the_user_frees_is_pruned_again_next_time(make_model: MakeModel) -> None:
    model = make_model()
    pruner = Pruner(model, OneShot(0.2))
    pruner.prune(0.4)
    gone = pruned(pruner)
    for layer in (model[0], model[2]):
        layer.update_mask = None
        nn.init.ones_(layer.weight)
    pruner.prune()
    assert all((is_zero(model)[name] >= gone[name]).all() for name in SIZES)
    assert pruner.kept().count == 180


# ---- models of other forms


class Tied(nn.Module):
    """Two layers and a head that share one weight, beside one of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = (nn.Linear(6, 6, bias=False) for _ in range(3))
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.second(self.first(x)))


@each_kind
def test_tied_weights_are_pruned_once(kind: str) -> None:
    model = Tied() if kind == "plain" else pp.powerize(Tied(), 2.0, kind)
    pruner = Pruner(model, OneShot(0.25), distribution=Uniform())
    pruner.prune()
    assert pruner.kept().counts == {"first": 9, "last": 9}
    assert model.first.weight is model.second.weight
    assert model.first.update_mask == model.second.update_mask == pruner.masks()["first"]
    optimizer = pp.optim.PowerSGD(model, lr=0.1, momentum=0.9)
    model(torch.randn(5, 6)).square().mean().backward()
    optimizer.step()
    assert int((model.first.weight != 0).sum()) == 9


def test_deepcopy_of_model_and_pruner(make_model: MakeModel) -> None:
    model = make_model()
    pruner = Pruner(model, Cubic(0.1, 0, 10))
    for _ in range(5):
        pruner.step()
    other_model, other = copy.deepcopy((model, pruner))
    assert other.masks() == pruner.masks()
    for _ in range(5):
        other.step()
    assert other.kept().count == 90
    assert other_model[0].update_mask == other.masks()["0"]
    assert pruner.kept().count > 90
    assert model[0].update_mask == pruner.masks()["0"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_masks_survive_another_dtype(make_model: MakeModel, dtype: torch.dtype) -> None:
    model = make_model()
    pruner = Pruner(model, OneShot(0.1))
    pruner.prune(0.5)
    masks = pruner.masks()
    model.to(dtype)
    assert pruner.masks() == masks
    pruner.prune()
    assert pruner.kept().count == 90
    assert same(is_zero(model), pruned(pruner))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@each_kind
def test_master_copies_do_not_bring_pruned_weights_back(
    make_model: MakeModel, backward: Backward, kind: str, dtype: torch.dtype
) -> None:
    model = make_model(kind).to(dtype)
    optimizer = pp.optim.PowerSGD(model, lr=0.1, momentum=0.9, master_weights=True)
    pruner = Pruner(model, OneShot(0.1, at=2))
    for step in range(1, 6):
        model.zero_grad()
        model(torch.randn(8, 20, dtype=dtype)).square().mean().backward()
        optimizer.step()
        pruner.step()
        if step >= 2:
            zero = is_zero(model)
            assert all((zero[name] >= gone).all() for name, gone in pruned(pruner).items())
            assert pruner.kept().count == 90


@pytest.fixture
def one_process() -> Any:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "DataParallel": DataParallel,
    "DistributedDataParallel": DistributedDataParallel,
    "compile": lambda model: torch.compile(model, backend="eager"),
    "both": lambda model: DistributedDataParallel(torch.compile(model, backend="eager")),
}


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrapped_models(make_model: MakeModel, backward: Backward, wrapper: str) -> None:
    model = make_model()
    wrapped = WRAPPERS[wrapper](model)
    optimizer = pp.optim.PowerSGD(wrapped, lr=0.1, momentum=0.9)
    pruner = Pruner(wrapped, Cubic(0.1, 0, 4), distribution=Uniform({"2": 2}))
    for _ in range(6):
        backward(wrapped)
        optimizer.step()
        pruner.step()
    assert pruner.kept().counts == {"0": 60, "2": 60}
    assert same(is_zero(model), pruned(pruner))
    # The pruner's checkpoint is that of the model itself.
    other = Pruner(make_model(), pruner.schedule, distribution=pruner.distribution)
    other.load_state_dict(pruner.state_dict())
    assert other.masks() == pruner.masks()


@each_kind
def test_pruning_compiles_nothing_again(
    make_model: MakeModel, backward: Backward, kind: str
) -> None:
    torch._dynamo.reset()
    model = make_model(kind)
    pruner = Pruner(model, Cubic(0.1, 0, 5))
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    optimizer = pp.optim.PowerSGD(model, lr=0.1, momentum=0.9)
    for _ in range(7):
        x = torch.randn(8, 20)
        model.zero_grad()
        output = compiled(x)
        torch.testing.assert_close(output, model(x))
        output.square().mean().backward()
        optimizer.step()
        pruner.step()
    assert counter.frame_count == 1
    assert pruner.kept().count == 90


# ---- errors


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda model: Pruner(model, 0.05),
            TypeError,
            "schedule must be a Schedule, OneShot(0.05)",
        ),
        (
            lambda model: Pruner(model, OneShot(0.1), score=Magnitude),
            TypeError,
            "score must be a Score, Magnitude() for example, got <class",
        ),
        (
            lambda model: Pruner(model, OneShot(0.1), distribution="erk"),
            TypeError,
            "distribution must be a Distribution, Global() for example, got 'erk'",
        ),
        (
            lambda model: Pruner(model, OneShot(0.1), type=Global()),
            TypeError,
            "type must be a Type, Unstructured() for example, got Global()",
        ),
        (
            lambda model: Pruner(model.parameters(), OneShot(0.1)),
            TypeError,
            "Pruner: model must be a torch.nn.Module, got generator",
        ),
        (lambda model: Pruner(nn.ReLU(), OneShot(0.1)), ValueError, "ReLU holds no layer that can"),
        (lambda model: Pruner(model, OneShot(0.1), select=["fc"]), ValueError, "named 'fc'"),
        (lambda model: Pruner(model, OneShot(0.1), select="0"), TypeError, "several names"),
        (lambda model: Pruner(model, OneShot(0.1), select=5), TypeError, "several names"),
        (
            lambda model: Pruner(model, OneShot(0.5), type=NofM(2, 4)),
            ValueError,
            "NofM(n=2, m=4): it wants a share for each layer",
        ),
        (
            lambda model: Pruner(model, OneShot(0.5), distribution=Uniform(), type=NofM(2, 4)),
            ValueError,
            "NofM(n=2, m=4): '2' has 30 inputs, and a multiple of 4 is wanted",
        ),
        (
            lambda model: Pruner(model, OneShot(0.5), distribution=ERK(), type=NofM(1, 2)),
            ValueError,
            "which is no whole number of each 2",
        ),
        (
            lambda model: Pruner(model, OneShot(0.5), type=ConstantFanIn()),
            ValueError,
            "ConstantFanIn(): it wants a share for each layer",
        ),
        (
            lambda model: Pruner(model, OneShot(None)),
            ValueError,
            "Global: the share to keep must be a number from 0 to 1, got None",
        ),
        (
            lambda model: Pruner(model, OneShot(0.1), distribution=Uniform({"output": 2})),
            ValueError,
            "Uniform: 'output' is none of the layers to prune, which are '0', '2'",
        ),
        (
            lambda model: Pruner(model, OneShot(0.1)).prune(2),
            ValueError,
            "Pruner.prune: kept must be a number from 0 to 1, got 2",
        ),
        (
            lambda model: Pruner(model, OneShot(0.1)).rewind(),
            RuntimeError,
            "Pruner.rewind: nothing is remembered; call remember() before",
        ),
    ],
)
def test_errors(
    make_model: MakeModel, make: Callable[[nn.Module], Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=re.escape(message)):
        make(make_model("plain"))


@each_kind
def test_a_nan_is_refused_by_name(make_model: MakeModel, kind: str) -> None:
    model = make_model(kind)
    with torch.no_grad():
        model[2].weight[3, 4] = torch.nan
    pruner = Pruner(model, OneShot(0.1))
    with pytest.raises(ValueError, match="there is a NaN in tensors\\['2'\\]"):
        pruner.prune()
    assert pruner.prunings == 0
    assert model[2].update_mask is None


def test_a_weight_that_was_replaced_is_refused_by_name(make_model: MakeModel) -> None:
    model = make_model()
    pruner = Pruner(model, OneShot(0.1))
    nn.utils.parametrizations.weight_norm(model[2])
    with pytest.raises(RuntimeError, match="the weight of '2' is no longer a Parameter"):
        pruner.prune()


def test_a_folded_model_is_refused_by_name(make_model: MakeModel) -> None:
    model = make_model()
    pruner = Pruner(model, OneShot(0.1))
    pp.fold(model)
    with pytest.raises(RuntimeError, match="'0' is no longer the layer with masks that it was"):
        pruner.prune()


def test_an_exchanged_layer_is_refused_by_name(make_model: MakeModel) -> None:
    model = make_model()
    pruner = Pruner(model, OneShot(0.1))
    model[2] = pp.nn.PowerLinear(30, 3, alpha=2)
    with pytest.raises(RuntimeError, match="'2' is no longer the layer with masks that it was"):
        pruner.prune()


@pytest.mark.usefixtures("one_process")
def test_a_sharded_weight_is_refused_by_name(make_model: MakeModel) -> None:
    model = make_model("plain")
    pp.nn.add_masks(model)
    fully_shard(model[2], mesh=init_device_mesh("cpu", (1,)))
    with pytest.raises(TypeError, match="the weight of '2' is a DTensor"):
        Pruner(model, OneShot(0.1))


# ---- rewinding


@each_kind
@pytest.mark.parametrize("begin", [0, 3])
def test_iterative_pruning_with_rewinding(
    make_model: MakeModel, backward: Backward, kind: str, begin: int
) -> None:
    model = make_model(kind)
    pruner = Pruner(model, Iterative(0.125, rounds=3, every=4, begin=begin))
    remembered: dict[str, Tensor] = {}

    def remember() -> None:
        pruner.remember()
        remembered.update({name: value.clone() for name, value in model.state_dict().items()})

    if begin == 0:
        remember()
    optimizer = pp.optim.PowerSGD(model, lr=0.1, momentum=0.9)
    counts = []
    for _ in range(begin + 4 * 4):
        backward(model)
        optimizer.step()
        is_pruned = pruner.step()
        if pruner.steps == begin:
            remember()
        if is_pruned:
            pruner.rewind()
            optimizer = pp.optim.PowerSGD(model, lr=0.1, momentum=0.9)
            counts.append(pruner.kept().count)
            masks = pruner.masks()
            for name, value in model.state_dict().items():
                if name.endswith("update_mask"):
                    continue
                wanted = remembered[name]
                if name.endswith("weight"):
                    wanted = wanted.where(masks[name.removesuffix(".weight")].unpack(), 0)
                assert torch.equal(value, wanted), name
    assert counts == [450, 225, 112]
    assert same(is_zero(model), pruned(pruner))


def test_rewinding_takes_the_whole_network_back() -> None:
    model = nn.Sequential(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4), nn.PReLU())
    pp.powerize(model, 1.5)
    pruner = Pruner(model, OneShot(0.5))
    pruner.remember()
    wanted = {name: value.clone() for name, value in model.state_dict().items()}
    for _ in range(3):
        model(torch.randn(5, 3, 9))
    pp.set_alpha(model, 2.0, keep="phi")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    pruner.rewind()
    found = model.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_rewinding_leaves_frozen_entries(make_model: MakeModel) -> None:
    model = make_model()
    pruner = Pruner(model, OneShot(0.5))
    pruner.remember()
    before = theta_of(model, "0")
    trained = torch.rand(30, 20) < 0.5
    with torch.no_grad():
        model[0].weight.fill_(7)
    model[0].update_mask = BitMask.pack(trained)
    pruner.rewind()
    assert torch.equal(theta_of(model, "0"), before.where(trained, 7))


def test_rewinding_to_another_model_is_refused(make_model: MakeModel) -> None:
    model = make_model()
    pruner = Pruner(model, OneShot(0.5))
    pruner.remember()
    model.append(nn.Linear(10, 3))
    with pytest.raises(RuntimeError, match="other parameters and buffers than at remember"):
        pruner.rewind()
