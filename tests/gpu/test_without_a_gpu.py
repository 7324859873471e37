"""Ops and models on CUDA tensors that claim to be there and hold no values; exported models.

A backward pass cannot run on such tensors, for autograd looks for the GPU's streams; the gradient
ops are called by themselves.
"""

from __future__ import annotations

import copy
import io
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import EagerAndRecordGraphs
from torch._subclasses.fake_tensor import FakeTensorMode

import ppkernels as pp
from ppkernels.testing import DTYPES, SAMPLES

Network = Callable[..., nn.Sequential]


@pytest.fixture
def fake() -> Iterator[FakeTensorMode]:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        yield mode


def on_cuda(tensor: Tensor) -> Tensor:
    """A tensor without values that lies on a GPU as ``tensor`` lies on the CPU."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cuda")


def to_cuda(model: nn.Module) -> nn.Module:
    """``model`` with parameters, buffers and masks that claim to be on a GPU, without values."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(on_cuda(parameter))
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else on_cuda(buffer)
        for name in ("update_mask", "mask"):
            mask = getattr(module, name, None)
            if mask is not None:
                setattr(module, name, pp.BitMask(on_cuda(mask.words), mask.shape))
    return model


# ---- ops


@pytest.mark.parametrize("alpha_on", ["cpu", "cuda"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("op", SAMPLES)
def test_shapes_devices_dtypes_and_strides(
    op: str, dtype: torch.dtype, alpha_on: str, fake: FakeTensorMode
) -> None:
    row = SAMPLES[op]
    with torch._subclasses.fake_tensor.unset_fake_temporarily():
        samples = [s for s in row.samples(dtype, "cpu") if s.exponents == row.exponents[0]]
    for sample in samples:
        inputs = [on_cuda(tensor) for tensor in sample.inputs]
        exponents = [
            torch.empty((), dtype=torch.float64, device=alpha_on) for _ in sample.exponents
        ]
        result = getattr(torch.ops.ppkernels, op)(*inputs, *exponents)
        like = torch.empty_like(inputs[-1])
        assert (result.shape, result.dtype, result.device) == (like.shape, dtype, like.device)
        assert result.stride() == like.stride()
        if row.has_out:
            getattr(torch.ops.ppkernels, f"{op}_out")(*inputs, *exponents, result)


def test_masks(fake: FakeTensorMode) -> None:
    mask = torch.empty(7, 5, dtype=torch.bool, device="cuda")
    words = pp.pack_bits(mask)
    assert (words.shape, words.dtype, words.device.type) == ((5,), torch.uint8, "cuda")
    unpacked = pp.unpack_bits(words, (7, 5))
    assert (unpacked.shape, unpacked.dtype, unpacked.device.type) == ((7, 5), torch.bool, "cuda")
    count = pp.count_bits(words)
    assert (count.shape, count.dtype, count.device.type) == ((), torch.int64, "cuda")
    for dtype in DTYPES:
        weight = torch.empty(5, 7, dtype=dtype, device="cuda").t()
        masked = pp.apply_mask(weight, words)
        assert (masked.dtype, masked.device) == (dtype, weight.device)
        assert masked.stride() == weight.stride()


# ---- models

# By device: on a GPU a linear layer that stores φ is one op.
OPS_OF_A_FORWARD = {
    "cpu": {"theta": {"apply_mask": 1}, "phi": {"power": 3}},
    "cuda": {"theta": {"apply_mask": 1}, "phi": {"power": 1, "power_linear": 2}},
}


def ops_in(graph: torch.fx.Graph) -> Counter[str]:
    """How often each op of ppkernels stands in ``graph``."""
    names = [str(node.target).split(".") for node in graph.nodes if node.op == "call_function"]
    return Counter(name[1] for name in names if name[0] == "ppkernels")


def test_compile_one_graph(stores: str, network: Network) -> None:
    """The whole forward is one graph, with the ops in it and every tensor on the GPU."""
    model = network(stores)
    torch._dynamo.reset()
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        to_cuda(model)
        recorder = EagerAndRecordGraphs()
        compiled = torch.compile(model, fullgraph=True, backend=recorder)
        out = compiled(torch.empty(16, 3, 6, 6, device="cuda"))
    assert (out.shape, out.device.type) == ((16, 5), "cuda")
    assert len(recorder.graphs) == 1
    values = [
        node.meta["example_value"]
        for node in recorder.graphs[0].graph.nodes
        if isinstance(node.meta.get("example_value"), Tensor)
    ]
    assert {value.device.type for value in values} == {"cuda"}


def test_export_on_cuda(stores: str, network: Network) -> None:
    model = network(stores)
    with FakeTensorMode(allow_non_fake_inputs=True):
        to_cuda(model)
        exported = torch.export.export(model, (torch.empty(16, 3, 6, 6, device="cuda"),))
    assert ops_in(exported.graph) == OPS_OF_A_FORWARD["cuda"][stores]
    values = [node.meta["val"] for node in exported.graph.nodes if "val" in node.meta]
    assert {value.device.type for value in values} == {"cuda"}


# ---- exported models


def examples(batch: Callable[[int], tuple[Tensor, Tensor]]) -> Tensor:
    return batch(0)[0].float()


def test_export_keeps_exponents_and_values(
    stores: str, network: Network, batch: Callable[[int], Any]
) -> None:
    """Another exponent in the exported program is one in the model, and so is another weight."""
    model, x = network(stores).eval(), examples(batch)
    dynamic = ({0: torch.export.Dim("batch")},)
    exported = torch.export.export(model, (x,), dynamic_shapes=dynamic)
    assert ops_in(exported.graph) == OPS_OF_A_FORWARD["cpu"][stores]
    # Masks are constants of the program.
    hidden = {f"{i}.{name}" for i in (0, 3, 5) for name in ("update_mask", "mask")}
    assert exported.state_dict.keys() == model.state_dict().keys() - hidden
    program = exported.module()
    assert torch.equal(program(x), model(x))
    assert torch.equal(program(x[:3]), model(x[:3]))
    twin = copy.deepcopy(model)
    pp.set_alpha(twin, 3.0, keep="phi")
    for i in (0, 3, 5):
        program.get_buffer(f"{i}.alpha").fill_(3.0)
        with torch.no_grad():
            program.get_parameter(f"{i}.weight").copy_(twin[i].weight)
    assert torch.equal(program(x), twin(x))
    assert not torch.equal(program(x), network(stores)(x))


def test_an_exported_program_is_saved_and_loaded(
    stores: str, network: Network, batch: Callable[[int], Any]
) -> None:
    model, x = network(stores).eval(), examples(batch)
    file = io.BytesIO()
    torch.export.save(torch.export.export(model, (x,)), file)
    file.seek(0)
    program = torch.export.load(file).module()
    with torch.no_grad():
        assert torch.equal(program(x), model(x))
    assert program.get_buffer("3.alpha").dtype == torch.float64


# ---- autocast inside one graph


def test_compile_with_autocast(stores: str, network: Network, batch: Callable[[int], Any]) -> None:
    """Forward and backward; exponents change without another compilation."""
    model, x = network(stores), examples(batch)
    twin = copy.deepcopy(model)

    def loss(net: nn.Module) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return net(x).float().square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for alpha in (1.5, 2.5, 1.0):
        for net in (model, twin):
            pp.set_alpha(net, alpha, keep="phi")
            net.zero_grad()
        with torch._dynamo.config.patch(error_on_recompile=alpha != 1.5):
            compiled(model).backward()
        loss(twin).backward()
        for mine, other in zip(model.parameters(), twin.parameters(), strict=True):
            assert mine.grad.dtype == torch.float32
            torch.testing.assert_close(mine.grad, other.grad, rtol=1e-2, atol=1e-2)
