"""`pp.statistics` of several tensors, `pp.Statistics`, and every error of the two."""

from __future__ import annotations

import copy
import math
import pickle
import re
from dataclasses import FrozenInstanceError, replace
from types import MappingProxyType

import numpy as np
import pytest
import torch

import ppkernels as pp

A, B = torch.linspace(-1, 1, 11), torch.linspace(0, 3, 7).double()
MASK = pp.BitMask.pack(A > 0)

# ---- one tensor, a list, a mapping


def test_the_form_of_the_tensors_comes_back() -> None:
    one, other = pp.statistics(A, [0.5]), pp.statistics(B, [0.5])
    assert pp.statistics([A, B], [0.5]) == [one, other]
    assert pp.statistics((A, B), [0.5]) == [one, other]
    assert pp.statistics({"a": A, 3: B}, [0.5]) == {"a": one, 3: other}
    assert pp.statistics(MappingProxyType({"a": A}), [0.5]) == {"a": one}
    assert pp.statistics([]) == []
    assert pp.statistics({}) == {}


def test_each_tensor_has_its_own_alpha_and_mask() -> None:
    wanted = [pp.statistics(A, within=MASK), pp.statistics(B, (), 2.0)]
    assert pp.statistics([A, B], (), [None, 2.0], within=[MASK, None]) == wanted
    exponent = torch.tensor(2.0, dtype=torch.float64)
    spread = pp.statistics(
        {"a": A, "b": B}, (), {"b": exponent, "a": 1.0}, within={"b": None, "a": MASK}
    )
    assert list(spread.values()) == wanted
    assert pp.statistics([A, A], (), 1.5) == [pp.statistics(A, (), 1.5)] * 2


def test_numbers_of_other_kinds() -> None:
    found = pp.statistics(A, np.array([0.5, 1]), bins=np.int64(4), range=[np.float32(-1), 1])
    assert found == pp.statistics(A, [0.5, 1.0], bins=4, range=(-1.0, 1.0))
    assert type(found.epsilons[0]) is float
    assert pp.statistics(A, (e for e in (0.1, 0.1))).below == {0.1: 1}
    # Ends without bins say nothing.
    assert pp.statistics(A, range=(0, 1)) == pp.statistics(A)


# ---- pp.Statistics


def test_derived_numbers() -> None:
    found = pp.statistics(torch.tensor([-1.0, 0.5, 2.0, 0.0]), [0.75], bins=2, range=(-1, 1))
    assert (found.mean, found.mean_abs, found.mean_square) == (0.375, 0.875, 1.3125)
    assert found.below == {0.75: 2}
    assert found.share_below(0.75) == 0.5
    assert found.edges == (-1.0, 0.0, 1.0)
    assert pp.statistics(A).edges == ()
    with pytest.raises(ValueError, match=r"^Statistics.share_below: epsilon must be one of \(0.75"):
        found.share_below(0.5)


def test_statistics_are_values() -> None:
    found = pp.statistics(A, [0.5], bins=3, range=(0, 1))
    again = pp.statistics(A.clone(), [0.5], bins=3, range=(0, 1))
    assert found == again
    assert hash(found) == hash(again)
    assert pickle.loads(pickle.dumps(found)) == found == copy.deepcopy(found)
    with pytest.raises(FrozenInstanceError):
        found.count = 3
    found.below[0.5] = 99
    assert found == again


def test_combined_is_that_of_all_entries() -> None:
    options = {"bins": 5, "range": (-1, 2)}
    parts = pp.statistics([A, B, torch.empty(0)], [0.5, 0.1], **options)
    together = pp.Statistics.combined(iter(parts))
    whole = pp.statistics(torch.cat([A.double(), B]), [0.5, 0.1], **options)
    sums = ("sum", "sum_abs", "sum_square")
    assert replace(together, **dict.fromkeys(sums, 0.0)) == replace(
        whole, **dict.fromkeys(sums, 0.0)
    )
    for name in sums:
        assert getattr(together, name) == pytest.approx(getattr(whole, name), rel=1e-14)
    assert pp.Statistics.combined([parts[0]]) == parts[0]


def test_combined_sums_of_any_size() -> None:
    def of(*values: float) -> pp.Statistics:
        return pp.statistics(torch.tensor(values, dtype=torch.float64))

    assert pp.Statistics.combined([of(1e308), of(1e308)]).sum == math.inf
    assert math.isnan(pp.Statistics.combined([of(math.inf), of(-math.inf)]).sum)
    assert pp.Statistics.combined([of(1e16), of(1.0), of(-1e16)]).sum == 1.0


def test_combined_refuses_what_does_not_go_together() -> None:
    found = pp.statistics(A, [0.5], bins=2, range=(0, 1))
    others = [
        pp.statistics(A, [0.4], bins=2, range=(0, 1)),
        pp.statistics(A, [0.5], bins=3, range=(0, 1)),
        pp.statistics(A, [0.5], bins=2, range=(0, 2)),
    ]
    for other in others:
        with pytest.raises(ValueError, match=r"^Statistics.combined: the parts must have the same"):
            pp.Statistics.combined([found, other])
    with pytest.raises(ValueError, match=r"^Statistics.combined: there are no parts$"):
        pp.Statistics.combined([])
    with pytest.raises(TypeError, match=r"^Statistics.combined: parts must be pp.Statistics, got"):
        pp.Statistics.combined([found, 3])


