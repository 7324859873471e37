"""Distributions: shares and counts, ERK beside a search for its ε in plain Python."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ppkernels.sparsity import ERK, Global, PerLayer, Size, Uniform, Unstructured, entries_of


def sizes(*shapes: tuple[int, ...]) -> dict[str, Size]:
    return {
        f"layer{i}": Size(torch.Size(shape), math.prod(shape)) for i, shape in enumerate(shapes)
    }


MLP = {
    "fc1": Size(torch.Size((300, 784)), 300 * 784),
    "fc2": Size(torch.Size((100, 300)), 300 * 100),
    "output": Size(torch.Size((10, 100)), 10 * 100),
}


@pytest.mark.parametrize(
    ("distribution", "kept", "wanted"),
    [
        (Global(), 0.29, 0.29),
        (Uniform(), 0.29, {"fc1": 0.29, "fc2": 0.29, "output": 0.29}),
        (Uniform({"output": 2}), 0.29, {"fc1": 0.29, "fc2": 0.29, "output": 0.58}),
        (Uniform({"output": 2}), 0.6, {"fc1": 0.6, "fc2": 0.6, "output": 1.0}),
        (Uniform({"fc1": 0.5}), 1.0, {"fc1": 0.5, "fc2": 1.0, "output": 1.0}),
        (
            PerLayer({"output": 1, "fc2": 0.5, "fc1": 0}),
            None,
            {"fc1": 0.0, "fc2": 0.5, "output": 1.0},
        ),
    ],
    ids=str,
)
def test_shares(distribution: Any, kept: float | None, wanted: Any) -> None:
    assert distribution.shares(MLP, kept) == wanted


def test_counts_are_what_a_person_expects() -> None:
    hundred = sizes((10, 10), (5, 20))
    assert Unstructured().counts(hundred, 0.29) == 58
    assert Unstructured().counts(hundred, Uniform().shares(hundred, 0.29)) == {
        "layer0": 29,
        "layer1": 29,
    }


def erk_by_search(shapes: list[tuple[int, ...]], total: int) -> list[float]:
    """Wanted counts: ε found by halving an interval."""

    def counts(epsilon: float) -> list[float]:
        return [min(math.prod(shape), epsilon * sum(shape)) for shape in shapes]

    low, high = 0.0, float(max(math.prod(shape) for shape in shapes))
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(counts(middle)) < total else (low, middle)
    return counts(high)


SHAPES = st.lists(
    st.one_of(
        st.tuples(st.integers(1, 40), st.integers(1, 40)),
        st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 5), st.integers(1, 5)),
    ),
    min_size=1,
    max_size=6,
)


@given(shapes=SHAPES, kept=st.floats(0, 1))
def test_erk_is_what_a_search_finds_and_exact_in_total(
    shapes: list[tuple[int, ...]], kept: float
) -> None:
    some = sizes(*shapes)
    total = entries_of(kept, sum(map(math.prod, shapes)))
    counts = Unstructured().counts(some, ERK().shares(some, kept))
    assert isinstance(counts, dict)
    assert sum(counts.values()) == total
    for count, wanted, shape in zip(
        counts.values(), erk_by_search(shapes, total), shapes, strict=True
    ):
        assert abs(count - wanted) < 1 + 1e-6
        assert count <= math.prod(shape)


def test_erk_of_a_known_network() -> None:
    # The output layer is dense, so ε = (26620 − 1000)/(1084 + 400) = 17.264.
    counts = Unstructured().counts(MLP, ERK().shares(MLP, 0.1))
    assert counts == {"fc1": 18_714, "fc2": 6_906, "output": 1_000}


@pytest.mark.parametrize("kept", [0, 0.3, 1])
def test_erk_beside_a_layer_without_entries(kept: float) -> None:
    some = sizes((0, 8), (4, 5))
    counts = Unstructured().counts(some, ERK().shares(some, kept))
    assert counts == {"layer0": 0, "layer1": entries_of(kept, 20)}


def test_erk_leaves_frozen_entries_out() -> None:
    some = {"a": Size(torch.Size((10, 10)), 50), "b": Size(torch.Size((10, 10)), 100)}
    assert Unstructured().counts(some, ERK().shares(some, 0.2)) == {"a": 10, "b": 20}


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: Uniform({"out": 2}).shares(MLP, 0.1),
            ValueError,
            "Uniform: 'out' is none of the layers to prune, which are 'fc1', 'fc2', 'output'",
        ),
        (
            lambda: PerLayer({"fc1": 0.1, "fc2": 0.2}).shares(MLP, None),
            ValueError,
            "PerLayer: there is no share for 'output'",
        ),
        (
            lambda: PerLayer({"fc3": 0.1}).shares(MLP, None),
            ValueError,
            "PerLayer: 'fc3' is none of the layers",
        ),
        (
            lambda: PerLayer({"fc1": 0.1}).shares(MLP, 0.1),
            ValueError,
            "PerLayer: it has the shares itself, so that of the schedule, or of prune(), must",
        ),
        (lambda: Global().shares(MLP, None), ValueError, "Global: the share to keep must be"),
        (lambda: ERK().shares(MLP, None), ValueError, "ERK: the share to keep must be"),
        (lambda: Uniform({"a": 0}), ValueError, "the factor of 'a' must be finite and above 0"),
        (lambda: Uniform({"a": "2"}), TypeError, "the factor of 'a' must be a number, got '2'"),
        (lambda: Uniform(2), TypeError, "factors must be a mapping from names of layers"),
        (lambda: PerLayer(0.5), TypeError, "kept must be a mapping from names of layers"),
        (lambda: PerLayer({"a": 2}), ValueError, "kept['a'] must be a number from 0 to 1, got 2"),
    ],
)
def test_errors(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        make()
