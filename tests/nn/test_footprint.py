"""`pp.footprint`: bytes in memory and on disk, beside those of the dense model."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ppkernels as pp

Make = Callable[..., nn.Module]
IMAGES = torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(5))


def size(*tensors: Tensor | None) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def file_size(model: nn.Module) -> int:
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    return file.getbuffer().nbytes


def trained(model: nn.Module, make: Callable[[Any], torch.optim.Optimizer]) -> Any:
    optimizer = make(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, 0.01)


def test_a_sparse_layer() -> None:
    layer = pp.nn.SparseLinear(1000, 64, kept=0.1)
    optimizer = trained(layer, adamw)
    layer.update_mask = pp.BitMask.pack(layer.weight > 0)
    found = pp.footprint(layer, optimizer).total
    entries, kept = 64 * 1000, 6400
    assert (found.entries, found.kept) == (entries + 64, kept + 64)
    assert found.weights == 4 * (kept + 64)
    assert found.indices == 4 * 65 + 2 * kept
    assert found.masks == kept // 8
    # Two averages of each entry and a count of steps.
    assert found.state == 2 * 4 * (kept + 64) + 2 * 4
    assert found.memory == found.weights + found.indices + found.masks + found.state
    assert found.dense == 4 * (entries + 64)
    assert found.dense_memory == found.dense + 2 * 4 * (entries + 64) + 2 * 4
    assert found.disk == found.weights + found.indices + found.masks
    assert found.dense_disk == found.dense
    assert 0 < file_size(layer) - found.disk < 5 * 1024
    layer.topology.transposed()
    grown = pp.footprint(layer, optimizer).total
    assert grown.indices == layer.topology.nbytes > found.indices
    assert grown.disk == found.disk


@pytest.mark.parametrize("kind", ["plain", "theta", "phi"])
def test_dense_is_what_the_dense_model_needs(pruned: Make, faster: Any, kind: str) -> None:
    model = pruned(kind)
    dense = pp.fold(copy.deepcopy(model))
    expected = pp.footprint(dense, trained(dense, adamw)).total
    assert expected.memory == expected.dense_memory
    assert expected.disk == expected.dense_disk
    pp.sparsify(model, IMAGES, measure=faster)
    make = pp.optim.PowerAdamW if kind == "theta" else adamw
    found = pp.footprint(model, trained(model, make)).total
    # Exponents are buffers of a powered layer, dense or not.
    own = size(*(b for n, b in model.named_buffers() if n.endswith(("alpha", "stores_phi"))))
    assert found.dense_memory == expected.memory + own
    assert found.dense_disk == expected.disk + own
    assert found.memory < found.dense_memory
    folded = pp.footprint(pp.fold(model)).total
    assert (folded.dense, folded.kept) == (expected.dense, found.kept)
    assert folded.memory == folded.disk < expected.disk


def test_any_model(tied_model: type[nn.Module]) -> None:
    model = tied_model()
    found = pp.footprint(model)
    # What is tied comes once.
    assert found.total.weights == found.total.dense == size(*model.parameters())
    assert [row.name for row in found.layers][:2] == ["tokens", "mix"]
    assert "head" not in [row.name for row in found.layers]
    norm = nn.BatchNorm1d(3)
    norm.register_buffer("scratch", torch.zeros(100), persistent=False)
    row = pp.footprint(norm).layers[0]
    assert (row.name, row.buffers, row.disk) == ("BatchNorm1d", 400 + 2 * 12 + 8, 4 * 12 + 8)
    assert pp.footprint(nn.ReLU()).total.memory == 0


def test_states_of_others_and_in_lists() -> None:
    model, other = nn.Linear(4, 4), nn.Linear(4, 4)
    optimizer = torch.optim.SGD([*model.parameters(), *other.parameters()], 0.1, momentum=0.9)
    for parameter in (*model.parameters(), *other.parameters()):
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    found = pp.footprint(model, [optimizer])
    assert [(row.name, row.state) for row in found.layers] == [("Linear", 80), ("(others)", 80)]
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=3)
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step(lambda: model(torch.ones(2, 4)).square().sum())
    assert pp.footprint(model, optimizer).total.state > 80


def test_the_table(pruned: Make, faster: Any) -> None:
    model = pruned()
    pp.sparsify(model, IMAGES, measure=faster)
    lines = str(pp.footprint(model)).splitlines()
    assert lines[0].split() == [
        *("layer", "kept", "weights", "indices", "masks", "state", "memory", "dense"),
        *("disk", "dense"),
    ]
    assert [line.split()[0] for line in lines[2:9]] == [
        *("first", "norm", "grouped", "second", "flat", "twice", "head"),
    ]
    assert lines[10].startswith("---")
    assert lines[11].startswith("total")
    ends = {len(line) for line in (*lines[:10], lines[11])}
    assert len(ends) == 1  # columns of numbers end together


def test_errors() -> None:
    with pytest.raises(TypeError, match=r"footprint: model must be a torch\.nn\.Module, got int"):
        pp.footprint(3)
    with pytest.raises(TypeError, match=r"footprint: optimizer must be a torch\.optim\.Optimizer"):
        pp.footprint(nn.Linear(2, 2), "adam")
    with pytest.raises(ValueError, match=r"'0' \(LazyLinear\) is lazy; run a batch"):
        pp.footprint(nn.Sequential(nn.LazyLinear(3)))
