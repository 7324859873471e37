"""The facts of this machine, and its roof: how fast it copies."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from pathlib import Path

import torch

import ppkernels as pp
from bench.contenders import IN_CACHE, IN_MEMORY
from bench.timing import core_ids, measure, thread_count

RESULTS = Path(__file__).parent / "results"


def cpu_model() -> str:
    """The processor's name as the system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    if platform.system() == "Darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return platform.processor() or platform.machine()


def has_amx() -> bool:
    """Whether the processor multiplies matrices of bfloat16 in tiles, as far as Linux says."""
    try:
        return "amx_bf16" in Path("/proc/cpuinfo").read_text().split()
    except OSError:
        return False


def facts(threads: int) -> dict[str, object]:
    """What a reader needs to compare numbers; nothing that names a host, a user or a path."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "cpu": cpu_model(),
        "architecture": platform.machine(),
        "system": platform.system(),
        "cores": len(core_ids()),
        "threads": threads,
        "memory_gib": round(memory / 2**30),
        "instruction_set": pp.cpu_capability(),
        "torch_instruction_set": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "ppkernels": pp.__version__,
    }


def slug_of(name: str) -> str:
    """A name of a processor or GPU as part of a file's."""
    words = re.sub(r"\((r|tm)\)", "", name.lower())
    return re.sub(r"[^a-z0-9]+", "-", words).strip("-")


def slug() -> str:
    """The name of this machine's results file: processor and number of cores."""
    return f"{slug_of(cpu_model())}-{len(core_ids())}-cores"


def results_path() -> Path:
    """Where this machine's results are kept."""
    return RESULTS / f"{slug()}.json"


def roof(threads: int, budget: float, is_quick: bool = False) -> list[dict[str, object]]:
    """Copy bandwidth, bytes read plus bytes written: in memory on all threads and one, in cache.

    Each entry holds the number of float32 elements, threads, median seconds and GB/s.
    """
    large = IN_MEMORY // 16 if is_quick else IN_MEMORY
    return [
        _copy(size, count, budget)
        for size, count in dict.fromkeys(((large, threads), (large, 1), (IN_CACHE, 1)))
    ]


def _copy(size: int, threads: int, budget: float) -> dict[str, object]:
    source, target = torch.randn(size), torch.empty(size).zero_()
    with thread_count(threads):
        calls = {"copy_": lambda: target.copy_(source)}
        measured = measure(calls, budget, in_cache=size == IN_CACHE)
    seconds = measured.median("copy_")
    moved = 2 * size * source.element_size()
    return {
        "elements": size,
        "threads": threads,
        "seconds": seconds,
        "gb_per_s": moved / seconds / 1e9,
        "busy": measured.load.is_busy,
    }
