"""CUDA graphs of a whole training step, and torch.compile with them.

On the CPU, where there are no graphs, the same bodies run with the function itself for its replay.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo
import torch._dynamo.utils
from torch import Tensor, nn

import ppkernels as pp

Network = Callable[..., nn.Sequential]
Batch = Callable[[int], tuple[Tensor, Tensor]]
OptimizerOf = Callable[..., torch.optim.Optimizer]

# PyTorch's advice for users of GPUs and graphs: TF32, more multiprocessors, an empty graph.
pytestmark = pytest.mark.filterwarnings("default")


def captured(function: Callable[[], None], device: str) -> Callable[[], None]:
    """What repeats ``function``, which is called some times first, as a capture demands."""
    if device == "cpu":
        for _ in range(3):
            function()
        return function
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


class Training:
    """A model with static inputs, and a step that a graph can record.

    ``lr`` is a tensor on the device, and loss scaling is a part of the step where ``scaled``.
    """

    def __init__(
        self, model: nn.Module, optimizer_of: OptimizerOf, device: str, scaled: bool = False
    ) -> None:
        self.model = model.to(device)
        self.lr = torch.tensor(0.01, device=device)
        self.optimizer = optimizer_of(model, lr=self.lr)
        # Not so large that a power of two more or less shows in float32.
        self.scaler = torch.amp.GradScaler(
            device, init_scale=64.0, growth_interval=1000, enabled=scaled
        )
        self.x = torch.zeros(16, 3, 6, 6, device=device)
        self.y = torch.zeros(16, 5, device=device)

    def feed(self, batch: tuple[Tensor, Tensor]) -> None:
        self.x.copy_(batch[0])
        self.y.copy_(batch[1])

    def step(self) -> None:
        # Inside, so that gradients are written and not added to.
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale((self.model(self.x) - self.y).square().mean()).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def twin(self, optimizer_of: OptimizerOf, device: str) -> Training:
        """Another that goes on from here by itself."""
        other = Training(copy.deepcopy(self.model), optimizer_of, device)
        other.optimizer.load_state_dict(copy.deepcopy(self.optimizer.state_dict()))
        other.optimizer.param_groups[0]["lr"] = other.lr
        other.lr.copy_(self.lr)
        return other


def check_close(model: nn.Module, other: nn.Module) -> None:
    for mine, its in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scaled", [False, True])
def test_a_captured_training_step(
    device: str,
    stores: str,
    scaled: bool,
    network: Network,
    batch: Batch,
    optimizer_of: OptimizerOf,
) -> None:
    """Replays follow data, rate and exponents."""
    training = Training(network(stores), optimizer_of, device, scaled)
    training.feed(batch(0))
    replay = captured(training.step, device)
    eager = training.twin(optimizer_of, device)
    for step in range(8):
        for each in (training, eager):
            each.feed(batch(step))
            if step == 3:
                each.lr.fill_(0.03)
            if step == 5:
                pp.set_alpha(each.model, 2.5, keep="theta")
        # What was allocated and let go since must not matter.
        memory = [torch.full((100_000,), torch.nan, device=device) for _ in range(4)]
        del memory
        replay()
        eager.step()
        check_close(training.model, eager.model)
    check_moved(training.model, network(stores))


def check_moved(model: nn.Module, start: nn.Module) -> None:
    moved = [
        (mine.cpu() - its).abs().max() > 1e-3
        for mine, its in zip(model.parameters(), start.parameters(), strict=True)
    ]
    assert all(moved)


def test_an_overflow_in_a_captured_step(
    device: str, network: Network, batch: Batch, optimizer_of: OptimizerOf
) -> None:
    training = Training(network(), optimizer_of, device, scaled=True)
    training.feed(batch(0))
    replay = captured(training.step, device)
    for step in range(6):
        training.feed(batch(step))
        if step in (1, 4):
            training.x[0, 0, 0, 0] = torch.inf
        state = [value for own in training.optimizer.state.values() for value in own.values()]
        tensors = [*training.model.parameters(), *state]
        before = [tensor.detach().clone() for tensor in tensors]
        scale = training.scaler.get_scale()
        replay()
        is_same = [torch.equal(*pair) for pair in zip(tensors, before, strict=True)]
        if step in (1, 4):
            assert all(is_same)
            assert training.scaler.get_scale() == scale / 2
        else:
            assert not any(is_same)
            assert training.scaler.get_scale() == scale


def test_a_graph_lives_longer_than_what_made_it(
    device: str, network: Network, batch: Batch, optimizer_of: OptimizerOf
) -> None:
    """Other steps come and go between capture and replay, and take memory that was let go."""
    training = Training(network(), optimizer_of, device)
    training.feed(batch(0))
    replay = captured(training.step, device)
    eager = training.twin(optimizer_of, device)
    eager.feed(batch(0))
    others = [Training(network(), optimizer_of, device) for _ in range(3)]
    for other in others:
        other.feed(batch(1))
        replays = captured(other.step, device)
        replays()
    del others, other, replays
    gc.collect()
    for _ in range(4):
        # The host's memory for tables, if it were let go, would be taken by some of these.
        pinned = device != "cpu"
        filled = [torch.full((2**i,), -1, pin_memory=pinned) for i in range(14) for _ in range(4)]
        del filled
        replay()
        eager.step()
        check_close(training.model, eager.model)


@pytest.mark.gpu
def test_state_made_in_a_capture_is_refused(network: Network, optimizer_of: OptimizerOf) -> None:
    training = Training(network(), optimizer_of, "cuda")
    for parameter in training.model.parameters():
        parameter.grad = torch.randn_like(parameter)
    torch.cuda.synchronize()
    with (
        pytest.raises(RuntimeError, match="take a step before the capture begins"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        training.optimizer.step()
    training.optimizer.step()


# ---- torch.compile


def compilers(*modes: str) -> Any:
    """Parameters ``device`` and ``how``: tracing alone on the CPU, and the modes on a GPU."""
    on_gpu = [pytest.param("cuda", {"mode": mode}, marks=pytest.mark.gpu) for mode in modes]
    on_cpu = pytest.param("cpu", {"backend": "aot_eager"})
    return pytest.mark.parametrize(("device", "how"), [on_cpu, *on_gpu], ids=["cpu", *modes])


@compilers("default", "reduce-overhead", "max-autotune")
def test_compiled_forward_and_backward(
    device: str, how: dict[str, str], stores: str, network: Network, batch: Batch
) -> None:
    """One graph, compiled once for all exponents; the step outside of it."""
    model, twin = (network(stores).to(device) for _ in range(2))
    optimizers = [pp.optim.PowerSGD(net, 0.05, momentum=0.9) for net in (model, twin)]
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, **how)
    for step in range(6):
        x, y = (tensor.to(device, torch.float32) for tensor in batch(step))
        if step == 3:
            for net in (model, twin):
                pp.set_alpha(net, 2.5, keep="theta")
        torch.compiler.cudagraph_mark_step_begin()
        for net, optimizer in zip((compiled, twin), optimizers, strict=True):
            optimizer.zero_grad()
            with torch._dynamo.config.patch(error_on_recompile=step > 0):
                loss = (net(x) - y).square().mean()
            loss.backward()
            optimizer.step()
        check_close(model, twin)


@compilers("default", "reduce-overhead")
def test_a_compiled_step(device: str, how: dict[str, str]) -> None:
    """The op in a compiled function, where rate and exponent are tensors: compiled once.

    Weight and momentum are as a training loop has them, always the same memory: with others
    Inductor would make no CUDA graph at all. It makes one of the product before the step.
    """
    weight = nn.Parameter(torch.randn(37, 41, device=device))
    twin, momentum = weight.detach().clone(), [torch.zeros_like(weight.data) for _ in range(2)]
    torch._dynamo.mark_static_address(momentum[0])
    alpha = torch.tensor(1.5, dtype=torch.float64, device=device)
    lr = torch.tensor(0.1, device=device)

    def step(weight: Tensor, grad: Tensor, buffer: Tensor) -> None:
        pp.sgd_step_([weight], [2 * grad], [buffer], alphas=[alpha], lr=lr, momentum=0.9)

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(lambda grad: step(weight, grad, momentum[0]), fullgraph=True, **how)
    for i in range(5):
        grad = torch.randn_like(twin)
        lr.fill_(0.1 / (i + 1))
        alpha.fill_(1 + i / 3)
        torch.compiler.cudagraph_mark_step_begin()
        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            compiled(grad)
        step(twin, grad, momentum[1])
        assert torch.equal(weight, twin)
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0
