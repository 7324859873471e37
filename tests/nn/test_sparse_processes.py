"""Sparse layers in two processes: DistributedDataParallel trains as one process does.

Run as a script, it is one of those processes: ``test_sparse_processes.py <folder> <rank>``.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import ppkernels as pp

ROOT = Path(__file__).parents[2]
State = dict[str, Tensor]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        pp.nn.SparseConv2d(2, 4, 3, padding=1, kept=0.4),
        nn.Flatten(),
        nn.Tanh(),
        pp.nn.PowerSparseLinear(64, 16, kept=0.2, alpha=2.0),
        nn.Tanh(),
        pp.nn.PowerSparseLinear(16, 3, kept=0.5, alpha=2.0, stores="phi"),
    )


def train(model: nn.Module, rows: slice = slice(None)) -> State:
    """The end of ``model``, in which each step has seen ``rows`` of its batch."""
    optimizer = pp.optim.PowerSGD(model, lr=0.1, momentum=0.9)
    for step in range(10):
        draw = torch.Generator().manual_seed(step)
        x, y = torch.randn(8, 2, 4, 4, generator=draw), torch.randn(8, 3, generator=draw)
        optimizer.zero_grad()
        (model(x[rows]) - y[rows]).square().mean().backward()
        optimizer.step()
    return getattr(model, "module", model).state_dict()


def train_in_parallel(folder: Path, rank: int) -> State:
    from torch.nn.parallel import DistributedDataParallel

    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    end = train(DistributedDataParallel(network()), slice(4 * rank, 4 * rank + 4))
    dist.destroy_process_group()
    return end


@pytest.mark.skipif(not dist.is_available(), reason="this PyTorch has no torch.distributed")
def test_data_parallel_training(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(tmp_path), str(rank)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    alone = train(network())
    assert first.keys() == second.keys() == alone.keys()
    for name in alone:
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], alone[name], rtol=1e-4, atol=1e-5)
    start = network().state_dict()
    assert not torch.equal(start["0.weight"], alone["0.weight"])
    assert torch.equal(start["0.columns"], alone["0.columns"])


@pytest.fixture
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_a_sharded_weight_is_trained_and_stays_where_it_is() -> None:
    model = nn.Sequential(nn.Linear(16, 12), pp.nn.SparseLinear(12, 8, kept=0.3))
    before = model[1].dense()
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.randn(3, 16)).sum().backward()
    optimizer.step()
    sparse, none = model[1], torch.empty(0, dtype=torch.int64)
    values = sparse.weight.full_tensor()
    assert not torch.equal(sparse.topology.scatter(values), before)
    other = pp.nn.SparseLinear(12, 8, kept=0.2).state_dict()
    for change in (
        lambda: sparse.change_topology(torch.tensor([0]), none),
        lambda: pp.densify(model),
        lambda: sparse.load_state_dict(other),
    ):
        with pytest.raises(RuntimeError, match="the weight of SparseLinear is a DTensor, whose"):
            change()
    assert torch.equal(sparse.weight.full_tensor(), values)
    with pytest.raises(TypeError, match="its weight is a DTensor"):
        pp.nn.SparseLinear.from_linear(model[0])


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, rank = Path(sys.argv[1]), int(sys.argv[2])
    torch.save(train_in_parallel(folder, rank), folder / f"{rank}.pt")
