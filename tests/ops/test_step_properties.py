"""Random sizes, options, masks and values: every step is that of the exact step."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ppkernels as pp
from ppkernels.testing_steps import StepCase, check_step, step_lists, stepped

# The same examples in every run, as many as are quick.
quick = settings(derandomize=True, deadline=None, max_examples=300, database=None)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
alphas = st.one_of(st.sampled_from([1.0, 1.5, 2.0, 3.0, 4.0, 6.0]), st.floats(1, 8))
rates = st.floats(0, 0.999)


@st.composite
def cases(draw: st.DrawFn) -> StepCase:
    """An op and its options, all of them drawn."""
    lr = 10 ** draw(st.floats(-5, 0.5))
    options = {
        "lr": lr,
        "weight_decay": draw(st.sampled_from([0.0, 1e-4, 0.1, 0.5])) / max(lr, 1.0),
        "decay": draw(st.sampled_from(["coupled", "decoupled"])),
        "decay_of": draw(st.sampled_from(["theta", "phi"])),
        "rule": draw(st.sampled_from(["virtual", "chain"])),
        "maximize": draw(st.booleans()),
    }
    if draw(st.booleans()):
        own = {"beta1": draw(rates), "beta2": draw(rates), "eps": 10 ** draw(st.floats(-12, -3))}
        return StepCase("drawn", "adam_step_", draw(st.sampled_from([2, 3])), {**options, **own})
    buffers = draw(st.sampled_from([0, 1]))
    own = {
        "momentum": draw(rates) if buffers else 0.0,
        "dampening": draw(rates),
        "nesterov": draw(st.booleans()),
    }
    return StepCase("drawn", "sgd_step_", buffers, {**options, **own})


@quick
@given(st.data(), cases(), st.sampled_from(DTYPES), st.integers(0, 150))
def test_a_masked_step_is_the_exact_one(
    data: st.DataObject, case: StepCase, dtype: torch.dtype, size: int
) -> None:
    exponents = data.draw(st.lists(alphas, min_size=1, max_size=3))
    state_dtype = data.draw(st.sampled_from([dtype, torch.float32]))
    before = step_lists(case, dtype, size, exponents, state_dtype)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    share = data.draw(st.sampled_from([0, 0.5, 1]))
    free = [torch.rand(size, generator=generator) < share for _ in before.weights]
    words = [pp.BitMask.pack(mask).words for mask in free]
    after = stepped(case, before, masks=words)
    masked = [before.weights, before.grads, *before.states, after.weights, *after.states]
    for tensors, start in zip(
        (after.weights, *after.states), (before.weights, *before.states), strict=True
    ):
        for tensor, earlier, mask in zip(tensors, start, free, strict=True):
            assert torch.equal(tensor[~mask], earlier[~mask])
    for tensors in masked:
        tensors[:] = [tensor[mask] for tensor, mask in zip(tensors, free, strict=True)]
    check_step(case, before, after, is_reference=pp.cpu_capability() == "reference")
