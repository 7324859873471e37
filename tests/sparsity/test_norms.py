"""`pp.sparsity.reestimate_batch_norm`: means over batches, and nothing else changed."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ppkernels.sparsity import reestimate_batch_norm


class Network(nn.Module):
    """Norms of both kinds behind a dropout, one without statistics, one frozen in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.5)
        self.norm = nn.BatchNorm2d(3, momentum=0.3)
        self.instance = nn.InstanceNorm2d(3, track_running_stats=True)
        self.stateless = nn.BatchNorm2d(3, track_running_stats=False)
        self.frozen = nn.BatchNorm2d(3).eval()

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.dropout(x))
        return self.frozen(self.stateless(self.instance(x)))


def batches(count: int = 4) -> list[Tensor]:
    return [torch.randn(5, 3, 4, 4) * (i + 1) + i for i in range(count)]


def buffers(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.named_buffers()}


def test_statistics_are_means_over_the_batches() -> None:
    model, inputs = Network(), batches()
    model(inputs[0])
    reestimate_batch_norm(model, inputs)
    # The dropout is in eval mode, so the first norm sees the inputs themselves.
    mean = torch.stack([x.mean((0, 2, 3)) for x in inputs]).mean(0)
    variance = torch.stack([x.var((0, 2, 3)) for x in inputs]).mean(0)
    torch.testing.assert_close(model.norm.running_mean, mean)
    torch.testing.assert_close(model.norm.running_var, variance)
    assert model.norm.num_batches_tracked == len(inputs)
    after = nn.BatchNorm2d(3, affine=False)
    instances = [after(x).var((2, 3)).mean(0) for x in inputs]
    torch.testing.assert_close(
        model.instance.running_var, torch.stack(instances).mean(0), rtol=1e-4, atol=1e-4
    )
    assert model.frozen.running_mean.abs().max() > 0


@pytest.mark.parametrize("training", [True, False])
def test_nothing_else_changes(training: bool) -> None:
    model = Network().train(training)
    model.frozen.eval()
    model.dropout.train()
    before = copy.deepcopy(model)
    state = torch.get_rng_state()
    reestimate_batch_norm(model, iter(batches()))
    assert [m.training for m in model.modules()] == [m.training for m in before.modules()]
    assert model.norm.momentum == 0.3
    for one, other in zip(model.parameters(), before.parameters(), strict=True):
        assert torch.equal(one, other)
        assert one.grad is None
    torch.set_rng_state(state)
    again = copy.deepcopy(model)
    torch.manual_seed(3)
    reestimate_batch_norm(again, [x.clone() for x in batches()])
    assert [b.shape for b in again.buffers()] == [b.shape for b in model.buffers()]


@pytest.mark.parametrize(
    "form",
    [lambda x: x, lambda x: (x, 1), lambda x: [x, torch.zeros(5)]],
    ids=["tensor", "tuple", "list"],
)
def test_forms_of_batches(form: Any) -> None:
    inputs = batches()
    one, other = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
    reestimate_batch_norm(one, map(form, inputs))
    reestimate_batch_norm(
        other,
        [{"image": x} for x in inputs],
        forward=lambda model, batch: model(batch["image"]),
    )
    assert torch.equal(one.running_mean, other.running_mean)
    assert torch.equal(one.running_var, other.running_var)


def test_a_model_without_such_layers_asks_for_no_batch() -> None:
    def none() -> Any:
        raise AssertionError("a batch was asked for")
        yield

    reestimate_batch_norm(nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3)), none())


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        ([], ValueError, "reestimate_batch_norm: batches must be at least one, got none"),
        ([torch.ones(2, 3, 4, 4), {"x": 1}], TypeError, "got dict; for batches of other kinds"),
        ([()], TypeError, "a batch must be a tensor, or a tuple or list that begins with one"),
        (
            [torch.ones(2, 3, 4, 4), torch.ones(2, 9, 4, 4)],
            RuntimeError,
            "should contain 9 elements",
        ),
    ],
    ids=["none", "dict", "empty", "channels"],
)
def test_after_an_error_all_is_as_it_was(
    inputs: list[Any], error: type[Exception], message: str
) -> None:
    model = Network()
    model(torch.randn(5, 3, 4, 4))
    before, modes = buffers(model), [module.training for module in model.modules()]
    with pytest.raises(error, match=re.escape(message)):
        reestimate_batch_norm(model, inputs)
    after = buffers(model)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [module.training for module in model.modules()] == modes
    assert model.norm.momentum == 0.3


def test_a_model_is_wanted() -> None:
    with pytest.raises(TypeError, match=re.escape("must be a torch.nn.Module, got list")):
        reestimate_batch_norm([nn.BatchNorm2d(3)], batches())
