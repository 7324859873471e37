"""Training in processes of its own: data parallel, sharded state, without compiled kernels.

Run as a script, it is one of those processes: ``test_processes.py <what> <folder> <rank>``.
"""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import ppkernels as pp

ROOT = Path(__file__).parents[2]
STEPS = 20
KINDS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "sgd": (pp.optim.PowerSGD, {"lr": 0.05, "momentum": 0.9}),
    "adamw": (pp.optim.PowerAdamW, {"lr": 0.01, "weight_decay": 0.1}),
}
# For torch's own AdamW, which may step weights that hold φ.
STOCK = {"lr": 0.01, "weight_decay": 0.1}
State = dict[str, Tensor]

pytestmark = pytest.mark.usefixtures("one_thread")


def network(stores: str = "theta") -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 16), nn.Linear(16, 2))
    pp.powerize(model, 1.5, stores)
    model[2].update_mask = pp.BitMask.pack(torch.rand(16, 16) < 0.7)
    return model


def train(model: nn.Module, optimizer: torch.optim.Optimizer, rows: slice = slice(None)) -> State:
    """The end of ``model``, in which each step has seen ``rows`` of its batch."""
    for step in range(STEPS):
        draw = torch.Generator().manual_seed(step)
        x, y = torch.randn(16, 5, generator=draw), torch.randn(16, 2, generator=draw)
        optimizer.zero_grad()
        (model(x[rows]) - y[rows]).square().mean().backward()
        optimizer.step()
    return getattr(model, "module", model).state_dict()


def train_alone() -> dict[str, State]:
    ends = {}
    for kind, (make, options) in KINDS.items():
        for rule in ("virtual", "chain"):
            model = network()
            ends[f"{kind} {rule}"] = train(model, make(model, **options, rule=rule))
    model = network("phi")
    ends["stock"] = train(model, torch.optim.AdamW(model.parameters(), **STOCK))
    return ends


def train_in_parallel(folder: Path, rank: int) -> dict[str, State]:
    """As rank ``rank`` of two, with the states whole and sharded."""
    from torch.distributed.optim import ZeroRedundancyOptimizer
    from torch.nn.parallel import DistributedDataParallel

    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    rows, ends = slice(8 * rank, 8 * rank + 8), {}
    for kind, (make, options) in KINDS.items():
        for sharded in (False, True):
            model = DistributedDataParallel(network())
            optimizer = (
                ZeroRedundancyOptimizer(model.parameters(), make, **options)
                if sharded
                else make(model, **options)
            )
            ends[f"{kind} {'sharded' if sharded else 'whole'}"] = train(model, optimizer, rows)
    model = DistributedDataParallel(network("phi"), gradient_as_bucket_view=True)
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, **STOCK)
    ends["stock sharded"] = train(model, optimizer, rows)
    dist.destroy_process_group()
    return ends


def start(what: str, folder: Path, rank: int, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, __file__, what, str(folder), str(rank)],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        stderr=subprocess.PIPE,
        text=True,
    )


def ends_of(processes: list[subprocess.Popen[str]], folder: Path) -> list[dict[str, State]]:
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(len(processes))]


def check_close(came: State, expected: State) -> None:
    assert came.keys() == expected.keys()
    for name in came:
        torch.testing.assert_close(came[name], expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not dist.is_available(), reason="this PyTorch has no torch.distributed")
def test_two_processes_train_one_model(tmp_path: Path) -> None:
    """Both ranks end with the same bits, and to rounding with those of the whole batch."""
    ends = ends_of([start("parallel", tmp_path, rank) for rank in range(2)], tmp_path)
    alone = train_alone()
    assert len(ends[0]) == 5
    for name, state in ends[0].items():
        assert state.keys() == ends[1][name].keys()
        assert all(torch.equal(state[key], ends[1][name][key]) for key in state), name
        kind = name.split()[0]
        check_close(state, alone[kind if kind == "stock" else f"{kind} virtual"])
    frozen, before = ~network()[2].update_mask.unpack(), network("phi")[2].weight
    for state in (ends[0]["stock sharded"], alone["stock"]):
        assert torch.equal(state["2.weight"] == before, frozen)


def test_without_compiled_kernels_training_is_the_same(tmp_path: Path) -> None:
    (came,) = ends_of([start("alone", tmp_path, 0, PPKERNELS_NO_EXT="1")], tmp_path)
    expected = train_alone()
    assert came.keys() == expected.keys()
    for name in came:
        check_close(came[name], expected[name])


def main(what: str, folder: str, rank: str) -> None:
    torch.set_num_threads(1)
    ends = train_alone() if what == "alone" else train_in_parallel(Path(folder), int(rank))
    torch.save(ends, Path(folder) / f"{rank}.pt")


if __name__ == "__main__":
    # torch.distributed's own, and the one that says that there are no kernels.
    warnings.simplefilter("ignore")
    main(*sys.argv[1:])
