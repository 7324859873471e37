"""pp.AdaptiveAlpha in two processes that train one model.

Run as a script, it is one of those processes: ``test_adaptive_processes.py <folder> <rank>``.
"""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

import ppkernels as pp

ROOT = Path(__file__).parents[2]


def train(folder: str, rank: int) -> None:
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 2))
    model = nn.parallel.DistributedDataParallel(pp.powerize(layers, 1.5))
    optimizer = pp.optim.PowerSGD(model, lr=0.01, momentum=0.9)
    adaptive = pp.AdaptiveAlpha(model, 0.05, period=2, per_layer=True)
    draw = torch.Generator().manual_seed(rank)
    for _ in range(9):
        adaptive.step()
        for _ in range(5):
            x = torch.randn(8, 5, generator=draw)
            optimizer.zero_grad()
            (model(x).sum(1) - x.sum(1)).square().mean().backward()
            optimizer.step()
    state = {"adaptive": adaptive.state_dict(), "model": layers.state_dict()}
    torch.save(state, Path(folder) / f"{rank}.pt")
    dist.barrier()  # nobody leaves while the other one still talks
    del model, optimizer
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="this PyTorch has no torch.distributed")
def test_two_processes_decide_alike(tmp_path: Path) -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(tmp_path), str(rank)],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for process in processes:
            _, errors = process.communicate(timeout=120)
            assert process.returncode == 0, errors
    finally:
        # The other one would wait for the one that failed.
        for process in processes:
            process.kill()
            process.communicate()
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert first["adaptive"] == second["adaptive"]
    assert len({record["alpha"] for record in first["adaptive"]["history"]}) > 2
    for name, value in first["model"].items():
        assert torch.equal(value, second["model"][name])


if __name__ == "__main__":
    # torch.distributed's own.
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    train(sys.argv[1], int(sys.argv[2]))
