"""What is different on a GPU: the clock, the facts, and the roof.

``python -m bench.gpu`` prints one sentence where there is no GPU to measure, else nothing. NVIDIA's
and AMD's are both "cuda" to torch. Everything here is about torch's current device.

# Note [Timing a GPU]
A call returns when it has been issued; its work is done later. So a sample has two parts, both
between two events on the stream that the calls use:

1. As the code runs: the device is idle, then the calls are issued one after the other, and nothing
   waits in between. The time of a call is the larger of what the host takes to issue it and what
   the device takes to do it: what a loop of such calls takes. It is what ratios and medians are of.
   The host's own part is read from its clock.
2. The device alone: it is first kept busy for longer than the host takes to issue all of the calls,
   so that it finds each one waiting. This is what a CUDA graph would come near, and what is left of
   a call whose kernels are not worth their launches. That the device had not begun before the last
   call was issued is checked by the first event; where it had, the number is not given.

What keeps it busy is reading a tensor larger than any cache. That also takes the data of the other
contenders out of the caches, and leaves none of its own to be written back, as writing it would.
Within a sample calls follow each other without that: a call so pays for what the one before left in
the cache to be written, and one that is timed alone would not.
"""

from __future__ import annotations

import gc
import importlib.util
import math
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import ppkernels as pp
from bench import machine
from bench.contenders import IN_CACHE, IN_MEMORY, QUICK, seeded
from bench.timing import Sample, Timer, core_ids, measure

SCRATCH_BYTES = 512 * 2**20
"""Twice the 256 MiB of an AMD MI300X's last cache."""

HEAD_START = 2.0
"""How much longer than the host takes to issue the calls the device is kept busy."""

CUDA = torch.device("cuda")


def missing() -> str | None:
    """Why there is nothing to measure, in one sentence; None where there is a GPU."""
    if not torch.cuda.is_available():
        built = _runtime() or "neither CUDA nor ROCm"
        return f"No GPU is measured: torch {torch.__version__}, built for {built}, finds none."
    if importlib.util.find_spec("triton") is None:
        return "No GPU is measured: Triton, in which the kernels are written, is not installed."
    return None


class GpuTimer:
    """Events around calls, with and without a head start for the host; see Note [Timing a GPU].

    Args:
        scratch: what is read to keep the device busy, larger than any cache.
    """

    device = CUDA
    # One thread feeds a GPU, and has a core to itself while half of them are free.
    busy_share = 0.5

    def __init__(self, scratch: Tensor) -> None:
        self._scratch = scratch
        self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._read_scratch(3)
        torch.cuda.synchronize()
        reading, *_ = self._between_events(lambda: self._read_scratch(1), 10)
        self._read_seconds = reading

    def sample(self, call: Callable[[], object], repeats: int, in_cache: bool) -> Sample:
        """Both parts of a sample; ``in_cache`` begins each with one untimed call."""
        self._read_scratch(1)
        if in_cache:
            call()
        torch.cuda.synchronize()
        seconds, host, _ = self._between_events(call, repeats)
        self._read_scratch(math.ceil(HEAD_START * host * repeats / self._read_seconds))
        if in_cache:
            call()
        device, _, was_ahead = self._between_events(call, repeats)
        return Sample(seconds, host, device if was_ahead else None)

    def _read_scratch(self, times: int) -> None:
        for _ in range(times):
            self._scratch.sum()

    def _between_events(
        self, call: Callable[[], object], repeats: int
    ) -> tuple[float, float, bool]:
        """Seconds per call between the events and on the host; whether the host was ahead."""
        self._start.record()
        before = time.perf_counter()
        for _ in range(repeats):
            call()
        host = time.perf_counter() - before
        self._end.record()
        has_begun = self._start.query()
        self._end.synchronize()
        return self._start.elapsed_time(self._end) / 1e3 / repeats, host / repeats, not has_begun


