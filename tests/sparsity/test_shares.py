"""entries_of: what a share of some entries means."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

import ppkernels as pp
from ppkernels.sparsity import ERK, Global, OneShot, PerLayer, Pruner, Uniform, entries_of


@pytest.mark.parametrize(
    ("share", "entries", "count"),
    [
        (0.29, 100, 29),
        (1 - 0.9, 10, 1),
        (Fraction(1, 3), 3, 1),
        (np.float64(0.29), 100, 29),
        (np.float32(0.29), 100, 29),
        (np.float16(0.29), 100, 29),
        (np.int32(1), 7, 7),
        (0.5, np.int64(7), 3),
        (0, 5, 0),
        (1, 5, 5),
        # No more than a fraction of an entry is given for the rounding.
        (0.7, 10**13, 7 * 10**12),
        (0.7 - 1e-13, 10**13, 7 * 10**12 - 1),
    ],
)
def test_counts(share: Any, entries: Any, count: int) -> None:
    assert entries_of(share, entries) == count


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_every_per_cent_is_what_it_prints_as(dtype: Any) -> None:
    assert [entries_of(dtype(i / 100), 100) for i in range(101)] == list(range(101))


def test_a_float32_that_became_a_float_cannot_be_told() -> None:
    assert entries_of(torch.tensor(0.29).item(), 100) == 28


@pytest.mark.parametrize("distribution", [Global(), Uniform(), ERK(), PerLayer({"0": 0})])
def test_narrow_shares_reach_the_pruner(distribution: Any) -> None:
    share = np.float32(0.29)
    model = torch.nn.Sequential(torch.nn.Linear(10, 10))
    if isinstance(distribution, PerLayer):
        distribution, kept = PerLayer({"0": share}), None
    else:
        kept = share
    pruner = Pruner(model, OneShot(kept), distribution=distribution)
    pruner.prune()
    assert pruner.kept().count == 29


A = torch.randn(10)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: entries_of(0.5, -3), ValueError, "entries_of: entries must be .* >= 0, got -3"),
        (lambda: entries_of(0.5, 2.5), TypeError, "entries_of: entries must be .*, got 2.5"),
        (lambda: entries_of(0.5, True), TypeError, "entries_of: entries must be .*, got True"),
        (lambda: entries_of("0.5", 3), TypeError, "entries_of: share must be .*, got '0.5'"),
        (lambda: entries_of(1.5, 3), ValueError, "entries_of: share must be .*, got 1.5"),
        (lambda: pp.topk_mask(A, share=1.5), ValueError, "^topk_mask: share must be .* got 1.5"),
        (lambda: pp.topk_mask(A, share="x"), TypeError, "^topk_mask: share must be .* got 'x'"),
        (
            lambda: pp.topk_mask([A, A], share=[0.5, 2]),
            ValueError,
            r"^topk_mask: share\[1\] must be .* got 2",
        ),
        (
            lambda: pp.topk_mask({"fc": A}, share={"fc": -1}),
            ValueError,
            r"^topk_mask: share\['fc'\] must be .* got -1",
        ),
    ],
)
def test_errors(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
