"""Bad calls of op `step`: each error says what was wanted and what came, and nothing is written."""

from __future__ import annotations

import math
import re
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import ppkernels as pp

kernels_only = pytest.mark.skipif(
    pp.cpu_capability() == "reference", reason="a check of the compiled kernels alone"
)


def sgd(**changed: Any) -> None:
    """A call of two weights [2, 3] that is right but for what is ``changed``."""
    arguments: dict[str, Any] = {
        "weights": [torch.ones(2, 3), torch.ones(2, 3)],
        "grads": [torch.ones(2, 3), torch.ones(2, 3)],
        "momentum_buffers": [torch.ones(2, 3), torch.ones(2, 3)],
        "alphas": [1.5, 1.0],
        "lr": 0.1,
    }
    arguments.update(changed)
    lists = [arguments.pop(name) for name in ("weights", "grads", "momentum_buffers")]
    pp.sgd_step_(*lists, **arguments)


def adam(**changed: Any) -> None:
    arguments: dict[str, Any] = {
        "weights": [torch.ones(2, 3), torch.ones(2, 3)],
        "grads": [torch.ones(2, 3), torch.ones(2, 3)],
        "exp_avgs": [torch.ones(2, 3), torch.ones(2, 3)],
        "exp_avg_sqs": [torch.ones(2, 3), torch.ones(2, 3)],
        "max_exp_avg_sqs": [torch.ones(2, 3), torch.ones(2, 3)],
        "steps": [torch.zeros(()), torch.zeros(())],
        "alphas": [1.5, 1.0],
        "lr": 0.1,
    }
    arguments.update(changed)
    names = ("weights", "grads", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs")
    lists = [arguments.pop(name) for name in names]
    pp.adam_step_(*lists, **arguments)


CALLS = {"sgd_step_": sgd, "adam_step_": adam}
each_op = pytest.mark.parametrize("op", CALLS)


def pair(dtype: torch.dtype = torch.float32, shape: tuple[int, ...] = (2, 3)) -> list[Tensor]:
    """The first as it should be, the second of ``dtype`` and ``shape``."""
    return [torch.ones(2, 3), torch.ones(shape).to(dtype)]


def fails(op: str, changed: dict[str, Any], *parts: str) -> None:
    """The call fails with a message that begins with the op and holds ``parts`` in order."""
    pattern = "(?s)" + re.escape(op) + ": .*" + ".*".join(re.escape(part) for part in parts)
    with pytest.raises((TypeError, ValueError, RuntimeError), match=pattern):
        CALLS[op](**changed)


# ---- options


@each_op
@pytest.mark.parametrize("backend", ["kernels", "reference"])
@pytest.mark.parametrize(
    ("changed", "parts"),
    [
        ({"rule": "paper"}, ("rule must be 'virtual' or 'chain'", "got 'paper'")),
        ({"lr": -0.1}, ("lr must be a finite number >= 0", "got -0.1")),
        ({"lr": math.inf}, ("lr must be a finite number >= 0", "got inf")),
        ({"lr": torch.tensor(-0.5)}, ("lr must be a finite number >= 0", "got -0.5")),
        ({"lr": torch.tensor(math.nan)}, ("lr must be a finite number >= 0", "got nan")),
        ({"lr": torch.ones(2)}, ("lr as a tensor must hold one float32 or float64 number", "(2,)")),
        ({"lr": torch.ones((), dtype=torch.int64)}, ("lr as a tensor must hold one", "int64")),
        ({"lr": torch.ones((), requires_grad=True)}, ("no gradient with respect to lr",)),
        ({"lr": torch.ones((), device="meta")}, ("device of the weights, cpu", "got meta")),
        ({"lr": None}, ("lr must be a number", "got None")),
        ({"lr": "0.1"}, ("lr must be a number", "got '0.1'")),
        ({"lr": 1j}, ("lr must be a number", "got 1j")),
        ({"lr": np.ones(2)}, ("lr must be a number", "got array([1., 1.])")),
        ({"weight_decay": -1.0}, ("weight_decay must be a finite number >= 0", "got -1.0")),
        ({"decay": "none"}, ("decay must be 'coupled' or 'decoupled'", "got 'none'")),
        ({"decay_of": "w"}, ("decay_of must be 'theta' or 'phi'", "got 'w'")),
        (
            {"decay": "decoupled", "weight_decay": 10.0, "lr": 0.1},
            ("1 - lr * weight_decay", "must be positive", "lr 0.1 and weight_decay 10.0"),
        ),
        (
            {"decay": "decoupled", "weight_decay": math.nan},
            ("weight_decay must be a finite number >= 0", "got nan"),
        ),
    ],
    ids=str,
)
def test_options(op: str, backend: str, changed: dict[str, Any], parts: tuple[str, ...]) -> None:
    with pp.backend(backend):
        fails(op, changed, *parts)


@each_op
@pytest.mark.parametrize("lr", [np.array(0.1), np.float32(0.1), Fraction(1, 10)], ids=repr)
def test_a_learning_rate_is_whatever_is_a_number(op: str, lr: Any) -> None:
    weights = [[torch.ones(2, 3), torch.ones(2, 3)] for _ in range(2)]
    for own, rate in zip(weights, (lr, float(lr)), strict=True):
        CALLS[op](weights=own, lr=rate)
    assert all(map(torch.equal, *weights))


@kernels_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_learning_rate_in_a_graph(dtype: torch.dtype) -> None:
    """What a graph cannot check, the kernel does."""

    def step(weight: Tensor, lr: Tensor) -> None:
        pp.sgd_step_([weight], [weight], alphas=[1.5], lr=lr, weight_decay=2.0, decay="decoupled")

    compiled = torch.compile(step, fullgraph=True, backend="eager")
    weight = torch.ones(3)
    compiled(weight, torch.tensor(0.25, dtype=dtype))
    before = weight.clone()
    for rate, message in ((-0.5, "lr must be a finite number >= 0"), (0.5, "must be positive")):
        # After an error in a graph PyTorch leaves the gradient mode as it is there: off.
        with torch.enable_grad(), pytest.raises(RuntimeError, match=message):
            compiled(weight, torch.tensor(rate, dtype=dtype))
    assert torch.equal(weight, before)
    assert not torch.equal(weight, torch.ones(3))


WANTED_ALPHA = "alphas must be a finite number >= 1"


@each_op
@pytest.mark.parametrize("backend", ["kernels", "reference"])
@pytest.mark.parametrize(
    ("alpha", "parts"),
    [
        (0.5, (WANTED_ALPHA, "got 0.5")),
        (math.nan, (WANTED_ALPHA, "got nan")),
        (math.inf, (WANTED_ALPHA, "got inf")),
        ("2", ("alphas must be a float or a 0-dim float64 tensor", "got str")),
        (None, ("alphas must be a float or a 0-dim float64 tensor", "got NoneType")),
        (True, ("alphas must be a float or a 0-dim float64 tensor", "got bool")),
        (torch.tensor(0.5, dtype=torch.float64), (WANTED_ALPHA, "got 0.5")),
        (torch.tensor(1.5), ("alphas", "0-dim float64")),
        (torch.tensor([1.5], dtype=torch.float64), ("alphas", "0-dim float64")),
    ],
    ids=str,
)
def test_exponents(op: str, backend: str, alpha: Any, parts: tuple[str, ...]) -> None:
    with pp.backend(backend):
        fails(op, {"alphas": [1.5, alpha]}, *parts)


# ---- lists


@pytest.mark.parametrize("backend", ["kernels", "reference"])
@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize(
    ("op", "name"),
    [
        *(("sgd_step_", name) for name in ("grads", "momentum_buffers")),
        *(("adam_step_", name) for name in ("exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "steps")),
        *((op, name) for op in CALLS for name in ("alphas", "masters", "masks", "holds_phi")),
    ],
)
def test_lists_of_another_length(op: str, name: str, length: int, backend: str) -> None:
    entry: Any = torch.ones(2, 3)
    entry = {"alphas": 1.5, "holds_phi": True, "steps": torch.zeros(())}.get(name, entry)
    with pp.backend(backend):
        wanted = f"{name} must have an entry for each of the 2 weights"
        fails(op, {name: [entry] * length}, wanted, f"got {length}")


@pytest.mark.parametrize("op", ["adam_step_"])
@pytest.mark.parametrize("backend", ["kernels", "reference"])
def test_moments_are_not_optional(op: str, backend: str) -> None:
    with pp.backend(backend):
        for name in ("exp_avgs", "exp_avg_sqs", "steps"):
            fails(op, {name: []}, f"{name} must have an entry for each of the 2 weights", "got 0")


# ---- tensors


@kernels_only
@each_op
@pytest.mark.parametrize(
    ("changed", "parts"),
    [
        ({"grads": pair(torch.float64)}, ("grads", "(2, 3) Float", "got (2, 3) Double")),
        ({"grads": pair(shape=(3, 2))}, ("grads", "(2, 3) Float", "got (3, 2) Float")),
        ({"grads": pair(shape=(6,))}, ("grads", "(2, 3) Float", "got (6) Float")),
        ({"weights": pair(torch.int64)}, ("float32, float64, bfloat16 or float16",)),
        ({"weights": pair(torch.complex64)}, ("float32, float64, bfloat16 or float16",)),
        ({"masters": pair()}, ("a master copy is float32 beside a half weight",)),
        ({"masters": pair(torch.float64)}, ("master",)),
    ],
    ids=str,
)
def test_tensors_that_do_not_fit(
    op: str, changed: dict[str, list[Tensor]], parts: tuple[str, ...]
) -> None:
    fails(op, changed, *parts)


@kernels_only
@pytest.mark.parametrize(
    ("op", "name"),
    [
        ("sgd_step_", "momentum_buffers"),
        *(("adam_step_", name) for name in ("exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs")),
    ],
)
def test_states_that_do_not_fit(op: str, name: str) -> None:
    for dtype, shape in (
        (torch.float64, (2, 3)),
        (torch.bfloat16, (2, 3)),
        (torch.float32, (3, 2)),
        (torch.float32, (0,)),
    ):
        wanted = f"{name} must be a CPU tensor like its weight, (2, 3) Float"
        fails(op, {name: pair(dtype, shape)}, wanted, "got")


@kernels_only
def test_states_of_two_dtypes() -> None:
    half = [torch.ones(2, 3, dtype=torch.bfloat16) for _ in range(2)]
    lists = {"weights": half, "grads": half, "exp_avgs": half, "max_exp_avg_sqs": []}
    wanted = "the states of a weight must have one dtype"
    fails("adam_step_", lists, wanted, "got (2, 3) BFloat16 and (2, 3) Float")
    halves = {"weights": half, "grads": half, "momentum_buffers": half}
    masters = [torch.ones(2, 3) for _ in range(2)]
    fails("sgd_step_", {**halves, "masters": masters}, "a master copy", "with float32 states")


@kernels_only
@each_op
def test_masks(op: str) -> None:
    good = torch.zeros(1, dtype=torch.uint8)
    wanted = "words must be a contiguous uint8 CPU tensor of 1 bytes, one bit for each of 6 entries"
    for words in (
        torch.zeros(2, dtype=torch.uint8),
        torch.zeros(6, dtype=torch.uint8),
        torch.zeros(1, dtype=torch.bool),
        torch.zeros(1, 1, dtype=torch.uint8),
        torch.ones(2, 3, dtype=torch.bool),
    ):
        fails(op, {"masks": [good, words]}, wanted, "got")


@kernels_only
@each_op
@pytest.mark.parametrize("name", ["grad_scale", "found_inf"])
def test_numbers_of_a_grad_scaler(op: str, name: str) -> None:
    for number in (torch.ones(2), torch.ones(1, dtype=torch.float64), torch.empty(0)):
        fails(op, {name: number}, f"{name} must hold one float32 number on the CPU", "got")


@kernels_only
def test_step_counts() -> None:
    for step in (torch.zeros(2), torch.zeros((), dtype=torch.int64), torch.zeros(0)):
        good = torch.zeros(())
        fails("adam_step_", {"steps": [good, step]}, "steps must be float32 tensors of one number")
        assert good.item() == 0, "a step was counted that was not taken"


@each_op
def test_sparse_tensors(op: str) -> None:
    sparse = [torch.ones(2, 3), torch.ones(2, 3).to_sparse()]
    for name in ("weights", "grads"):
        with pytest.raises((TypeError, ValueError, RuntimeError, NotImplementedError)):
            CALLS[op](**{name: sparse})


@kernels_only
@each_op
def test_nothing_is_written_by_a_call_that_fails(op: str) -> None:
    weights = [torch.ones(2, 3), torch.ones(2, 3)]
    with pytest.raises(RuntimeError):
        CALLS[op](weights=weights, grads=pair(shape=(3, 2)))
    with pytest.raises((RuntimeError, ValueError)):
        CALLS[op](weights=weights, masks=[torch.zeros(1, dtype=torch.uint8), torch.zeros(7)])
    assert all(torch.equal(weight, torch.ones(2, 3)) for weight in weights)


def test_numbers_of_one_optimizer() -> None:
    weights, grads, ones = [torch.ones(3)], [torch.ones(3)], [torch.ones(3)]
    with pytest.raises(ValueError, match=r"sgd_step_: momentum 0\.9 needs momentum_buffers"):
        pp.sgd_step_(weights, grads, alphas=[2.0], lr=0.1, momentum=0.9)
    for name, value in (("beta1", 1.0), ("beta2", 1.0), ("beta2", -0.1), ("eps", -1.0)):
        with pytest.raises(ValueError, match=f"adam_step_: {name} must be a"):
            pp.adam_step_(
                *(weights, grads, ones, ones),
                steps=[torch.zeros(())],
                alphas=[2.0],
                lr=0.1,
                **{name: value},
            )


@pytest.mark.parametrize("name", ["kernels", "reference"])
def test_nothing_happens_where_a_later_weight_is_wrong(name: str) -> None:
    weights, grads = [torch.ones(3), torch.ones(3)], [torch.ones(3), torch.ones(3)]
    moments = [[torch.zeros(3), torch.zeros(3)] for _ in range(2)]
    steps = [torch.zeros(()), torch.zeros((), dtype=torch.int64)]
    with pp.backend(name), pytest.raises((TypeError, RuntimeError), match="steps must be float32"):
        pp.adam_step_(weights, grads, *moments, steps=steps, alphas=[2.0, 2.0], lr=0.1)
    assert [step.item() for step in steps] == [0, 0]
    assert all(torch.equal(weight, torch.ones(3)) for weight in weights)


def test_a_step_left_out_bumps_no_version() -> None:
    weight = torch.ones(3)
    version = weight._version
    pp.sgd_step_([weight], [torch.ones(3)], alphas=[2.0], lr=0.1, found_inf=torch.ones(()))
    assert weight._version == version
