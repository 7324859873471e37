"""Interleaved timing of several contenders, and whether other work disturbed it.

Contenders take turns within one run, in another order each round, so that a machine that grows
slower or faster does so for all of them. Numbers are medians over rounds; a ratio is the median of
the rounds' own ratios, never the ratio of two medians.

How one sample is taken is a `Timer`'s matter: `CpuTimer` here, `GpuTimer` in gpu.py.
"""

from __future__ import annotations

import gc
import itertools
import math
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median, quantiles
from typing import Protocol

import torch

SAMPLE_SECONDS = 2e-3
"""A sample repeats a short call until it lasts about this long: 10^4 ticks of the clock."""

MIN_ROUNDS, MAX_ROUNDS = 15, 201

BUSY_SHARE = 0.05
"""A machine is too busy when other work had more than this share of the cores: the bars ask for
ratios within 15 %, and on two cores 5 % of both is 10 % of one."""


@contextmanager
def thread_count(count: int) -> Iterator[None]:
    """Run torch on ``count`` threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class Load:
    """What else the machine did during a stretch of time, as shares of this process's cores.

    Attributes:
        others: CPU time that other processes used; None where the system does not tell.
        stolen: CPU time that the hypervisor gave to other machines; None likewise.
        waited: share of a short single-threaded loop's time in which it did not run.
    """

    others: float | None
    stolen: float | None
    waited: float

    def exceeds(self, share: float) -> bool:
        """Whether others and hypervisor took more than ``share``; unknown, the loop decides."""
        if self.others is None or self.stolen is None:
            return self.waited > share
        return self.others + self.stolen > share

    @property
    def is_busy(self) -> bool:
        """Whether that is too much for times that are taken on the CPU."""
        return self.exceeds(BUSY_SHARE)

    def sentence(self) -> str:
        """The shares in words."""

        def percent(share: float | None) -> str:
            return "unknown" if share is None else f"{share:.0%}"

        return (
            f"other work used {percent(self.others)} of the cores, the hypervisor took "
            f"{percent(self.stolen)}, a test loop waited {percent(self.waited)} of its time"
        )


@dataclass(frozen=True)
class CpuTimes:
    """CPU seconds so far: of all processes and stolen, over this process's cores; and its own."""

    wall: float
    busy: float
    stolen: float
    own: float


