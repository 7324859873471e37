"""What the GPU launchers of every room ask of a device."""

from __future__ import annotations

from functools import cache

import torch


def is_amd() -> bool:
    """Whether PyTorch's GPUs are AMD's."""
    return torch.version.hip is not None


@cache
def warp_size(device: torch.device) -> int:
    """Threads of a warp: 32, and 64 on most of AMD's. The interpreter, on the CPU, has none."""
    if device.type == "cpu":
        return 32
    return int(torch.cuda.get_device_properties(device).warp_size)
