"""`pp.sparsity.Pruner`: what it prunes, when, and that it stays pruned."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import ppkernels as pp
from ppkernels.sparsity import Cubic, OneShot, Pruner, Uniform, entries_of

SIZES = {"0": 20 * 30, "2": 30 * 10}


def powered_model(stores: str = "theta", alpha: float = 1.5) -> nn.Module:
    model = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 10))
    return pp.powerize(model, alpha, stores)


@pytest.mark.parametrize("stores", ["theta", "phi"])
def test_one_shot_keeps_the_largest_weights(stores: str) -> None:
    model = powered_model(stores)
    before = torch.cat([model[0].theta.flatten(), model[2].theta.flatten()]).detach()
    Pruner(model, OneShot(0.29)).prune()
    after = torch.cat([model[0].theta.flatten(), model[2].theta.flatten()]).detach()
    largest = before.abs().argsort(descending=True)[: entries_of(0.29, 900)]
    wanted = torch.zeros_like(before).index_copy(0, largest, before[largest])
    assert torch.equal(after, wanted)


def test_gradual_pruning_with_a_factor() -> None:
    model = powered_model()
    optimizer = pp.optim.PowerSGD(model, lr=0.1, momentum=0.9)
    pruner = Pruner(model, Cubic(0.1, 2, 20, 5), distribution=Uniform({"2": 2}))
    pruned_at = []
    for step in range(1, 30):
        optimizer.zero_grad()
        model(torch.randn(8, 20)).square().mean().backward()
        optimizer.step()
        if pruner.step():
            pruned_at.append(step)
        assert pruner.kept().counts == {
            name: int((model.get_submodule(name).weight != 0).sum()) for name in SIZES
        }
    assert pruned_at == [7, 12, 17, 20]
    assert pruner.kept().counts == {"0": 60, "2": 60}
    assert pruner.kept().entries == SIZES