def core_ids() -> list[int]:
    """The cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def cpu_times() -> CpuTimes | None:
    """The counters of /proc/stat; None where there is no such file."""
    try:
        with open("/proc/stat") as file:
            lines = [line.split() for line in file if line.startswith("cpu")]
    except OSError:
        return None
    wanted = {f"cpu{core}" for core in core_ids()}
    tick = 1 / os.sysconf("SC_CLK_TCK")
    busy = stolen = 0.0
    for name, user, nice, system, _idle, _iowait, irq, softirq, steal, *_guest in lines:
        if name in wanted:
            busy += sum(map(int, (user, nice, system, irq, softirq))) * tick
            stolen += int(steal) * tick
    return CpuTimes(time.perf_counter(), busy, stolen, time.process_time())


def waited_share(seconds: float = 0.05) -> float:
    """Wall time minus CPU time of a loop that never waits by itself, as a share of wall time."""
    wall, cpu = time.perf_counter(), time.thread_time()
    while time.perf_counter() - wall < seconds:
        pass
    wall_used, cpu_used = time.perf_counter() - wall, time.thread_time() - cpu
    return max(0.0, 1 - cpu_used / wall_used)


class LoadMeter:
    """Watches the load from its construction to `read`."""

    def __init__(self) -> None:
        self._before = cpu_times()

    def read(self) -> Load:
        """The load since construction; the test loop runs now."""
        before, after = self._before, cpu_times()
        if before is None or after is None:
            return Load(None, None, waited_share())
        core_seconds = max((after.wall - before.wall) * len(core_ids()), 1e-9)
        others = (after.busy - before.busy) - (after.own - before.own)
        # The counters of the system and of the process tick at different moments.
        others_share = max(0.0, others / core_seconds)
        stolen_share = (after.stolen - before.stolen) / core_seconds
        return Load(others_share, stolen_share, waited_share())


def idle_load(seconds: float = 0.5) -> Load:
    """The load of the machine while this process does nothing."""
    meter = LoadMeter()
    time.sleep(seconds)
    return meter.read()


@dataclass(frozen=True)
class Sample:
    """Seconds per call of some calls in a row.

    Attributes:
        seconds: from the first call to the end of the last one's work.
        host: what the host took to issue a call to a GPU.
        device: what a GPU took for a call while it never waited for the host; None where it did.
    """

    seconds: float
    host: float | None = None
    device: float | None = None


class Timer(Protocol):
    """Takes the samples on one kind of device.

    Attributes:
        device: where the calls work.
        busy_share: other work on more than this share of the cores disturbs.
    """

    device: torch.device
    busy_share: float

    def sample(self, call: Callable[[], object], repeats: int, in_cache: bool) -> Sample:
        """Time ``repeats`` calls; ``in_cache``: with their data in the cache from the first on."""
        ...


class CpuTimer:
    """The host's clock around calls that are done when they return.

    With ``in_cache``, a sample starts with one untimed call, which brings the data back into the
    cache after the other contenders' turns.
    """

    device = torch.device("cpu")
    busy_share = BUSY_SHARE

    def sample(self, call: Callable[[], object], repeats: int, in_cache: bool) -> Sample:
        """The wall time of the calls."""
        if in_cache:
            call()
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        return Sample((time.perf_counter() - start) / repeats)


CPU_TIMER = CpuTimer()


@dataclass(frozen=True)
class Measurement:
    """The samples of each contender, one a round, and the load meanwhile."""

    samples: Mapping[str, list[Sample]]
    load: Load
    calls_per_sample: Mapping[str, int] = field(default_factory=dict)

    @property
    def seconds(self) -> dict[str, list[float]]:
        """Seconds per call of each contender in each round."""
        return {name: [one.seconds for one in some] for name, some in self.samples.items()}

    def median(self, name: str) -> float:
        """Seconds per call."""
        return median(self.seconds[name])

    def quartiles(self, name: str) -> tuple[float, float]:
        """Seconds per call at a quarter and at three quarters of the rounds."""
        first, _, third = quantiles(self.seconds[name], n=4, method="inclusive")
        return first, third

    def ratio(self, name: str, to: str) -> float:
        """Time of ``name`` over the time of ``to``: median of the rounds' ratios."""
        rounds = zip(self.seconds[name], self.seconds[to], strict=True)
        return median(a / b for a, b in rounds)

    def host(self, name: str) -> float | None:
        """Seconds in which the host issues a call to a GPU; None on a CPU."""
        known = [one.host for one in self.samples[name] if one.host is not None]
        return median(known) if known else None

    def on_device(self, name: str) -> float | None:
        """Seconds of a GPU's own work; None where it had to wait in more than half of the rounds.

        Which is so of calls that wait for the GPU themselves.
        """
        known = [one.device for one in self.samples[name] if one.device is not None]
        return median(known) if 2 * len(known) >= len(self.samples[name]) else None


def measure(
    calls: Mapping[str, Callable[[], object]],
    budget: float,
    *,
    in_cache: bool = False,
    min_rounds: int = MIN_ROUNDS,
    estimates: int = 3,
    timer: Timer = CPU_TIMER,
) -> Measurement:
    """Time ``calls`` in turns for about ``budget`` seconds, but ``min_rounds`` rounds at least.

    Every call runs at least twice before the clock starts (what compiles does so then): once, and
    ``estimates`` times to see how often a sample has to repeat it.
    """
    repeats = {}
    for name, call in calls.items():
        call()
        estimate = min(timer.sample(call, 1, in_cache).seconds for _ in range(estimates))
        repeats[name] = max(1, math.ceil(SAMPLE_SECONDS / max(estimate, 1e-9)))

    samples: dict[str, list[Sample]] = {name: [] for name in calls}
    order, shuffle = list(calls), random.Random(0).shuffle
    gc.collect()
    gc.disable()
    try:
        meter = LoadMeter()
        end = time.perf_counter() + budget
        for done in itertools.count():
            if done >= min_rounds and (done >= MAX_ROUNDS or time.perf_counter() >= end):
                break
            shuffle(order)
            for name in order:
                samples[name].append(timer.sample(calls[name], repeats[name], in_cache))
        load = meter.read()
    finally:
        gc.enable()
    return Measurement(samples, load, repeats)
