"""Op `step`: its values against the exact step."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import ppkernels as pp
from ppkernels.testing_steps import (
    DTYPES,
    STEP_ALPHAS,
    StepCase,
    check_step,
    step_cases,
    step_lists,
    stepped,
    take_step,
)

CASES = {case.name: case for case in step_cases()}
# Each optimizer once and each kind of decay twice.
SOME_CASES = [name for i, name in enumerate(CASES) if i % 7 == 3]
IS_REFERENCE = pp.cpu_capability() == "reference"

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
some_cases = pytest.mark.parametrize("case", [CASES[name] for name in SOME_CASES], ids=SOME_CASES)


# ---- values


@each_dtype
@each_case
def test_values(case: StepCase, dtype: torch.dtype) -> None:
    before = step_lists(case, dtype, 6 if dtype is torch.float64 else 500)
    check_step(case, before, stepped(case, before), IS_REFERENCE)


@each_case
def test_values_of_the_reference(case: StepCase) -> None:
    with pp.backend("reference"):
        for dtype, count in ((torch.float64, 6), (torch.float32, 500)):
            before = step_lists(case, dtype, count)
            check_step(case, before, stepped(case, before), is_reference=True)


@some_cases
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_values_with_float32_states_of_half_weights(case: StepCase, dtype: torch.dtype) -> None:
    before = step_lists(case, dtype, 300, state_dtype=torch.float32)
    check_step(case, before, stepped(case, before), IS_REFERENCE)


@some_cases
def test_several_steps_in_a_row(case: StepCase) -> None:
    # Weights of a usual size and steps that are small beside them: larger ones end anywhere.
    case = dataclasses.replace(case, options={**case.options, "lr": 1e-4})
    alphas = [alpha for alpha in STEP_ALPHAS if alpha <= 8]
    start = step_lists(case, torch.float32, 300, alphas)
    start.weights = [weight.sign() * (weight.abs() + 0.1) for weight in start.weights]
    exact, plain, ours = start.map(torch.Tensor.double), start.clone(), start.clone()
    for _ in range(20):
        with pp.backend("reference"):
            take_step(case, exact)
            take_step(case, plain)
        take_step(case, ours)
    for weight, fair, wanted in zip(ours.weights, plain.weights, exact.weights, strict=True):
        error, fair_error = ((w.double() - wanted).abs().max().item() for w in (weight, fair))
        # Each step may round once: half a unit in the last place, mostly of either sign.
        unit = torch.finfo(torch.float32).eps * wanted.abs().max().item()
        assert error <= 2 * fair_error + 3 * unit, f"error in units {error / unit}"
