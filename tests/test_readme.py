"""Every Python block of README.md runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)


def test_there_is_an_example() -> None:
    assert BLOCKS


@pytest.mark.parametrize("block", BLOCKS, ids=[f"block{i}" for i in range(len(BLOCKS))])
def test_block_runs(block: str) -> None:
    torch.manual_seed(0)
    exec(compile(block, str(README), "exec"), {"__name__": "readme"})


def test_the_sparse_network_learns() -> None:
    """Pruning has left a way through it: all weights that it kept have a gradient."""
    block = next(block for block in BLOCKS if "pp.sparsify(" in block)
    before, step, _ = block.partition("optimizer.step()")
    assert step
    names: dict[str, Any] = {"__name__": "readme"}
    torch.manual_seed(0)
    exec(compile(before, str(README), "exec"), names)
    for name, parameter in names["model"].named_parameters():
        assert parameter.grad.count_nonzero() > 0.1 * parameter.grad.numel(), name
