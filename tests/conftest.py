"""What every test starts from: two threads, one seed, and new memory that is full of NaN."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import ppkernels as pp


def pytest_report_header() -> str:
    return f"torch {torch.__version__}, ppkernels CPU kernels: {pp.cpu_capability()}"


def pytest_runtest_setup(item: pytest.Item) -> None:
    # In one place, so that pytest reports all of them in one line.
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a GPU that PyTorch can use")


@pytest.fixture(autouse=True)
def same_start() -> Iterator[None]:
    """The same threads and random numbers for every test, whatever ran before it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """New tensors hold NaN, so that an element that an op forgets to write is seen."""
    # On a GPU this mode would refuse many of PyTorch's own ops.
    if torch.cuda.is_available():
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def stepped() -> Callable[..., Tensor]:
    """``stepped(theta, grad, alpha, lr, rule)``: θ after one step without momentum."""

    def step(
        theta: Tensor, grad: Tensor, alpha: float | Tensor, lr: float, rule: str = "virtual"
    ) -> Tensor:
        theta = theta.detach().clone()
        pp.sgd_step_([theta], [grad], alphas=[alpha], lr=lr, rule=rule)
        return theta

    return step
