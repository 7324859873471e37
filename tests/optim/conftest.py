"""What the tests of the optimizers share."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def one_thread(same_start: None) -> None:
    """For networks so small that a second thread would only be waited for."""
    torch.set_num_threads(1)