def gpu_timer() -> GpuTimer:
    """The timer of the current GPU."""
    size = max(SCRATCH_BYTES, 2 * torch.cuda.get_device_properties().L2_cache_size)
    return GpuTimer(torch.zeros(size // 4, device=CUDA))


def is_alive() -> bool:
    """Whether the GPU still works: after an access out of bounds nothing does, in this process."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def release() -> None:
    """Give back what a row held, before the next one asks for as much."""
    torch.compiler.reset()  # Compiled code keeps the weights that it was made for.
    gc.collect()
    torch.cuda.empty_cache()


def name() -> str:
    """The GPU's name; its architecture where the driver knows none."""
    return torch.cuda.get_device_name() or architecture()


def architecture() -> str:
    """As compilers call it: sm_90, gfx942."""
    found = torch.cuda.get_device_properties()
    if torch.version.hip:
        return str(found.gcnArchName).partition(":")[0]
    return f"sm_{found.major}{found.minor}"


def _runtime() -> str | None:
    if torch.version.hip:
        return f"ROCm {torch.version.hip}"
    return f"CUDA {torch.version.cuda}" if torch.version.cuda else None


def _driver() -> str | None:
    """The version of the kernel's driver, where the system shows it."""
    for module in ("nvidia", "amdgpu"):
        path = Path(f"/sys/module/{module}/version")
        if path.exists():
            return path.read_text().strip()
    return None


def facts() -> dict[str, object]:
    """What a reader needs to compare numbers; nothing that names a host, a user or a path.

    Clocks are the largest that the device may have, in MHz, where torch knows them.
    """
    import triton

    found = torch.cuda.get_device_properties()
    free, total = torch.cuda.mem_get_info()
    clocks = {"clock_mhz": "clock_rate", "memory_clock_mhz": "memory_clock_rate"}
    return {
        "gpu": name(),
        "architecture": architecture(),
        "multiprocessors": found.multi_processor_count,
        "memory_gib": round(total / 2**30, 1),
        "memory_free_gib": round(free / 2**30, 1),
        "l2_mib": round(found.L2_cache_size / 2**20, 1),
        **{fact: getattr(found, rate, 0) // 1000 or None for fact, rate in clocks.items()},
        "memory_bus_bits": getattr(found, "memory_bus_width", 0) or None,
        "driver": _driver(),
        "runtime": _runtime(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "cpu": machine.cpu_model(),
        "cores": len(core_ids()),
        "system": platform.system(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "ppkernels": pp.__version__,
    }


def results_path() -> Path:
    """Where this GPU's results are kept: named by the GPU alone."""
    return machine.RESULTS / f"{machine.slug_of(name())}.json"


def roof(timer: Timer, budget: float, is_quick: bool = False) -> list[dict[str, object]]:
    """Bandwidth of copying and of out = a + b/2, bytes read plus bytes written; and of small calls.

    Each entry holds what was done, the number of float32 elements, median seconds and GB/s.
    """
    entries = []
    for size in (QUICK if is_quick else IN_MEMORY, IN_CACHE):
        with seeded(timer.device):
            a, b, out = torch.randn(size), torch.randn(size), torch.zeros(size)
        calls = roof_calls(a, b, out)
        measured = measure(calls, budget, in_cache=size == IN_CACHE, timer=timer)
        for call, streams in (("copy_", 2), ("add", 3)):
            seconds = measured.median(call)
            entries.append(
                {
                    "call": call,
                    "elements": size,
                    "seconds": seconds,
                    "device_s": measured.on_device(call),
                    "gb_per_s": streams * size * a.element_size() / seconds / 1e9,
                    "busy": measured.load.exceeds(timer.busy_share),
                }
            )
    return entries


def roof_calls(a: Tensor, b: Tensor, out: Tensor) -> dict[str, Callable[[], Tensor]]:
    """What reads one tensor, or two, and writes a third."""
    return {"copy_": lambda: out.copy_(a), "add": lambda: torch.add(a, b, alpha=0.5, out=out)}


def main() -> None:
    """Print why no GPU is measured, if none is."""
    if sentence := missing():
        print(sentence)


if __name__ == "__main__":
    sys.exit(main())