# ---- errors

ERRORS = [
    # tensors
    (lambda: pp.statistics(3), TypeError, "tensors must be a tensor, or a list or mapping"),
    (lambda: pp.statistics("fc"), TypeError, "tensors must be a tensor, or a list or mapping"),
    (lambda: pp.statistics([A, 3]), TypeError, "tensors[1] must be a torch.Tensor, got int"),
    (lambda: pp.statistics(A.int()), TypeError, "tensor must be float32, float64, bfloat16 or"),
    (lambda: pp.statistics(A.to_sparse()), TypeError, "tensor must be a dense tensor, got layout"),
    (lambda: pp.statistics({"w": A.to("meta")}), ValueError, "tensors['w'] is on the meta device"),
    (
        lambda: pp.statistics({"w": torch.tensor([1.0, math.nan])}),
        ValueError,
        "there is a NaN in tensors['w'] (1 of 2 entries)",
    ),
    # epsilons
    (lambda: pp.statistics(A, 0.1), TypeError, "epsilons must be a list of numbers, got 0.1"),
    (lambda: pp.statistics(A, "0.1"), TypeError, "epsilons must be a list of numbers, got '0.1'"),
    (lambda: pp.statistics(A, {0.1: 1}), TypeError, "epsilons must be a list of numbers, got {"),
    (lambda: pp.statistics(A, A[:1]), TypeError, "epsilons must be a list of numbers, got tensor"),
    (lambda: pp.statistics(A, ["0.1"]), TypeError, "epsilons must be numbers, got '0.1'"),
    (lambda: pp.statistics(A, [True]), TypeError, "epsilons must be numbers, got True"),
    (lambda: pp.statistics(A, [-0.1]), ValueError, "epsilons must be numbers >= 0, got -0.1"),
    (lambda: pp.statistics(A, [math.nan]), ValueError, "epsilons must be numbers >= 0, got nan"),
    # alpha
    (lambda: pp.statistics(A, (), 0.5), ValueError, "alpha must be a finite number >= 1, got 0.5"),
    (lambda: pp.statistics(A, (), "2"), TypeError, "alpha must be a float or a 0-dim float64"),
    (
        lambda: pp.statistics(A, (), torch.tensor(2.0)),
        TypeError,
        "alpha as a tensor must be 0-dim float64",
    ),
    (
        lambda: pp.statistics([A, B], (), [1.0, math.inf]),
        ValueError,
        "alpha[1] must be a finite number >= 1, got inf",
    ),
    (
        lambda: pp.statistics({"w": A}, (), {"w": 0.0}),
        ValueError,
        "alpha['w'] must be a finite number >= 1, got 0.0",
    ),
    (
        lambda: pp.statistics([A, B], (), [2.0]),
        ValueError,
        "alpha as a list must go with a list of as many tensors, got 1 for 2",
    ),
    (
        lambda: pp.statistics([A], (), {"w": 2.0}),
        TypeError,
        "alpha may be a mapping only where tensors are one",
    ),
    (
        lambda: pp.statistics({"w": A}, (), {"v": 2.0}),
        ValueError,
        "alpha must have the keys of tensors, ['w'], got ['v']",
    ),
    # bins
    (lambda: pp.statistics(A, bins=2.0), TypeError, "bins must be a whole number, got 2.0"),
    (lambda: pp.statistics(A, bins=True), TypeError, "bins must be a whole number, got True"),
    (lambda: pp.statistics(A, bins=-1), ValueError, "bins must be a number from 0 to 1048576"),
    (lambda: pp.statistics(A, bins=2**31), ValueError, "bins must be a number from 0 to"),
    (lambda: pp.statistics(A, bins=2), ValueError, "2 bins need a range, (low, high)"),
    # range
    (lambda: pp.statistics(A, bins=2, range=1), TypeError, "range must be a pair of numbers"),
    (lambda: pp.statistics(A, bins=2, range=(0, 1, 2)), TypeError, "range must be a pair of"),
    (lambda: pp.statistics(A, bins=2, range=(0, None)), TypeError, "range must be numbers, got N"),
    (lambda: pp.statistics(A, range=(1, 0)), ValueError, "range must be (low, high) with low"),
    (lambda: pp.statistics(A, bins=2, range=(1, 1)), ValueError, "range must be (low, high) with"),
    (lambda: pp.statistics(A, bins=2, range=(0, math.inf)), ValueError, "range must be (low, hi"),
    (lambda: pp.statistics(A, bins=2, range=(math.nan, 1)), ValueError, "range must be (low, hig"),
    (lambda: pp.statistics(A, bins=2, range=(-1e308, 1e308)), ValueError, "range must be (low, h"),
    (lambda: pp.statistics(A, bins=2, range=(0, 1e-310)), ValueError, "range (0.0, 1e-310) is too"),
    # within
    (
        lambda: pp.statistics([A], within=[A > 0]),
        TypeError,
        "within must be a pp.BitMask for tensors[0], got Tensor",
    ),
    (
        lambda: pp.statistics(B, within=MASK),
        ValueError,
        "within must have the shape of tensor, (7,), got (11,)",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), ERRORS, ids=lambda value: str(value)[:60])
def test_errors(call: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match="^" + re.escape(f"statistics: {message}")):
        call()
