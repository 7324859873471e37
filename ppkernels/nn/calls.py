"""How a model calls its layers: recorded in one forward, and repeated under a clock."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

# Each layer is run at least so often as it is and so often as a sparse one, and then on until the
# time is spent; a median of fewer would be that of an accident.
_LEAST_ROUNDS = 5
_SECONDS = 0.02


class Call(NamedTuple):
    """What a layer is called with.

    Attributes:
        shape, dtype, device: of the input.
        requires_grad: whether its gradient is asked for.
        times: how often the layer is called so in one forward of the model.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool
    times: int


class Measure(Protocol):
    """Says how long the calls of a layer take as it is and as a sparse one."""

    def __call__(
        self, dense: nn.Module, sparse: nn.Module, calls: Sequence[Call], training: bool, /
    ) -> tuple[float, float]:
        """Seconds of both; ``training``: of forward and backward, not of the forward alone."""


# ---- recording


def calls_of(
    model: nn.Module, layers: Mapping[str, nn.Module], sample_input: Any, training: bool
) -> dict[str, list[Call] | None]:
    """How one forward of ``model`` calls ``layers``; None where with anything but a dense tensor.

    The model runs as it stands, each module in its own mode. Buffers (statistics of norms) and
    random numbers are put back; no gradients are made.

    Raises:
        TypeError: ``sample_input`` is no tensor, tuple of arguments or mapping of keywords.
    """
    args, kwargs = _arguments(sample_input)
    found: dict[str, Counter[Call | None]] = {name: Counter() for name in layers}

    def hook_of(name: str) -> Callable[..., None]:
        def note(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found[name][_call([*args, *kwargs.values()])] += 1

        return note

    hooks = [
        layer.register_forward_pre_hook(hook_of(name), with_kwargs=True)
        for name, layer in layers.items()
    ]
    try:
        with _unmoved(model), torch.set_grad_enabled(training):
            model(*args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    return {
        name: None
        if None in counter
        else [call._replace(times=times) for call, times in counter.items() if call]
        for name, counter in found.items()
    }


def _call(inputs: list[Any]) -> Call | None:
    x = inputs[0] if inputs else None
    if not isinstance(x, Tensor) or x.is_nested or x.layout is not torch.strided:
        return None
    return Call(tuple(x.shape), x.dtype, x.device, x.requires_grad, 1)


def _arguments(sample_input: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(sample_input, Tensor):
        return (sample_input,), {}
    if isinstance(sample_input, tuple):
        return sample_input, {}
    if isinstance(sample_input, Mapping) and all(isinstance(key, str) for key in sample_input):
        return (), dict(sample_input)
    raise TypeError(
        "sparsify: sample_input must be a tensor, a tuple of arguments or a dict of keyword "
        f"arguments, got {type(sample_input).__name__}"
    )


@contextmanager
def _unmoved(model: nn.Module) -> Iterator[None]:
    """Buffers and random numbers are in the end what they were."""
    before = [
        (module, name, buffer, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(devices)):
        try:
            yield
        finally:
            with torch.no_grad():
                for module, name, buffer, values in before:
                    module._buffers[name] = buffer
                    if not torch.equal(buffer, values):
                        buffer.copy_(values)


# ---- timing


def timed(
    dense: nn.Module, sparse: nn.Module, calls: Sequence[Call], training: bool
) -> tuple[float, float]:
    """Both layers in turn under the clock, on random inputs: the sums of medians.

    The layers' forwards alone run, without hooks; their ``.grad`` is not touched.
    """
    totals = [0.0, 0.0]
    for call in calls:
        with torch.random.fork_rng(devices=[]), torch.set_grad_enabled(training):
            x = torch.randn(call.shape, dtype=call.dtype, device=call.device)
            x.requires_grad_(training and call.requires_grad)
            runs = [_run_of(layer, x) for layer in (dense, sparse)]
            for index, seconds in enumerate(medians(runs, _SECONDS / len(calls))):
                totals[index] += call.times * seconds
    return totals[0], totals[1]


def _run_of(layer: nn.Module, x: Tensor) -> Callable[[], object]:
    wanted = [each for each in (x, *layer.parameters()) if each.requires_grad]
    if not (wanted and torch.is_grad_enabled()):
        return lambda: layer.forward(x)
    grad_output = torch.randn_like(layer.forward(x))
    return lambda: torch.autograd.grad(layer.forward(x), wanted, grad_output)


def medians(
    runs: Sequence[Callable[[], object]],
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
) -> list[float]:
    """The median time of each of ``runs``, which take turns for about so many seconds."""
    for run in runs:
        run()  # makes what is made once
    rounds: list[list[float]] = []
    spent = 0.0
    while len(rounds) < _LEAST_ROUNDS or spent < seconds:
        times = []
        for run in runs:
            start = clock()
            run()
            times.append(clock() - start)
        rounds.append(times)
        spent += sum(times)
    return [statistics.median(each) for each in zip(*rounds, strict=True)]
